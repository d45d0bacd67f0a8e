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
        NUM_IMAGES, NUM_CLASSES: Of the copy that the published tables were made with.
    """

    FOLDER: ClassVar[str]
    DOMAIN_FOLDERS: ClassVar[tuple[str, ...]]
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
        name = cls.__name__
        folder = Path(root) / cls.FOLDER
        index = scan_folder(
            folder,
            hint=f"put {name} there (python -m domainbed_ext.scripts.download {name} says how), "
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
        found = (index.num_images, len(index.class_names))
        if found == (cls.NUM_IMAGES, cls.NUM_CLASSES):
            return None
        return (
            f"this copy of {cls.__name__} has {found[0]:,} images in {found[1]} classes, the "
            f"published tables {cls.NUM_IMAGES:,} in {cls.NUM_CLASSES}; do not compare them closely"
        )


class PACS(Benchmark):
    """Art painting, cartoon, photo, sketch."""

    FOLDER, NUM_IMAGES, NUM_CLASSES = "PACS", 9_991, 7
    ENVIRONMENTS = ("A", "C", "P", "S")
    DOMAIN_FOLDERS = ("art_painting", "cartoon", "photo", "sketch")


class VLCS(Benchmark):
    """Caltech101, LabelMe, SUN09, VOC2007."""

    FOLDER, NUM_IMAGES, NUM_CLASSES = "VLCS", 10_729, 5
    ENVIRONMENTS = ("C", "L", "S", "V")
    DOMAIN_FOLDERS = ("Caltech101", "LabelMe", "SUN09", "VOC2007")


class OfficeHome(Benchmark):
    """Art, clipart, product, real world."""

    FOLDER, NUM_IMAGES, NUM_CLASSES = "office_home", 15_588, 65
    ENVIRONMENTS = ("A", "C", "P", "R")
    DOMAIN_FOLDERS = ("Art", "Clipart", "Product", "Real World")


class TerraIncognita(Benchmark):
    """Camera traps at four places. Today's archive often holds 24,330 images."""

    FOLDER, NUM_IMAGES, NUM_CLASSES = "terra_incognita", 24_788, 10
    ENVIRONMENTS = ("L100", "L38", "L43", "L46")
    DOMAIN_FOLDERS = ("location_100", "location_38", "location_43", "location_46")


class DomainNet(Benchmark):
    """Clipart, infograph, painting, quickdraw, real, sketch; counts after removing duplicates."""

    N_STEPS = 15001
    CHECKPOINT_FREQ = 1000
    FOLDER, NUM_IMAGES, NUM_CLASSES = "domain_net", 586_575, 345
    ENVIRONMENTS = ("clip", "info", "paint", "quick", "real", "sketch")
    DOMAIN_FOLDERS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
