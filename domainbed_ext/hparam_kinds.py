"""Kinds of hyper-parameter values: what is possible, and how to say so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


class Values(Protocol):
    """A set of possible values."""

    @property
    def meaning(self) -> str:
        """What the hyper-parameter is."""
        ...

    def describe(self) -> str:
        """The possible values, in words that end the sentence "expected ..."."""
        ...

    def checked(self, value: object) -> Any:
        """The value, as the type this set has; raises ValueError when it is not in the set."""
        ...


@dataclass(frozen=True)
class Flag:
    """true or false."""

    meaning: str

    def describe(self) -> str:
        return "true or false"

    def checked(self, value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value


@dataclass(frozen=True)
class Integer:
    """A whole number from `low` to `high`."""

    meaning: str
    low: int = 0
    high: int | None = None

    def describe(self) -> str:
        return f"a whole number {_range(self.low, self.high)}"

    def checked(self, value: object) -> int:
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or not _inside(value, self.low, self.high)
        ):
            raise ValueError
        return value


@dataclass(frozen=True)
class Number:
    """A finite number from `low` to `high`, where either end can be excluded. Integers are taken as
    floats.
    """

    meaning: str
    low: float = 0.0
    high: float | None = None
    low_open: bool = False
    high_open: bool = False

    def describe(self) -> str:
        low = f"above {self.low:g}" if self.low_open else f"of at least {self.low:g}"
        high = (
            ""
            if self.high is None
            else f" and {'below' if self.high_open else 'at most'} {self.high:g}"
        )
        return f"a number {low}{high}"

    def checked(self, value: object) -> float:
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
        ):
            raise ValueError
        edge = (self.low_open and value == self.low) or (self.high_open and value == self.high)
        if edge or not _inside(value, self.low, self.high):
            raise ValueError
        return float(value)


class RefusedError(ValueError):
    """A value that means something, and cannot be had here; says why and what to do instead."""


@dataclass(frozen=True)
class Choice:
    """One of a few words.

    Attributes:
        refused: Further words, and why they cannot be had.
    """

    meaning: str
    choices: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        return "one of " + ", ".join(f'"{choice}"' for choice in self.choices)

    def checked(self, value: object) -> str:
        if isinstance(value, str) and value in self.refused:
            raise RefusedError(self.refused[value])
        if value not in self.choices:
            raise ValueError
        return str(value)


@dataclass(frozen=True)
class Name:
    """Any non-empty text."""

    meaning: str

    def describe(self) -> str:
        return "a name in quotes"

    def checked(self, value: object) -> str:
        if not isinstance(value, str) or not value.strip():
            raise ValueError
        return value


@dataclass(frozen=True)
class Folder:
    """The path of a folder; empty where there is none."""

    meaning: str

    def describe(self) -> str:
        return "a path in quotes"

    def checked(self, value: object) -> str:
        if not isinstance(value, str):
            raise ValueError
        return value


@dataclass(frozen=True)
class Layers:
    """The name of a placement, or the block indices themselves."""

    meaning: str
    choices: tuple[str, ...] = ("gmoe", "every_other", "last_two")

    def describe(self) -> str:
        named = ", ".join(f'"{choice}"' for choice in self.choices)
        return f"one of {named}, or a list of different block indices such as [8, 10]"

    def checked(self, value: object) -> str | list[int]:
        if isinstance(value, str) and value in self.choices:
            return value
        if not isinstance(value, (list, tuple)) or not value:
            raise ValueError
        if any(
            isinstance(index, bool) or not isinstance(index, int) or index < 0 for index in value
        ):
            raise ValueError
        if len(set(value)) != len(value):
            raise ValueError
        return list(value)


def _inside(value: float, low: float, high: float | None) -> bool:
    return value >= low and (high is None or value <= high)


def _range(low: int, high: int | None) -> str:
    return f"of at least {low}" if high is None else f"from {low} to {high}"
