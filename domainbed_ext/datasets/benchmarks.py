"""The field's benchmarks, in DomainBed's folders, names and order of environments."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from domainbed_ext.datasets.folder import ImageFileDataset, ImageIndex, scan_folder
from domainbed_ext.errors import UsageError

logger = logging.getLogger(__name__)


class Benchmark(ImageFileDataset):
    """A published data set, with what is known about its copies.

    Attributes:
        FOLDER: Below the data folder.
        DOMAIN_FOLDERS: What DomainBed's copies call the environments; other names in this
            alphabetical order do as well.
        DOMAIN_COUNTS, NUM_IMAGES, NUM_CLASSES: Of the copy that published tables were made with.
        OTHER_COUNTS: Images per domain of other copies that are in circulation.
    """

    FOLDER: ClassVar[str]
    DOMAIN_FOLDERS: ClassVar[tuple[str, ...]]
    DOMAIN_COUNTS: ClassVar[tuple[int, ...]]
    OTHER_COUNTS: ClassVar[tuple[tuple[int, ...], ...]] = ()
    NUM_IMAGES: ClassVar[int]
    NUM_CLASSES: ClassVar[int]

    def __init__(
        self, root: str | Path, test_envs: Sequence[int], hparams: Mapping[str, Any]
    ) -> None:
        index = self.index(root)
        if problem := self.count_problem(index):
            logger.warning("%s", problem)
        super().__init__(index, test_envs, hparams)

    @classmethod
    def index(cls, root: str | Path) -> ImageIndex:
        """Lists the folder below ``root``."""
        return cls.index_of(Path(root) / cls.FOLDER)

    @classmethod
    def index_of(cls, folder: Path) -> ImageIndex:
        """Lists a folder that holds this data set."""
        name = cls.__name__
        index = scan_folder(
            folder,
            hint=f"put {name} there (python -m domainbed_ext.scripts.download {name} fetches it), "
            "or pass the --data_dir that holds it",
        )
        if len(index.domains) != len(cls.ENVIRONMENTS):
            raise UsageError(
                f"{folder} holds {len(index.domains)} domains ({', '.join(index.domains)}), but "
                f"{name} has {len(cls.ENVIRONMENTS)}; remove what does not belong there"
            )
        return index

    @classmethod
    def count_problem(cls, index: ImageIndex) -> str | None:
        """What differs from the published copy, or None."""
        num_classes = len(index.class_names)
        found = [sum(map(len, classes.values())) for classes in index.paths.values()]
        if (tuple(found), num_classes) == (cls.DOMAIN_COUNTS, cls.NUM_CLASSES):
            return None
        message = (
            f"this copy of {cls.__name__} has {sum(found):,} images in {num_classes} classes, the "
            f"published tables {cls.NUM_IMAGES:,} in {cls.NUM_CLASSES}"
        )
        different = [
            f"{domain} {count:,} instead of {expected:,}"
            for domain, count, expected in zip(index.domains, found, cls.DOMAIN_COUNTS, strict=True)
            if count != expected
        ]
        if different:
            message += f" ({', '.join(different)})"
        if cls.is_known_copy(index):
            message += "; it is another complete copy in circulation"
        return f"{message}; do not compare them closely"

    @classmethod
    def is_known_copy(cls, index: ImageIndex) -> bool:
        """Whether it is as complete as a copy gets: the tables' or another one in circulation."""
        found = tuple(sum(map(len, classes.values())) for classes in index.paths.values())
        complete = found in (cls.DOMAIN_COUNTS, *cls.OTHER_COUNTS)
        return complete and len(index.class_names) == cls.NUM_CLASSES


class PACS(Benchmark):
    """Art painting, cartoon, photo, sketch."""

    FOLDER, NUM_IMAGES, NUM_CLASSES = "PACS", 9_991, 7
    ENVIRONMENTS = ("A", "C", "P", "S")
    DOMAIN_FOLDERS = ("art_painting", "cartoon", "photo", "sketch")
    DOMAIN_COUNTS = (2_048, 2_344, 1_670, 3_929)


class VLCS(Benchmark):
    """Caltech101, LabelMe, SUN09, VOC2007."""

    FOLDER, NUM_IMAGES, NUM_CLASSES = "VLCS", 10_729, 5
    ENVIRONMENTS = ("C", "L", "S", "V")
    DOMAIN_FOLDERS = ("Caltech101", "LabelMe", "SUN09", "VOC2007")
    DOMAIN_COUNTS = (1_415, 2_656, 3_282, 3_376)


class OfficeHome(Benchmark):
    """Art, clipart, product, real world."""

    FOLDER, NUM_IMAGES, NUM_CLASSES = "office_home", 15_588, 65
    ENVIRONMENTS = ("A", "C", "P", "R")
    DOMAIN_FOLDERS = ("Art", "Clipart", "Product", "Real World")
    DOMAIN_COUNTS = (2_427, 4_365, 4_439, 4_357)


class TerraIncognita(Benchmark):
    """Camera traps at four places. Today's archive often holds 24,330 images."""

    FOLDER, NUM_IMAGES, NUM_CLASSES = "terra_incognita", 24_788, 10
    ENVIRONMENTS = ("L100", "L38", "L43", "L46")
    DOMAIN_FOLDERS = ("location_100", "location_38", "location_43", "location_46")
    DOMAIN_COUNTS = (4_879, 9_767, 4_020, 6_122)
    OTHER_COUNTS = ((4_741, 9_736, 3_970, 5_883),)


class DomainNet(Benchmark):
    """Clipart, infograph, painting, quickdraw, real, sketch; counts after removing duplicates."""

    N_STEPS = 15001
    CHECKPOINT_FREQ = 1000
    FOLDER, NUM_IMAGES, NUM_CLASSES = "domain_net", 586_575, 345
    ENVIRONMENTS = ("clip", "info", "paint", "quick", "real", "sketch")
    DOMAIN_FOLDERS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
    DOMAIN_COUNTS = (48_129, 51_605, 72_266, 172_500, 172_947, 69_128)
