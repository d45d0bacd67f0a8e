"""EmojiDG: the same Unicode code points, each drawn by several independent artists.

Domain: artist. Class: what is drawn. It measures generalising to another artist's style. Its split
is a function of the code point alone, the same in every domain, because DomainBed's independent
split per environment would put the same concept into one domain's training half and into another
one's validation half.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from domainbed_ext.datasets.base import (
    ArrayEnvironment,
    EnvSplit,
    MultipleDomainDataset,
    backbone_image_size,
)
from domainbed_ext.errors import UsageError
from domainbed_ext.splits import TEST, TRAIN, VALIDATION, emojidg_folds

CACHE_FOLDER = "EmojiDG"
CACHE_INDEX = "emojidg.json"
CACHE_FORMAT = 1
IMAGE_SIZE = 64
VALIDATION_FRACTION = 0.2  # one fold of five

EMOJI_CLASSES: tuple[str, ...] = (
    *("face", "person", "hand", "mammal", "critter", "plant", "food", "vehicle"),
    *("place", "sky", "clothing", "sport", "device", "office", "tool", "sign"),
)


@dataclass(frozen=True)
class EmojiLabel:
    """A row of the label table: one code point and what it shows."""

    codepoint: str  # lower-case hex, without the variation selector
    class_name: str
    name: str


@lru_cache(maxsize=1)
def label_table() -> tuple[EmojiLabel, ...]:
    """The 1039 labelled code points, in the order of the shipped table."""
    source = resources.files("domainbed_ext.datasets") / "data" / "emojidg_classes.csv"
    rows = csv.DictReader(source.read_text(encoding="utf-8").splitlines())
    return tuple(EmojiLabel(row["codepoint"], row["class"], row["name"]) for row in rows)


class EmojiEnvironment(ArrayEnvironment):
    """One artist's drawings.

    Attributes:
        codepoints: Hex code point of each image; one that the artist did not draw is not there.
    """

    def __init__(
        self,
        name: str,
        images: np.ndarray,
        labels: Sequence[int],
        codepoints: Sequence[str],
        *,
        size: int,
    ) -> None:
        super().__init__(name, images, labels, size=size)
        self.codepoints = list(codepoints)


def load_domains(folder: Path, names: Sequence[str], *, size: int) -> list[EmojiEnvironment]:
    """The named domains out of the cache, their images memory-mapped."""
    domains = read_index(folder)["domains"]
    missing = [name for name in names if name not in domains]
    if missing:
        raise UsageError(f"EmojiDG at {folder} lacks {', '.join(missing)}; {_download_hint(names)}")
    environments = []
    for name in names:
        entry = domains[name]
        path = folder / entry["file"]
        expected = (len(entry["codepoints"]), IMAGE_SIZE, IMAGE_SIZE, 3)
        try:
            # "c": private pages, written to by nobody, which torch accepts without a warning.
            images = np.load(path, mmap_mode="c", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read {path}: {error}; {_download_hint(names)}") from error
        if images.shape != expected or images.dtype != np.uint8:
            raise UsageError(
                f"{path} holds {images.dtype} {images.shape}, expected uint8 {expected}; delete "
                f"it, then {_download_hint(names)}"
            )
        environments.append(
            EmojiEnvironment(
                name,
                images.transpose(0, 3, 1, 2),
                entry["labels"],
                entry["codepoints"],
                size=size,
            )
        )
    return environments


def read_index(folder: Path) -> dict[str, Any]:
    """The cache's index."""
    path = folder / CACHE_INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no EmojiDG at {folder}; {_download_hint(())}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}; {_download_hint(())}") from error
    if index.get("format") != CACHE_FORMAT:
        raise UsageError(
            f"{path} has format {index.get('format')}, expected {CACHE_FORMAT}; "
            f"{_download_hint(())}"
        )
    return index


def _download_hint(names: Sequence[str]) -> str:
    flag = " --npm" if set(names) - set(EmojiDG.ENVIRONMENTS) else ""
    return (
        f"run python -m domainbed_ext.scripts.download EmojiDG{flag}, "
        "or pass the --data_dir it was given"
    )


class EmojiDG(MultipleDomainDataset):
    """Sixteen classes in four styles: flat colour, outlined colour, bold line, fine engraving.

    Splits: "in" and "out" train and validate; "unseen" are the test fold's code points, which no
    domain trains on. In a test environment "in" is therefore "seen": concepts known from other
    artists.
    """

    N_STEPS = 2501
    CHECKPOINT_FREQ = 500
    ENVIRONMENTS: ClassVar[tuple[str, ...]] = ("twemoji", "openmoji", "notomono", "symbola")
    INPUT_SHAPE = (3, IMAGE_SIZE, IMAGE_SIZE)

    def __init__(
        self, root: str | Path, test_envs: Sequence[int], hparams: Mapping[str, Any]
    ) -> None:
        size = backbone_image_size(hparams) or IMAGE_SIZE
        super().__init__(
            load_domains(Path(root) / CACHE_FOLDER, self.ENVIRONMENTS, size=size),
            EMOJI_CLASSES,
            input_shape=(3, size, size),
            test_envs=test_envs,
            hparams=hparams,
        )

    def splits(
        self,
        env: int,
        *,
        holdout_fraction: float = VALIDATION_FRACTION,
        trial_seed: int,
        uda_holdout_fraction: float = 0.0,
        test_envs: Sequence[int] = (),
    ) -> dict[str, EnvSplit]:
        """The code point folds: "in" three fifths, "out" and "unseen" one fifth each."""
        if holdout_fraction != VALIDATION_FRACTION:
            raise UsageError(
                f"holdout_fraction={holdout_fraction}: EmojiDG always validates on one of five "
                f"code point folds; leave it at {VALIDATION_FRACTION}"
            )
        table = label_table()
        folds = emojidg_folds(
            [label.codepoint for label in table],
            [label.class_name for label in table],
            trial_seed=trial_seed,
        )
        fold_of = dict(zip((label.codepoint for label in table), folds, strict=True))
        environment = self.datasets[env]
        assert isinstance(environment, EmojiEnvironment)
        drawn = np.array([fold_of[codepoint] for codepoint in environment.codepoints])
        roles = {"in": TRAIN, "out": VALIDATION, "unseen": TEST}
        parts = {name: np.flatnonzero(drawn == role) for name, role in roles.items()}
        return self._named_splits(env, parts, uda_holdout_fraction, trial_seed, test_envs)


class EmojiDG6(EmojiDG):
    """EmojiDG with two more styles: shaded colour and 3D renders.

    notomono is a half sister of noto: with one of them held out, the other is not all that foreign.
    """

    ENVIRONMENTS = (*EmojiDG.ENVIRONMENTS, "noto", "fluent3d")
