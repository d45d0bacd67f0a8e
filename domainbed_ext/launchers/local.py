"""Runs jobs on this machine, one per GPU or one per core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from domainbed_ext.launchers import devices
from domainbed_ext.launchers.base import Launcher, jobs_of
from domainbed_ext.train_args import TrainArgs


@dataclass(frozen=True, kw_only=True)
class LocalLauncher(Launcher):
    """Warm worker processes, each of which imports torch once; or torchrun, for jobs that take
    several GPUs."""

    runs_here = True

    def num_at_once(self, jobs: Sequence[TrainArgs]) -> int:
        cuda = devices.cuda_devices() if any(job.device != "cpu" for job in jobs) else []
        if self.gpus_per_job > 1:
            return self.jobs or max(1, len(cuda) // self.gpus_per_job)
        number = self.jobs or default_workers([job.dataset for job in jobs], num_devices=len(cuda))
        return max(1, min(number, len(jobs)))

    def launch(self, commands: Sequence[Sequence[str]]) -> list[Path]:
        from domainbed_ext.seats import Seats
        from domainbed_ext.torchrun import run_commands
        from domainbed_ext.worker_pool import run_jobs

        jobs = jobs_of(commands)
        cores = devices.num_cores()
        cuda = devices.cuda_devices() if any(job.device != "cpu" for job in jobs) else []
        if self.gpus_per_job > 1:
            return run_commands(
                commands, jobs, num_at_once=self.jobs, num_cores=cores, devices=cuda
            )
        num_workers = self.num_at_once(jobs)
        threads = max(1, cores // num_workers)
        return run_jobs(jobs, seats=Seats.dealt(num_workers, cuda), threads=threads)


def default_workers(datasets: Sequence[str], *, num_devices: int) -> int:
    """How many jobs at once: one per CUDA device; without any, one per core for small models."""
    from domainbed_ext.hparams import SMALL_DATASET_DEFAULTS

    if num_devices:
        return num_devices
    small = all(name in SMALL_DATASET_DEFAULTS and name != "Debug224" for name in datasets)
    return devices.num_cores() if small else 1
