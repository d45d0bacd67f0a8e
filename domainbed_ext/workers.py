"""Warm worker processes: several jobs at a time, one after the other in each process.

A worker imports torch once and then runs `train` in-process, its output going to the job's out.txt
and err.txt. The parent hands out jobs one by one, shows progress, and replaces a worker that dies.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from domainbed_ext.atomic_files import CannotWriteError
from domainbed_ext.display import RunState, SweepProgress
from domainbed_ext.job_process import OUTCOMES
from domainbed_ext.jobs import (
    ERR_FILE,
    OUT_FILE,
    TrainArgs,
    job_label,
    make_folder,
    mark_failed,
    taken_by_others,
)
from domainbed_ext.log_files import LogFile
from domainbed_ext.stop_signals import (
    EXIT_STOPPED,
    Stopped,
    ask_to_stop,
    stop_requested,
    stops_on_signals,
)

REPORT_SECONDS = 0.2
_END_SECONDS = 10.0


def run_jobs(
    jobs: Sequence[TrainArgs], *, num_workers: int, threads: int, devices: Sequence[str] = ()
) -> None:
    """Runs all jobs. Ctrl-C and `Stopped` make the workers save and leave, to be gone on with.

    Args:
        jobs: What to run, in this order.
        num_workers: How many at once.
        threads: CPU threads of each worker.
        devices: CUDA devices, dealt to the workers in turn.
    """
    waiting = deque(jobs)
    workers: list[_Worker] = []
    with SweepProgress(len(jobs)) as progress:
        try:
            for number in range(min(num_workers, len(jobs))):
                device = devices[number % len(devices)] if devices else None
                workers.append(_Worker(threads=threads, device=device))
            while True:
                for worker in workers:
                    if worker.job is None and (job := next_free(waiting, progress)):
                        worker.start(job, progress)
                busy = {worker.connection: worker for worker in workers if worker.job is not None}
                if not busy:
                    break
                for connection in wait(list(busy)):
                    worker = busy[connection]  # type: ignore[index]
                    if not worker.receive(progress):
                        workers[workers.index(worker)] = worker.replace()
        finally:
            for worker in workers:
                worker.ask_to_stop()
            for worker in workers:
                # whoever sent a signal decides how long to wait: then comes SIGKILL
                worker.join(None if stop_requested() else _END_SECONDS)


def next_free(waiting: deque[TrainArgs], progress: SweepProgress) -> TrainArgs | None:
    """Takes the next job that is still to be run: other launchers may have taken some."""
    while waiting:
        job = waiting.popleft()
        outcome = taken_by_others(Path(job.output_dir))
        if outcome is None:
            return job
        progress.finished(job_label(job), outcome)
    return None


@dataclass
class _Worker:
    threads: int
    device: str | None
    job: TrainArgs | None = None

    def __post_init__(self) -> None:
        # spawn, not fork: CUDA and OpenMP do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.connection, child = context.Pipe()
        self.process = context.Process(
            target=_work, args=(child, self.threads, self.device), name="ltdr-worker"
        )
        self.process.start()
        child.close()

    def start(self, job: TrainArgs, progress: SweepProgress) -> None:
        """Hands a job over."""
        self.job = job
        progress.started(job_label(job))
        try:
            self.connection.send(job)
        except OSError:
            pass  # the worker is dead; `receive` finds out and says so

    def receive(self, progress: SweepProgress) -> bool:
        """Takes one message; False when the worker is gone."""
        assert self.job is not None
        label = job_label(self.job)
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            _mark_died(self.job, self.process.exitcode)
            progress.finished(
                label, f"failed, its worker died ({_exit_words(self.process.exitcode)})"
            )
            self.job = None
            return False
        if isinstance(message, RunState):
            progress.report(label, message)
        else:
            progress.finished(label, OUTCOMES.get(message, f"failed ({message})"))
            self.job = None
        return message != EXIT_STOPPED

    def replace(self) -> _Worker:
        """A fresh worker with the same settings."""
        self.connection.close()
        return _Worker(threads=self.threads, device=self.device)

    def ask_to_stop(self) -> None:
        """Makes the process end: after its step and a checkpoint if it is at work."""
        if self.job is not None and self.process.pid is not None:
            ask_to_stop(self.process.pid)
        self.connection.close()

    def join(self, seconds: float | None) -> None:
        """Waits so long for the process to end; then ends it."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _mark_died(job: TrainArgs, exitcode: int | None) -> None:
    folder = Path(job.output_dir)
    message = (
        f"the worker process died ({_exit_words(exitcode)}); "
        "the job goes on when it is launched again"
    )
    try:
        make_folder(folder)
        with open(folder / ERR_FILE, "a", encoding="utf-8") as file:
            file.write(f"error: {message}\n")
        mark_failed(folder, reason="died", message=message)
    except (OSError, ValueError):
        pass  # the progress line has said it; a full disk must not end the sweep


def _exit_words(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"exit status {exitcode}"
    name = signal.Signals(-exitcode).name if -exitcode in list(signal.Signals) else str(-exitcode)
    return f"{name}, out of memory?" if name == "SIGKILL" else name


def _work(connection: Connection, threads: int, device: str | None) -> None:
    """A worker's life: take a job, run it, say how it ended."""
    # Ctrl-C reaches every process of the terminal; the parent decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # OpenMP and MKL read these when torch is first imported; so nothing above may import it.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    import torch

    torch.set_num_threads(threads)
    reporter = _Reporter(connection)
    with contextlib.suppress(EOFError, OSError, Stopped), stops_on_signals():
        while not stop_requested():
            # fails when the parent has closed its end, or is gone
            connection.send(_run_into_files(connection.recv(), reporter))
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()


class _Reporter:
    """Sends a run's progress to the parent, a few times a second."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sent = 0.0

    def __call__(self, state: RunState) -> None:
        now = time.monotonic()
        if now - self._sent < REPORT_SECONDS and state.phase == "training":
            return
        self._sent = now
        try:
            self._connection.send(state)
        except OSError:
            ask_to_stop(os.getpid())  # the parent is gone: nobody waits for the rest now


def _run_into_files(args: TrainArgs, reporter: Any) -> int:
    """Runs a job with file descriptors 1 and 2 redirected, which catches native code's output."""
    from domainbed_ext.scripts.train import run_job

    folder = Path(args.output_dir)
    try:
        make_folder(folder)
        out, err = LogFile(folder / OUT_FILE), LogFile(folder / ERR_FILE)
    except (ValueError, CannotWriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    saved = os.dup(1), os.dup(2)
    with out, err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        stdout, stderr = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = LogFile(1), LogFile(2)
        faulthandler.enable(sys.stderr)
        try:
            return run_job(args, progress=reporter)
        finally:
            sys.stdout, sys.stderr = stdout, stderr
            for number, descriptor in zip((1, 2), saved, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
