"""Launchers: how many workers, on which devices."""

from __future__ import annotations

import sys

import pytest

from domainbed_ext import workers
from domainbed_ext.jobs import TrainArgs
from domainbed_ext.launchers import REGISTRY, TRAIN_MODULE, devices
from domainbed_ext.launchers.local import LocalLauncher, default_workers


@pytest.mark.parametrize(
    ("datasets", "num_devices", "expected"),
    [
        (["RotatedDigits", "Debug28"], 0, 5),  # small models: one per core
        (["EmojiDG"], 0, 5),
        (["RotatedDigits", "PACS"], 0, 1),  # a large one: all cores to one job
        (["Debug224"], 0, 1),
        (["folder:/images"], 0, 1),
        (["RotatedDigits"], 2, 2),  # one per CUDA device
    ],
)
def test_default_number_of_workers(monkeypatch, datasets, num_devices, expected):
    monkeypatch.setattr(devices, "num_cores", lambda: 5)
    assert default_workers(datasets, num_devices=num_devices) == expected


@pytest.mark.parametrize(
    ("asked", "cuda", "workers_and_threads"),
    [(None, [], (3, 2)), (2, [], (2, 3)), (1, [], (1, 7)), (9, [], (3, 2)), (3, ["0"], (3, 2))],
)
def test_cores_are_shared_among_workers(monkeypatch, asked, cuda, workers_and_threads):
    seen = {}
    monkeypatch.setattr(devices, "num_cores", lambda: 7)
    monkeypatch.setattr(devices, "cuda_devices", lambda: cuda)
    monkeypatch.setattr(workers, "run_jobs", lambda jobs, **rest: seen.update(rest, jobs=jobs))
    args = [TrainArgs(dataset="Debug28", seed=seed) for seed in range(3)]
    commands = [[sys.executable, "-m", TRAIN_MODULE, *job.command_line()] for job in args]
    LocalLauncher(jobs=asked).launch(commands)
    assert seen["jobs"] == args
    assert (seen["num_workers"], seen["threads"]) == workers_and_threads
    assert seen["devices"] == cuda


def test_the_cpu_needs_no_look_at_devices(monkeypatch):
    monkeypatch.setattr(devices, "cuda_devices", lambda: pytest.fail("looked for devices"))
    monkeypatch.setattr(workers, "run_jobs", lambda jobs, **rest: None)
    command = TrainArgs(dataset="Debug28", device="cpu").command_line()
    REGISTRY["local"]().launch([[sys.executable, "-m", TRAIN_MODULE, *command]])


def test_exit_statuses_in_words():
    assert workers._exit_words(1) == "exit status 1"
    assert workers._exit_words(-11) == "SIGSEGV"
    assert workers._exit_words(-9) == "SIGKILL, out of memory?"
