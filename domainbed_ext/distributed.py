"""One run on several processes, started by torchrun: which rank this is, and what ranks agree on.

Each rank takes its share of every domain's batch and of every evaluation. Rank 0 alone writes
records, checkpoints and output. A rank that fails writes its reason into the job's folder before it
goes, and torchrun ends the others.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from domainbed_ext.display import Tee
from domainbed_ext.errors import UsageError
from domainbed_ext.job_files import ERR_FILE, make_folder
from domainbed_ext.log_files import LogFile

T = TypeVar("T")

_TORCHRUN = "torchrun --standalone --nproc_per_node 2 -m domainbed_ext.scripts.train"


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is. The default is a run of one process."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, num_items: int) -> slice:
        """This rank's part of so many items; parts differ by one at most."""
        first = self.rank * num_items // self.size
        return slice(first, (self.rank + 1) * num_items // self.size)


class OtherRankError(RuntimeError):
    """Another rank failed, and has said why."""


class LostRankError(OtherRankError):
    """Another rank is gone without having said why."""

    def __init__(self, rank: int) -> None:
        super().__init__(
            f"rank {rank} lost its connection to another rank, which died (killed, or out of "
            "memory?); the same command goes on from the last checkpoint"
        )


# What gloo and NCCL say when the process at the other end is gone.
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
)


def is_lost_connection(error: Exception) -> bool:
    """Whether an error of a collective call means that another rank is gone."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST)


def asked_rank() -> int:
    """The rank that torchrun gives this process, before it has joined the others."""
    return int(os.environ.get("RANK", "0"))


def current_ranks() -> Ranks:
    """The ranks of this run; one where no process group was joined."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return Ranks()
    return Ranks(distributed.get_rank(), distributed.get_world_size())


@contextlib.contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """Joins the processes that torchrun started: gloo on CPUs, NCCL on GPUs.

    Args:
        device: "auto", "cpu" or "cuda"; on CUDA each rank of a machine gets a device of its own.
    """
    missing = [
        name
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
        if name not in os.environ
    ]
    if missing:
        raise UsageError(
            f"--distributed needs torchrun, which sets {', '.join(missing)}; start the run with: "
            f"{_TORCHRUN} --distributed ..."
        )
    import torch
    import torch.distributed as dist

    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        local_rank, num_devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= num_devices:
            raise UsageError(
                f"--distributed: {local_rank + 1} ranks or more for {num_devices} CUDA devices; "
                f"pass --nproc_per_node {num_devices} to torchrun, or --device cpu"
            )
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    yield Ranks(dist.get_rank(), dist.get_world_size())
    # Not after an error: others may still wait for this rank, and its end is what stops them.
    dist.destroy_process_group()


@contextlib.contextmanager
def errors_only(folder: Path) -> Iterator[None]:
    """For ranks after the first: nothing on stdout, and errors also in the job's err.txt."""
    make_folder(folder)
    stdout, stderr = sys.stdout, sys.stderr
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        LogFile(folder / ERR_FILE) as err,
    ):
        sys.stdout, sys.stderr = nowhere, Tee(stderr, err)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = stdout, stderr


def on_first_rank(function: Callable[[], T]) -> T:
    """What rank 0 gets from `function`, on every rank; or its error, which the others only hear of.

    Raises:
        OtherRankError: Rank 0 failed; on the other ranks.
    """
    ranks = current_ranks()
    if ranks.size == 1:
        return function()
    import torch.distributed as dist

    error: Exception | None = None
    content: list[Any] = [None, None]
    if ranks.is_first:
        try:
            content[0] = function()
        except Exception as raised:
            error = raised
            content[1] = f"{type(raised).__name__}: {raised}"
    dist.broadcast_object_list(content, src=0)
    if error is not None:
        raise error
    if content[1] is not None:
        raise OtherRankError(f"rank 0: {content[1]}")
    return content[0]


def first_rank_first(function: Callable[[], T]) -> T:
    """Each rank's own result, after rank 0 has its: for what fills a cache on the disk."""
    made: list[T] = []
    on_first_rank(lambda: made.append(function()))
    return made[0] if made else function()


def first_message(message: str | None) -> str | None:
    """The first message that any rank has, on every rank."""
    return next((text for text in gather(message) if text is not None), None)


def gather(value: T) -> list[T]:
    """Every rank's value, by rank, on every rank."""
    ranks = current_ranks()
    if ranks.size == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * ranks.size
    dist.all_gather_object(values, value)
    return values


def on_any_rank(*flags: bool) -> tuple[bool, ...]:
    """Each flag's "or" over all ranks, on every rank."""
    if current_ranks().size == 1:
        return flags
    import torch
    import torch.distributed as dist

    values = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return tuple(values.bool().tolist())


def wait_for_ranks() -> None:
    """Returns when all ranks are here: when one leaves early, torchrun ends the others."""
    on_any_rank(False)


def mean_over_ranks(
    values: Mapping[str, float], num_images: int, *, device: str
) -> dict[str, float]:
    """Means of numbers that each rank has computed on so many images."""
    import torch
    import torch.distributed as dist

    sums = torch.tensor([*values.values(), 1.0], dtype=torch.float64, device=device) * num_images
    dist.all_reduce(sums)
    means = (sums[:-1] / sums[-1]).tolist()
    return dict(zip(values, means, strict=True))
