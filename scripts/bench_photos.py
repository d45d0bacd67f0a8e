"""JPEG files that cost what photographs do: soft shapes, edges and grain, the same on every run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE = 256
QUALITY = 90
GRAIN = 8.0  # standard deviation of the noise, of 255


def write_photos(folder: Path, domains: Sequence[str], num_classes: int, *, per_class: int) -> int:
    """Writes `domain/class/number.jpg` below a folder. Returns how many."""
    count = 0
    for domain in domains:
        for label in range(num_classes):
            place = folder / domain / f"class{label}"
            place.mkdir(parents=True, exist_ok=True)
            for number in range(per_class):
                photo(np.random.default_rng([count, label]), label).save(
                    place / f"{number:03}.jpg", quality=QUALITY
                )
                count += 1
    return count


def photo(random: np.random.Generator, label: int) -> Image.Image:
    """One picture: a blurred background, `label + 1` shapes, grain."""
    small = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    image = small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(label + 1):
        left, top = (int(v) for v in random.integers(0, SIDE // 2, 2))
        width, height = (int(v) for v in random.integers(20, SIDE // 2, 2))
        colour = tuple(int(v) for v in random.integers(0, 256, 3))
        shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
        shape((left, top, left + width, top + height), fill=colour)
    grain = random.normal(0, GRAIN, (SIDE, SIDE, 3))
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
