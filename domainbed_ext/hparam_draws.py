"""One hyper-parameter: a name, a default and a random draw; and the draws there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from domainbed_ext.seeds import seed_hash

Draw = Callable[[np.random.RandomState], Any]


@dataclass(frozen=True)
class HParam:
    """One hyper-parameter of one algorithm on one data set.

    Attributes:
        name: Its key in --hparams and in the records.
        default: Its value for hparams seed 0.
        draw: A random value from a generator of its own.
    """

    name: str
    default: Any
    draw: Draw

    def random(self, seed: int) -> Any:
        """The value for a seed; independent of every other hyper-parameter."""
        return self.draw(np.random.RandomState(seed_hash(seed, self.name)))


def fixed(name: str, value: Any) -> HParam:
    return HParam(name, value, always(value))


def always(value: Any) -> Draw:
    return lambda random: value


def one_of(*values: Any) -> Draw:
    # .choice draws an index and hands back a NumPy scalar; records need the Python value.
    return lambda random: random.choice(values).item()


def log_uniform(low: float, high: float) -> Draw:
    return lambda random: float(10 ** random.uniform(low, high))


def power_of_two(low: float, high: float) -> Draw:
    return lambda random: int(2 ** random.uniform(low, high))
