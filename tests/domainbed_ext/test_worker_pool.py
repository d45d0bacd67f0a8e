"""Handing out jobs, with workers that are no processes."""

from __future__ import annotations

from itertools import pairwise
from multiprocessing import Pipe
from pathlib import Path

import pytest

from domainbed_ext import worker_pool
from domainbed_ext.display import RunState
from domainbed_ext.job_files import mark_done, mark_failed
from domainbed_ext.jobs import job_state
from domainbed_ext.memory import MemoryReport
from domainbed_ext.seats import Seats
from domainbed_ext.train_args import TrainArgs
from domainbed_ext.worker_pool import run_jobs
from domainbed_ext.workers import WorkerDiedError

TOTAL = 10 * 10**9


class FakeWorker:
    """Runs a job when the pool comes to listen to it. A job's seed is the memory it takes, in GB;
    more than 9 at once on a device is too much for the one that comes last."""

    running: dict = {}  # noqa: RUF012  device -> jobs at work, in the order in which they began
    made = 0
    together: list = []  # noqa: RUF012  (folder, jobs on the device) of each start

    def __init__(self, *, threads, device):
        FakeWorker.made += 1
        self.device = device
        self.num_jobs = 0
        self.connection, self._other = Pipe()
        self.job = None
        self.messages = []

    def start(self, job):
        self.job = job
        self.num_jobs += 1
        here = self.running.setdefault(self.device, [])
        here.append(job)
        self.together.append((Path(job.output_dir).name, len(here)))
        Path(job.output_dir).mkdir(parents=True, exist_ok=True)
        if sum(item.seed for item in here) > 9:
            mark_failed(Path(job.output_dir), reason="memory", message="out of memory")
            self.messages = [1]
        else:
            size = job.seed * 10**9
            used = sum(item.seed for item in here) * 10**9
            report = MemoryReport(TOTAL, TOTAL - used, size, size, steps=5)
            self.messages = [RunState(5, 9), report, RunState(9, 9), 0]
        for _ in self.messages:
            self._other.send(None)

    def receive(self):
        self.connection.recv()
        message = self.messages.pop(0)
        if isinstance(message, int):
            self.running[self.device].remove(self.job)
            if message == 0:
                mark_done(Path(self.job.output_dir))
        return message

    def retire(self):
        self.connection.close()

    def ask_to_stop(self):
        self.connection.close()

    def join(self, seconds):
        pass


@pytest.fixture(autouse=True)
def workers(monkeypatch):
    monkeypatch.setattr(worker_pool, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "running", {})
    monkeypatch.setattr(FakeWorker, "together", [])
    monkeypatch.setattr(FakeWorker, "made", 0)
    return FakeWorker


def jobs(tmp_path, sizes):
    return [
        TrainArgs(seed=size, hparams_seed=number, output_dir=tmp_path / str(number))
        for number, size in enumerate(sizes)
    ]


def test_all_jobs_are_run_by_few_workers(tmp_path, workers, capsys):
    assert run_jobs(jobs(tmp_path, [1] * 6), seats=Seats({None: 2}), threads=1) == []
    assert [job_state(folder).value for folder in sorted(tmp_path.iterdir())] == ["Done"] * 6
    assert workers.made == 2
    assert max(number for _, number in workers.together) == 2
    assert capsys.readouterr().err.count("] done: ") == 6


def test_a_worker_is_replaced_before_its_heap_grows_large(tmp_path, workers, monkeypatch):
    monkeypatch.setattr(worker_pool, "JOBS_PER_WORKER", 2)
    run_jobs(jobs(tmp_path, [1] * 5), seats=Seats({None: 1}), threads=1)
    assert [job_state(folder).value for folder in sorted(tmp_path.iterdir())] == ["Done"] * 5
    assert workers.made == 3
    assert max(number for _, number in workers.together) == 1


def test_a_job_without_memory_comes_back_with_fewer_neighbours(tmp_path, workers, capsys):
    # 4 + 4 fit, 4 + 4 + 4 do not; 6 fits beside none of them.
    run_jobs(jobs(tmp_path, [4, 4, 4, 6, 1]), seats=Seats({"0": 3}), threads=1)
    assert [job_state(folder).value for folder in sorted(tmp_path.iterdir())] == ["Done"] * 5
    tries = [number for name, number in workers.together if name == "2"]
    assert tries[0] == 3
    assert all(later < earlier for earlier, later in pairwise(tries))
    assert "out of memory beside 2 others, again later: " in capsys.readouterr().err


def test_a_job_that_is_too_large_by_itself_fails(tmp_path, workers):
    run_jobs(jobs(tmp_path, [20, 1]), seats=Seats({"0": 2}), threads=1)
    assert [job_state(tmp_path / name).value for name in "01"] == ["Failed", "Done"]
    # at the latest when it was alone
    assert [number for name, number in workers.together if name == "0"][-1] == 1


def test_a_measured_device_is_filled_without_running_out(tmp_path, workers):
    run_jobs(jobs(tmp_path, [2] * 8), seats=Seats({"0": None}), threads=1)
    assert [job_state(folder).value for folder in sorted(tmp_path.iterdir())] == ["Done"] * 8
    # 10 GB, of which 1 stays free; a job takes 2 and a context of 0.7: two fit surely, four never.
    assert max(number for _, number in workers.together) in (2, 3)


def test_what_others_did_is_left_alone_and_what_they_do_is_told(tmp_path, monkeypatch, capsys):
    mine = jobs(tmp_path, [1] * 4)
    folders = [Path(job.output_dir) for job in mine]
    for folder in folders[:3]:
        folder.mkdir()
    mark_done(folders[0])
    mark_failed(folders[1], reason="error", message="broken")
    monkeypatch.setattr("domainbed_ext.jobs.is_locked", lambda folder: folder == folders[2])
    assert run_jobs(mine, seats=Seats({None: 1}), threads=1) == [folders[2]]
    said = capsys.readouterr().err
    assert "] done by another process: " in said
    assert "] failed in another process: " in said
    assert "] in use by another process: " in said
    assert job_state(folders[3]).value == "Done"


def test_a_worker_that_died_costs_its_job_only(tmp_path, monkeypatch, capsys):
    real = FakeWorker.receive

    def receive(self):
        if self.job.hparams_seed == 0:
            self.running[self.device].remove(self.job)
            raise WorkerDiedError("SIGKILL, out of memory?")
        return real(self)

    monkeypatch.setattr(FakeWorker, "receive", receive)
    run_jobs(jobs(tmp_path, [1, 1]), seats=Seats({None: 1}), threads=1)
    assert "failed, its worker died (SIGKILL, out of memory?): " in capsys.readouterr().err
    assert job_state(tmp_path / "1").value == "Done"
    assert FakeWorker.made == 2
