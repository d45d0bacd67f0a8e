"""Batches that worker processes decode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from domainbed_ext.errors import UsageError
from domainbed_ext.stop_signals import leave_stops_to_parent

Batch = tuple[Tensor, Tensor]


class Loadable(Protocol):
    """Batches by number, as far as a worker makes them."""

    def load(self, step: int) -> Batch: ...


def from_workers(
    batches: Loadable, steps: Iterable[int], num_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """What `load` of the batches makes, step by step.

    Raises:
        UsageError: One that a worker raised.
    """
    loader = DataLoader(
        _Reporting(batches),
        batch_size=None,
        sampler=_StepSampler(steps),
        num_workers=num_workers,
        collate_fn=_as_is,
        pin_memory=pin_memory,
        # DataLoader draws a base seed from the global generator otherwise, moving the run's stream.
        generator=torch.Generator(),
        worker_init_fn=leave_stops_to_parent,
    )
    for item in loader:
        if isinstance(item, _Failure):
            raise UsageError(item.message)
        yield item


@dataclass(frozen=True)
class _Failure:
    message: str


class _Reporting(Dataset):
    """Hands bad input over as a value: a worker's exceptions arrive wrapped in a traceback."""

    def __init__(self, batches: Loadable) -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> Batch | _Failure:
        try:
            return self.batches.load(step)
        except UsageError as error:
            return _Failure(str(error))


class _StepSampler(Sampler):
    def __init__(self, steps: Iterable[int]) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[int]:
        return iter(self.steps)


def _as_is(item: Any) -> Any:
    return item
