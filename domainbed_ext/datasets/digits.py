"""RotatedDigits and ColoredDigits: DomainBed's two MNIST benchmarks on scikit-learn's small scans.

1797 real handwritten digits of 8 x 8 pixels come with scikit-learn, so nothing is downloaded. They
are enlarged to 16 x 16, shuffled once with a fixed seed and dealt to the environments: no digit is
in two of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from domainbed_ext.datasets.base import ArrayEnvironment, MultipleDomainDataset
from domainbed_ext.errors import UsageError

IMAGE_SIZE = 16
NUM_DIGITS = 1797
SHUFFLE_SEED = 0
LABEL_NOISE = 0.25


@lru_cache(maxsize=1)
def shuffled_digits() -> tuple[np.ndarray, np.ndarray]:
    """The scans as uint8 (1797, 16, 16) and their digits, in the order they are dealt out."""
    from PIL import Image

    scans, digits = _load_digits()
    grey = np.round(scans * (255 / 16)).astype(np.uint8)  # the scans' values are 0 to 16
    side = (IMAGE_SIZE, IMAGE_SIZE)
    large = [np.asarray(Image.fromarray(g).resize(side, Image.Resampling.BICUBIC)) for g in grey]
    order = np.random.RandomState(SHUFFLE_SEED).permutation(len(digits))
    return np.stack(large)[order], digits[order]


def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    package = importlib.util.find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise UsageError(
            "the digits come with scikit-learn, which is not installed; run "
            "pip install scikit-learn"
        )
    table = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    if table.is_file():
        # Importing sklearn takes longer than training on its digits for some steps.
        rows = np.loadtxt(table, delimiter=",")
        return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images, bunch.target.astype(np.int64)


class Digits(MultipleDomainDataset):
    """What the two share: dealing the digits to environments."""

    N_STEPS = 301
    DEFAULT_AUGMENTATION = "none"
    INPUT_SHAPE: ClassVar[tuple[int, int, int]]
    CLASS_NAMES: ClassVar[tuple[str, ...]]

    def __init__(
        self, root: str | None, test_envs: Sequence[int], hparams: Mapping[str, Any]
    ) -> None:
        scans, digits = shuffled_digits()
        n = len(self.ENVIRONMENTS)
        super().__init__(
            [self.make_environment(i, scans[i::n], digits[i::n]) for i in range(n)],
            self.CLASS_NAMES,
            input_shape=self.INPUT_SHAPE,
            test_envs=test_envs,
            hparams=hparams,
        )

    def make_environment(self, env: int, scans: np.ndarray, digits: np.ndarray) -> ArrayEnvironment:
        """Environment `env` from its share of the scans (N, 16, 16)."""
        raise NotImplementedError


class RotatedDigits(Digits):
    """Ten digits, turned by another angle in each environment."""

    ENVIRONMENTS = ("0", "15", "30", "45", "60", "75")
    INPUT_SHAPE = (1, IMAGE_SIZE, IMAGE_SIZE)
    CLASS_NAMES = tuple(str(digit) for digit in range(10))

    def make_environment(self, env: int, scans: np.ndarray, digits: np.ndarray) -> ArrayEnvironment:
        from PIL import Image

        angle = float(self.ENVIRONMENTS[env])
        turned = [
            np.asarray(Image.fromarray(scan).rotate(angle, Image.Resampling.BILINEAR))
            for scan in scans
        ]
        return ArrayEnvironment(self.ENVIRONMENTS[env], np.stack(turned)[:, None], digits)


class ColoredDigits(Digits):
    """Below five or not; the colour says more than the shape, in the last environment wrongly.

    A quarter of the labels is wrong, so the shape predicts at most 75 %. The colour, one of two
    channels, agrees with the label but for 10 %, 20 % and 90 % of the images.
    """

    ENVIRONMENTS = ("+90%", "+80%", "-90%")
    COLOR_FLIPS: ClassVar[tuple[float, ...]] = (0.1, 0.2, 0.9)
    INPUT_SHAPE = (2, IMAGE_SIZE, IMAGE_SIZE)
    CLASS_NAMES = ("five or more", "below five")

    def make_environment(self, env: int, scans: np.ndarray, digits: np.ndarray) -> ArrayEnvironment:
        random = np.random.RandomState(SHUFFLE_SEED + 1 + env)
        labels = (digits < 5).astype(np.int64) ^ _flips(random, LABEL_NOISE, len(digits))
        colors = labels ^ _flips(random, self.COLOR_FLIPS[env], len(digits))
        images = np.zeros((len(scans), *self.INPUT_SHAPE), np.uint8)
        images[np.arange(len(scans)), colors] = scans
        return ArrayEnvironment(self.ENVIRONMENTS[env], images, labels)


def _flips(random: np.random.RandomState, fraction: float, n: int) -> np.ndarray:
    """Ones at exactly that fraction of n places: a few hundred coin tosses would miss it by 2 %."""
    flips = np.zeros(n, np.int64)
    flips[random.permutation(n)[: round(fraction * n)]] = 1
    return flips
