"""Launchers: how many workers, on which devices."""

from __future__ import annotations

import sys
from dataclasses import MISSING, fields

import pytest

from domainbed_ext import worker_pool, workers
from domainbed_ext.errors import UsageError
from domainbed_ext.launchers import REGISTRY, TRAIN_MODULE, devices
from domainbed_ext.launchers.local import LocalLauncher, default_workers
from domainbed_ext.launchers.multi_gpu import MultiGpuLauncher
from domainbed_ext.sweep_flags import build_parser
from domainbed_ext.train_args import TrainArgs


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
    ("asked", "cuda", "on_each", "threads"),
    [
        (None, [], {None: 3}, 2),
        (2, [], {None: 2}, 3),
        (1, [], {None: 1}, 7),
        (9, [], {None: 3}, 2),
        (3, ["0"], {"0": 3}, 2),
        (3, ["0", "5"], {"0": 2, "5": 1}, 2),
    ],
)
def test_cores_are_shared_among_workers(monkeypatch, asked, cuda, on_each, threads):
    seen = {}
    monkeypatch.setattr(devices, "num_cores", lambda: 7)
    monkeypatch.setattr(devices, "cuda_devices", lambda: cuda)
    monkeypatch.setattr(worker_pool, "run_jobs", lambda jobs, **rest: seen.update(rest, jobs=jobs))
    args = [TrainArgs(dataset="Debug28", seed=seed) for seed in range(3)]
    commands = [[sys.executable, "-m", TRAIN_MODULE, *job.command_line()] for job in args]
    LocalLauncher(jobs=asked).launch(commands)
    assert seen["jobs"] == args
    assert (seen["seats"]._numbers, seen["threads"]) == (on_each, threads)


def test_the_cpu_needs_no_look_at_devices(monkeypatch):
    monkeypatch.setattr(devices, "cuda_devices", lambda: pytest.fail("looked for devices"))
    monkeypatch.setattr(worker_pool, "run_jobs", lambda jobs, **rest: None)
    command = TrainArgs(dataset="Debug28", device="cpu").command_line()
    REGISTRY["local"]().launch([[sys.executable, "-m", TRAIN_MODULE, *command]])


@pytest.mark.parametrize(("asked", "on_each"), [("auto", None), ("3", 3)])
def test_multi_gpu_fills_every_device(monkeypatch, asked, on_each):
    seen = {}
    monkeypatch.setattr(devices, "num_cores", lambda: 16)
    monkeypatch.setattr(devices, "cuda_devices", lambda: ["0", "1"])
    monkeypatch.setattr(worker_pool, "run_jobs", lambda jobs, **rest: seen.update(rest))
    launcher = MultiGpuLauncher(jobs_per_gpu=asked)
    launcher.check()
    launcher.launch([[sys.executable, "-m", TRAIN_MODULE]])
    assert seen["seats"]._numbers == {"0": on_each, "1": on_each}
    assert seen["threads"] == 2


@pytest.mark.parametrize(
    ("settings", "cuda", "said"),
    [
        ({}, [], "finds no CUDA device on this machine"),
        ({"device": "cpu"}, ["0"], "multi_gpu needs GPUs"),
        ({"jobs_per_gpu": "0"}, ["0"], "--jobs_per_gpu 0 is impossible"),
        ({"jobs_per_gpu": "many"}, ["0"], "--jobs_per_gpu many is impossible"),
        ({"gpus_per_job": 2}, ["0"], "use --command_launcher local"),
        ({"jobs": 3}, ["0"], "--jobs is not for multi_gpu"),
    ],
)
def test_multi_gpu_refuses_what_cannot_be(monkeypatch, settings, cuda, said):
    monkeypatch.setattr(devices, "cuda_devices", lambda: cuda)
    with pytest.raises(UsageError, match=said):
        MultiGpuLauncher(**settings).check()


def test_launchers_take_their_flags_from_the_command_line():
    flags = "--command_launcher slurm --slurm_partition gpu --slurm_option a=b --slurm_option c="
    args = build_parser().parse_args([*flags.split(), "--output_dir", "here", "--jobs", "5"])
    launcher = REGISTRY["slurm"].from_args(args)
    assert (launcher.slurm_partition, launcher.output_dir, launcher.jobs) == ("gpu", "here", 5)
    assert launcher.slurm_option == ["a=b", "c="]
    defaults = build_parser().parse_args([])
    for kind in REGISTRY.values():  # a flag's default is that of the field
        launcher = kind.from_args(defaults)
        for item in fields(kind):
            if item.default is not MISSING:
                assert getattr(launcher, item.name) in (item.default, [*()]), item.name


def test_exit_statuses_in_words():
    assert workers._exit_words(1) == "exit status 1"
    assert workers._exit_words(-11) == "SIGSEGV"
    assert workers._exit_words(-9) == "SIGKILL, out of memory?"
