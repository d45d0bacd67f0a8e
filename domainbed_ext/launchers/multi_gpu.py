"""Runs jobs on the GPUs of this machine, several on each where memory allows."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from domainbed_ext.errors import UsageError
from domainbed_ext.launchers import devices
from domainbed_ext.launchers.base import Launcher, jobs_of
from domainbed_ext.train_args import TrainArgs

AUTO = "auto"
_THREADS_FOR = 4  # jobs on each GPU, among which cores are divided before their number is known


@dataclass(frozen=True, kw_only=True)
class MultiGpuLauncher(Launcher):
    """Warm worker processes on every GPU.

    With "auto" each GPU begins with one job; once it has taken a few steps, after its first
    evaluation, others join as long as what is free covers the largest job seen so far and a margin.
    A job that runs out of memory beside others is put back and goes on later with fewer of them.

    Attributes:
        jobs_per_gpu: A number, or "auto".
    """

    runs_here = True

    device: str = "auto"
    jobs_per_gpu: str = AUTO

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group(
            "--command_launcher multi_gpu: several jobs on each GPU of this machine"
        )
        group.add_argument(
            "--jobs_per_gpu",
            default=cls.jobs_per_gpu,
            metavar="N",
            help="jobs on each GPU at once; auto: as many as are measured to fit (default: auto)",
        )

    def check(self) -> None:
        super().check()
        if self.jobs_per_gpu != AUTO and not _is_count(self.jobs_per_gpu):
            raise UsageError(
                f"--jobs_per_gpu {self.jobs_per_gpu} is impossible; choose 1 or more, or auto"
            )
        if self.gpus_per_job > 1:
            raise UsageError(
                f"--gpus_per_job {self.gpus_per_job}: multi_gpu puts several jobs on one GPU; use "
                "--command_launcher local for jobs that take several"
            )
        if self.jobs is not None:
            raise UsageError(
                "--jobs is not for multi_gpu; say with --jobs_per_gpu how many run on each GPU"
            )
        if self.device == "cpu" or not devices.cuda_devices():
            raise UsageError(
                "--command_launcher multi_gpu finds no CUDA device on this machine (see `ltdr "
                "doctor`); use --command_launcher local"
                if self.device != "cpu"
                else "--device cpu: multi_gpu needs GPUs; use --command_launcher local"
            )

    def num_at_once(self, jobs: Sequence[TrainArgs]) -> int | None:
        if self.jobs_per_gpu == AUTO:
            return None
        return int(self.jobs_per_gpu) * len(devices.cuda_devices())

    def launch(self, commands: Sequence[Sequence[str]]) -> list[Path]:
        from domainbed_ext.seats import Seats
        from domainbed_ext.worker_pool import run_jobs

        cuda = devices.cuda_devices()
        number = None if self.jobs_per_gpu == AUTO else int(self.jobs_per_gpu)
        threads = max(1, devices.num_cores() // (len(cuda) * (number or _THREADS_FOR)))
        return run_jobs(
            jobs_of(commands),
            seats=Seats({device: number for device in cuda}),
            threads=threads,
        )


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) >= 1
