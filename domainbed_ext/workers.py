"""Warm worker processes: several jobs, one after the other, in a process that imports torch once.

A worker runs `train` in-process, its output going to the job's out.txt and err.txt. It tells its
parent how far it is and what memory it takes. `worker_pool` hands out the jobs.
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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from domainbed_ext.atomic_files import CannotWriteError
from domainbed_ext.display import RunState
from domainbed_ext.job_files import ERR_FILE, OUT_FILE, make_folder, mark_failed
from domainbed_ext.log_files import LogFile
from domainbed_ext.memory import MemoryReport, measure_memory
from domainbed_ext.stop_signals import Stopped, ask_to_stop, stop_requested, stops_on_signals
from domainbed_ext.train_args import TrainArgs

REPORT_SECONDS = 0.2
MEASURE_SECONDS = 1.0


class WorkerDiedError(RuntimeError):
    """A worker's process has ended with a job unfinished; says how."""


class Worker:
    """The parent's side of a worker process.

    Attributes:
        device: Its value of CUDA_VISIBLE_DEVICES; None for the parent's.
        connection: Readable when there is something to `receive`.
        num_jobs: How many it was handed so far.
    """

    def __init__(self, *, threads: int, device: str | None) -> None:
        self.device = device
        self.num_jobs = 0
        self._job: TrainArgs | None = None
        # spawn, not fork: CUDA and OpenMP do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.connection, child = context.Pipe()
        self._process = context.Process(
            target=_work, args=(child, threads, device), name="ltdr-worker"
        )
        self._process.start()
        child.close()

    def start(self, job: TrainArgs) -> None:
        """Hands a job over."""
        self._job = job
        self.num_jobs += 1
        with contextlib.suppress(OSError):  # it is dead; `receive` finds out and says so
            self.connection.send(job)

    def receive(self) -> RunState | MemoryReport | int:
        """Takes one message; a number is the job's exit status.

        Raises:
            WorkerDiedError: The process is gone; the job is marked.
        """
        assert self._job is not None
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            self.connection.close()
            words = _exit_words(self._process.exitcode)
            _mark_died(self._job, words)
            raise WorkerDiedError(words) from None
        if isinstance(message, int):
            self._job = None
        return message

    def retire(self) -> None:
        """Lets a worker without a job end; it may take its time."""
        self.connection.close()

    def ask_to_stop(self) -> None:
        """Makes the process end: after its step and a checkpoint if it is at work."""
        if self._job is not None and self._process.pid is not None:
            ask_to_stop(self._process.pid)
        self.connection.close()

    def join(self, seconds: float | None) -> None:
        """Waits so long for the process to end; then ends it."""
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _mark_died(job: TrainArgs, how: str) -> None:
    folder = Path(job.output_dir)
    message = f"the worker process died ({how}); the job goes on when it is launched again"
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
            job = connection.recv()
            reporter.begin()
            connection.send(_run_into_files(job, reporter))
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()


class _Reporter:
    """Sends a run's progress to the parent, a few times a second, and the memory it takes."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sent = self._measured = 0.0
        self._phase = ""
        self._steps = 0

    def begin(self) -> None:
        """Another job."""
        self._steps = 0

    def __call__(self, state: RunState) -> None:
        now = time.monotonic()
        self._steps += state.phase == "training"
        if now - self._measured >= MEASURE_SECONDS:
            self._measured = now
            report = measure_memory(self._steps)
            if report is not None:
                self._send(report)
        if now - self._sent >= REPORT_SECONDS or state.phase != self._phase:
            self._sent, self._phase = now, state.phase
            self._send(state)

    def _send(self, message: RunState | MemoryReport) -> None:
        try:
            self._connection.send(message)
        except OSError:
            ask_to_stop(os.getpid())  # the parent is gone: nobody waits for the rest now


def _run_into_files(args: TrainArgs, reporter: Any) -> int:
    """Runs a job with file descriptors 1 and 2 redirected, which catches native code's output."""
    from domainbed_ext.training_job import run_job

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
