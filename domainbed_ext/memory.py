"""Memory of GPUs that jobs share: what is measured, whether one more job fits, what ran out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MIB = 2**20
# After so many steps a run has taken what it takes: the first is followed by an evaluation.
SETTLED_STEPS = 5
# Left free, as a part of the device: jobs draw batch sizes, and memory gets fragmented.
MARGIN = 0.1
# What a process takes on a device before its first tensor; torch does not count it.
CONTEXT_BYTES = 700 * MIB

# How torch, cuBLAS and cuDNN say it where they do not raise OutOfMemoryError.
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


@dataclass(frozen=True)
class MemoryReport:
    """What a job's process sees, in bytes.

    Attributes:
        total, free: Of the device, whoever uses the rest.
        held: What torch has reserved for the job.
        peak: The most it has reserved since the job began.
        steps: Steps that the process has taken.
    """

    total: int
    free: int
    held: int
    peak: int
    steps: int


def measure_memory(steps: int) -> MemoryReport | None:
    """The report of this process; None before it has used its device, or without one."""
    import torch

    if not torch.cuda.is_initialized():
        return None
    free, total = torch.cuda.mem_get_info()
    held, peak = torch.cuda.memory_reserved(), torch.cuda.max_memory_reserved()
    return MemoryReport(total=total, free=free, held=held, peak=peak, steps=steps)


def has_room(reports: Sequence[MemoryReport | None], *, largest: int) -> bool:
    """Whether a device has room for another job.

    Args:
        reports: The last report of each job that runs there, the newest last.
        largest: The highest peak of any job of the sweep so far; the next may be like it.
    """
    known = [report for report in reports if report is not None]
    if len(known) < len(reports) or any(report.steps < SETTLED_STEPS for report in known):
        return False  # it is not yet known what those that run will take
    if not known:
        return True
    newest = known[-1]
    # Those that hold less than their peak now, while they evaluate say, will want it back.
    free = newest.free - sum(report.peak - report.held for report in known)
    needed = max(largest, *(report.peak for report in known)) + CONTEXT_BYTES
    return free - needed >= MARGIN * newest.total


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU or of the machine."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
