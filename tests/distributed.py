"""Run a test's function on several ranks: one process each, one thread each, no ports."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT_S = 60

# one server imports torch and timm, every rank is a fork of it
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["torch", "timm", "torch.distributed", "gmoe_ltdr"])


class RankError(AssertionError):
    """What went wrong on a rank, with its traceback."""


def run_ranks(
    function: Callable,
    num_ranks: int,
    *args: Any,
    limit_s: float = LIMIT_S,
    backend: str = "gloo",
    outlast_deaths: bool = False,
) -> list:
    """Call `function(*args)` on every rank of a process group.

    Args:
        function: Defined at the top level of a module.
        num_ranks: Processes.
        *args: Picklable.
        limit_s: All ranks are stopped after so many seconds.
        backend: "nccl" on a machine with a GPU for each rank.
        outlast_deaths: Let the others finish before a death is raised.

    Returns:
        What the ranks returned, by rank.

    Raises:
        RankError: A rank raised, died or did not finish; the others are stopped.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, ranks = [], []
        for rank in range(num_ranks):
            receiver, sender = _processes.Pipe(duplex=False)
            work = pickle.dumps((function, args))
            arguments = (
                rank,
                num_ranks,
                str(Path(folder) / "store"),
                sender,
                work,
                limit_s,
                backend,
            )
            process = _processes.Process(target=_run_rank, args=arguments, daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            ranks.append(process)
        try:
            return _collect(pipes, ranks, limit_s, outlast_deaths)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()


def _collect(pipes: list[Connection], ranks: list, limit_s: float, outlast_deaths: bool) -> list:
    deadline = time.monotonic() + limit_s
    results: dict[int, Any] = {}
    deaths = []
    while len(results) < len(pipes):
        missing = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(missing, timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            late = [rank for rank in range(len(pipes)) if rank not in results]
            raise RankError(f"ranks {late} did not finish within {limit_s:.0f} s")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                failed, content = pickle.loads(pipe.recv_bytes())
            except EOFError:
                ranks[rank].join()
                deaths.append(f"rank {rank} died with code {ranks[rank].exitcode}")
                if not outlast_deaths:
                    raise RankError(deaths[0]) from None
                failed, content = False, None
            if failed:
                raise RankError(f"rank {rank} of {len(pipes)}:\n{content}")
            results[rank] = content
    if deaths:
        raise RankError("; ".join(deaths))
    return [results[rank] for rank in range(len(pipes))]


def _run_rank(
    rank: int,
    num_ranks: int,
    store: str,
    pipe: Connection,
    work: bytes,
    limit_s: float,
    backend: str,
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            backend,
            store=dist.FileStore(store, num_ranks),
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=limit_s),
        )
        function, args = pickle.loads(work)
        # pickled here: a tensor sent as it is would live in memory that ends with this process
        answer = pickle.dumps((False, function(*args)))
    except BaseException:
        answer = pickle.dumps((True, traceback.format_exc()))
    pipe.send_bytes(answer)
    pipe.close()
    if dist.is_initialized():
        dist.destroy_process_group()
