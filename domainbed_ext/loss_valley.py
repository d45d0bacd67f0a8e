"""Where SWAD starts and stops averaging: a stretch of low validation loss (arXiv 2102.08604)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Segment = TypeVar("Segment")


@dataclass
class LossValley(Generic[Segment]):
    """Which stretch of a run SWAD averages, found while the validation losses come in.

    A segment is what was trained between two evaluations; anything with a `+` will do. The loss has
    converged at an evaluation when none of the next `n_converge - 1` is lower. From the mean of
    these and a tolerance comes the threshold. The window starts behind the earliest evaluation from
    which on the loss stayed at or below the threshold, looking back `n_tolerance - n_converge`
    evaluations at most, and never behind the segment that converged. It ends with the last
    evaluation at or below the threshold, and for good when `n_tolerance` in a row are above it.

    Args:
        n_converge: Evaluations that decide that the loss has converged.
        n_tolerance: Evaluations above the threshold that end the window.
        tolerance_ratio: How far above the converged loss the threshold is.

    Attributes:
        threshold: Once converged.
        window: All segments from the start to the last one at or below the threshold.
        beyond: The segments after it, which join it if the loss comes down again.
        num_beyond: How many they are.
        recent: (loss, segment) of evaluations the window may still start with.
    """

    n_converge: int
    n_tolerance: int
    tolerance_ratio: float
    threshold: float | None = None
    window: Any = None
    beyond: Any = None
    num_beyond: int = 0
    recent: list[tuple[float, Any]] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether later segments cannot change the window any more."""
        return self.num_beyond >= self.n_tolerance

    def observe(self, loss: float, segment: Segment) -> None:
        """Take the validation loss of an evaluation and the segment that ends there."""
        loss = math.inf if math.isnan(loss) else loss
        if self.threshold is None:
            self.recent.append((loss, segment))
            self._look_for_start()
        else:
            self._extend(loss, segment)

    def result(self) -> Segment:
        """The window; of a loss that has not converged, the last segment."""
        return self.recent[-1][1] if self.threshold is None else self.window

    def _look_for_start(self) -> None:
        losses = [loss for loss, _ in self.recent]
        look_back = max(self.n_tolerance - self.n_converge, 0)
        latest = losses[-self.n_converge :]
        if len(latest) < self.n_converge or latest[0] > min(latest):
            # at the lowest of these, or later, the next evaluation can find convergence
            candidates = losses[-(self.n_converge - 1) :]
            first = len(losses) - len(candidates) + candidates.index(min(candidates))
            del self.recent[: max(first - look_back, 0)]
            return
        self.threshold = sum(latest) / len(latest) * (1 + self.tolerance_ratio)
        converged = len(losses) - self.n_converge
        stayed = converged
        while stayed > max(converged - look_back, 0) and losses[stayed - 1] <= self.threshold:
            stayed -= 1
        start = min(stayed + 1, converged)
        self.window = self.recent[start][1]
        for loss, segment in self.recent[start + 1 :]:
            self._extend(loss, segment)
        self.recent = []

    def _extend(self, loss: float, segment: Segment) -> None:
        if self.is_over:
            return
        self.beyond = segment if self.beyond is None else self.beyond + segment
        self.num_beyond += 1
        assert self.threshold is not None
        if loss <= self.threshold:
            self.window = self.window + self.beyond
            self.beyond, self.num_beyond = None, 0
