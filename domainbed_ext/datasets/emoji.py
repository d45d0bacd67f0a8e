"""EmojiDG: the same Unicode code points, each drawn by several independent artists."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

CACHE_FOLDER = "EmojiDG"
CACHE_INDEX = "emojidg.json"
CACHE_FORMAT = 1
IMAGE_SIZE = 64

CODEPOINT_CLASSES: tuple[str, ...] = (
    "face person hand mammal critter plant food vehicle place sky clothing sport device office "
    "tool sign"
).split()  # type: ignore[assignment]


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
    with source.open(encoding="utf-8", newline="") as file:
        return tuple(
            EmojiLabel(row["codepoint"], row["class"], row["name"]) for row in csv.DictReader(file)
        )
