"""Hands the jobs of a sweep to warm worker processes, one by one, and shows how far they are."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

from domainbed_ext.display import RunState, SweepProgress
from domainbed_ext.exit_status import EXIT_BUSY, EXIT_OK, EXIT_STOPPED
from domainbed_ext.job_files import FAILED_FILE, read_failure
from domainbed_ext.job_process import OUTCOMES
from domainbed_ext.jobs import IN_USE, taken_by_others
from domainbed_ext.memory import MemoryReport
from domainbed_ext.seats import Seated, Seats
from domainbed_ext.stop_signals import stop_requested
from domainbed_ext.train_args import TrainArgs, job_label
from domainbed_ext.workers import Worker, WorkerDiedError

_END_SECONDS = 10.0
# A process's heap gets fragmented, by some MB a job; a new one costs seconds.
JOBS_PER_WORKER = 50


@dataclass(frozen=True)
class _Waiting:
    job: TrainArgs
    limit: int | None = None  # how many jobs may share a device with it


def run_jobs(jobs: Sequence[TrainArgs], *, seats: Seats, threads: int) -> list[Path]:
    """Runs all jobs. Ctrl-C and `Stopped` make the workers save and leave, to be gone on with.

    Args:
        jobs: What to run, in this order.
        seats: How many at once, and where.
        threads: CPU threads of each worker.

    Returns:
        The folders of jobs that were left to other processes, which were at work on them.
    """
    with SweepProgress(len(jobs)) as progress:
        pool = _Pool(jobs, seats, threads, progress)
        try:
            pool.run()
        finally:
            pool.close()
    return pool.in_use


class _Pool:
    def __init__(
        self, jobs: Sequence[TrainArgs], seats: Seats, threads: int, progress: SweepProgress
    ) -> None:
        self.waiting = deque(_Waiting(job) for job in jobs)
        self.seats = seats
        self.threads = threads
        self.progress = progress
        self.idle: list[Worker] = []
        self.leaving: list[Worker] = []
        self.in_use: list[Path] = []
        self.busy: dict[Worker, tuple[_Waiting, Seated]] = {}

    def run(self) -> None:
        while True:
            self._start_jobs()
            if not self.busy:
                return
            by_connection = {worker.connection: worker for worker in self.busy}
            for connection in wait(list(by_connection)):
                self._receive(by_connection[connection])  # type: ignore[index]

    def close(self) -> None:
        """Ends all workers, those at work after their step and a checkpoint."""
        workers = [*self.busy, *self.idle]
        for worker in workers:
            worker.ask_to_stop()
        for worker in [*workers, *self.leaving]:
            # whoever sent a signal decides how long to wait: then comes SIGKILL
            worker.join(None if stop_requested() else _END_SECONDS)

    def _start_jobs(self) -> None:
        while self.waiting:
            item = self.waiting[0]
            seated = [seat for _, seat in self.busy.values()]
            if not self.seats.are_free(seated, item.limit):
                break
            folder = Path(item.job.output_dir)
            taken = taken_by_others(folder)
            if taken is not None:
                self.waiting.popleft()
                self.progress.finished(job_label(item.job), taken)
                if taken == IN_USE:
                    self.in_use.append(folder)
                continue
            seat = self.seats.take(seated, item.limit)
            self.waiting.popleft()
            worker = self._worker_on(seat)
            self.busy[worker] = item, seat
            self.progress.started(job_label(item.job))
            worker.start(item.job)
        while self.idle:  # there is nothing for them to do, and they hold memory
            self._let_go(self.idle.pop())

    def _worker_on(self, seat: Seated) -> Worker:
        for worker in self.idle:
            if worker.device == seat.device:
                self.idle.remove(worker)
                return worker
        return Worker(threads=self.threads, device=seat.device)

    def _receive(self, worker: Worker) -> None:
        item, seat = self.busy[worker]
        label = job_label(item.job)
        try:
            message = worker.receive()
        except WorkerDiedError as error:
            del self.busy[worker]
            self.progress.finished(label, f"failed, its worker died ({error})")
            return
        if isinstance(message, RunState):
            self.progress.report(label, message)
        elif isinstance(message, MemoryReport):
            self.seats.measured(seat, message)
        else:
            del self.busy[worker]
            self._ended(item, seat, message)
            # one that was asked to stop leaves, and one that ran out of memory had better
            if message in (EXIT_OK, EXIT_BUSY) and worker.num_jobs < JOBS_PER_WORKER:
                self.idle.append(worker)
            else:
                self._let_go(worker)

    def _let_go(self, worker: Worker) -> None:
        worker.retire()
        self.leaving.append(worker)

    def _ended(self, item: _Waiting, seat: Seated, status: int) -> None:
        label, folder = job_label(item.job), Path(item.job.output_dir)
        if status != EXIT_STOPPED and (read_failure(folder) or {}).get("reason") == "memory":
            fewer = self.seats.ran_out(seat)
            if fewer is not None:
                (folder / FAILED_FILE).unlink(missing_ok=True)
                self.waiting.append(_Waiting(item.job, fewer))
                self.progress.put_back(
                    label, f"out of memory beside {seat.most - 1} others, again later"
                )
                return
        outcome = OUTCOMES.get(status, f"failed ({status})")
        self.progress.finished(label, outcome)
        if outcome == IN_USE:
            self.in_use.append(folder)
