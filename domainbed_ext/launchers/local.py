"""Runs jobs on this machine, one per GPU or one per core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from domainbed_ext.launchers import devices
from domainbed_ext.launchers.base import Launcher, jobs_of


@dataclass(frozen=True, kw_only=True)
class LocalLauncher(Launcher):
    """Warm worker processes, each of which imports torch once; or torchrun, for jobs that take
    several GPUs."""

    def launch(self, commands: Sequence[Sequence[str]]) -> None:
        from domainbed_ext.torchrun import run_commands
        from domainbed_ext.workers import run_jobs

        jobs = jobs_of(commands)
        cores = devices.num_cores()
        cuda = devices.cuda_devices() if any(job.device != "cpu" for job in jobs) else []
        if self.gpus_per_job > 1:
            run_commands(commands, jobs, num_at_once=self.jobs, num_cores=cores, devices=cuda)
            return
        num_workers = self.jobs or default_workers(
            [job.dataset for job in jobs], num_devices=len(cuda)
        )
        num_workers = max(1, min(num_workers, len(jobs)))
        threads = max(1, cores // num_workers)
        run_jobs(jobs, num_workers=num_workers, threads=threads, devices=cuda)


def default_workers(datasets: Sequence[str], *, num_devices: int) -> int:
    """How many jobs at once: one per CUDA device; without any, one per core for small models."""
    from domainbed_ext.hparams import SMALL_DATASET_DEFAULTS

    if num_devices:
        return num_devices
    small = all(name in SMALL_DATASET_DEFAULTS and name != "Debug224" for name in datasets)
    return devices.num_cores() if small else 1
