"""Launchers: they take the command lines of jobs and see that they run.

A launcher is a function of a list of argument lists (never shell strings), registered by name in
`REGISTRY`; another package adds its own with `REGISTRY["mine"] = my_launcher`. Each command is
`[python, "-m", "domainbed_ext.scripts.train", *flags]`, or the same under torchrun for a job that
takes several GPUs (`domainbed_ext.torchrun`). What became of a job is told by its folder, not by
the launcher.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

TRAIN_MODULE = "domainbed_ext.scripts.train"


class Launcher(Protocol):
    """Runs commands, and returns when they have ended or were handed over."""

    def __call__(
        self, commands: Sequence[Sequence[str]], *, num_workers: int | None = None
    ) -> None:
        """Takes the commands and how many of them may run at once (None: the launcher decides)."""
        ...


def local_launcher(commands: Sequence[Sequence[str]], *, num_workers: int | None = None) -> None:
    """Runs jobs on this machine in warm worker processes, each of which imports torch once."""
    from domainbed_ext.scripts.train import parse_args
    from domainbed_ext.torchrun import ranks_of, run_commands, train_flags
    from domainbed_ext.workers import run_jobs

    jobs = [parse_args(train_flags(command, TRAIN_MODULE)) for command in commands]
    devices = cuda_devices() if any(job.device != "cpu" for job in jobs) else []
    if commands and ranks_of(commands[0]) > 1:
        run_commands(
            commands, jobs, num_at_once=num_workers, num_cores=num_cores(), devices=devices
        )
        return
    if num_workers is None:
        num_workers = default_workers([job.dataset for job in jobs], num_devices=len(devices))
    num_workers = max(1, min(num_workers, len(jobs)))
    run_jobs(
        jobs, num_workers=num_workers, threads=max(1, num_cores() // num_workers), devices=devices
    )


def dummy_launcher(commands: Sequence[Sequence[str]], *, num_workers: int | None = None) -> None:
    """Runs nothing and prints each command, ready for a shell or a cluster's queue."""
    for command in commands:
        print(f"Dummy launcher: {shlex.join(command)}")


REGISTRY: dict[str, Launcher] = {"local": local_launcher, "dummy": dummy_launcher}


def default_workers(datasets: Sequence[str], *, num_devices: int) -> int:
    """How many jobs at once: one per CUDA device; without any, one per core for small models."""
    from domainbed_ext.hparams import SMALL_DATASET_DEFAULTS

    if num_devices:
        return num_devices
    small = all(name in SMALL_DATASET_DEFAULTS and name != "Debug224" for name in datasets)
    return num_cores() if small else 1


def num_cores() -> int:
    """The cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def cuda_devices() -> list[str]:
    """The CUDA devices, as values of CUDA_VISIBLE_DEVICES; imports torch only with a driver."""
    drivers = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")
    if not any(Path(driver).exists() for driver in drivers):
        return []
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if visible is None else [name for name in visible.split(",") if name.strip()]
    count = torch.cuda.device_count()
    return [str(number) for number in range(count)] if names is None else names[:count]
