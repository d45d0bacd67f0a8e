"""The look that an algorithm may take at the training images before its first step, with word of
how far it is: there may be more images than in all steps of a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from torch import Tensor

from domainbed_ext.display import PREPARING, ReportProgress, RunState
from domainbed_ext.loaders import EvalBatches


class CountedBatches:
    """Batches of images, and as they are taken, word of how many have been.

    Args:
        batches: What to hand on, each time anew.
        first: How many images of other batches come before these.
        total: Of how many in all.
        progress: Who is told.
    """

    def __init__(
        self, batches: EvalBatches, *, first: int, total: int, progress: ReportProgress
    ) -> None:
        self._batches = batches
        self._first = first
        self._total = total
        self._progress = progress

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        done = self._first
        self._tell(done)
        for x, y in self._batches:
            yield x, y
            done += len(y)
            self._tell(done)

    def _tell(self, done: int) -> None:
        self._progress(RunState(done, self._total, phase=PREPARING))


def counted_images(
    environments: Sequence[EvalBatches], progress: ReportProgress | None
) -> Sequence[Iterable[tuple[Tensor, Tensor]]]:
    """What `Algorithm.prepare` is given; with somebody to tell, each domain's batches count on from
    those of the domains before it.
    """
    if progress is None:
        return environments
    numbers = [len(batches.split) for batches in environments]
    firsts = accumulate(numbers, initial=0)
    return [
        CountedBatches(batches, first=first, total=sum(numbers), progress=progress)
        for batches, first in zip(environments, firsts, strict=False)
    ]
