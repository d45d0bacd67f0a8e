"""Near-duplicate images: the same picture in two domains, in another size, format or compression.

An image is summed up by a grey thumbnail and 128 bits that say where it gets darker to the right
and downwards. Images that share a quarter of the bits exactly are compared by the correlation of
their thumbnails, which neither brightness nor contrast changes. N images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

SIDE = 16  # of the thumbnails
CELLS = 8  # per side, whose differences are the bits
MIN_STEP = 4  # grey levels; less is noise of the compression
MIN_CONTRAST = 4.0  # standard deviation of grey levels; an empty page is like any other
MIN_CORRELATION = 0.98
MAX_GROUP = 400  # images with equal bits; more share an empty background, not a picture


@dataclass(frozen=True)
class Pair:
    """Two images, by position, and how much they are alike (1 at most)."""

    first: int
    second: int
    correlation: float


def thumbnail(image: Image.Image) -> np.ndarray:
    """uint8 (SIDE, SIDE), grey."""
    from PIL import Image

    return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))


def near_duplicates(thumbnails: np.ndarray, groups: Sequence[int] | np.ndarray) -> list[Pair]:
    """Pairs of alike images of different groups, the most alike first.

    Args:
        thumbnails: uint8 (N, SIDE, SIDE), from `thumbnail`.
        groups: One number per image; images of one group are not compared.
    """
    if not len(thumbnails):
        return []
    group_N = np.asarray(groups)
    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    flat -= flat.mean(1, keepdims=True)
    contrast_N = flat.std(1)
    usable = np.flatnonzero(contrast_N >= MIN_CONTRAST)
    unit = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
    bands = _bands(thumbnails)
    found: dict[tuple[int, int], float] = {}
    for band in range(bands.shape[1]):
        for members in _equal(bands[:, band], usable):
            alike = unit[members] @ unit[members].T
            across = group_N[members, None] != group_N[None, members]
            for row, column in np.argwhere(np.triu(across & (alike >= MIN_CORRELATION), 1)):
                pair = sorted((int(members[row]), int(members[column])))
                found[pair[0], pair[1]] = float(alike[row, column])
    pairs = [Pair(*key, min(value, 1.0)) for key, value in found.items()]
    return sorted(pairs, key=lambda pair: (-pair.correlation, pair.first, pair.second))


def _bands(thumbnails: np.ndarray) -> np.ndarray:
    """uint32 (N, 4): the bits of each image in four parts."""
    cells = thumbnails.reshape(len(thumbnails), CELLS, SIDE // CELLS, CELLS, SIDE // CELLS)
    cells = cells.astype(np.int16).mean((2, 4))
    right = cells - np.roll(cells, -1, axis=2) > MIN_STEP
    down = cells - np.roll(cells, -1, axis=1) > MIN_STEP
    bits = np.concatenate([right.reshape(len(cells), -1), down.reshape(len(cells), -1)], axis=1)
    return np.packbits(bits, axis=1).view(np.uint32)


def _equal(values: np.ndarray, positions: np.ndarray) -> Iterator[np.ndarray]:
    """Groups of two or more positions with equal values."""
    order = positions[np.argsort(values[positions], kind="stable")]
    edges = np.flatnonzero(np.diff(values[order])) + 1
    for members in np.split(order, edges):
        if 2 <= len(members) <= MAX_GROUP:
            yield members
