"""Hands jobs to a Slurm cluster, through submitit: one array, a task per job."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from domainbed_ext.errors import UsageError
from domainbed_ext.job_process import JobProcess
from domainbed_ext.jobs import IN_USE
from domainbed_ext.launchers.base import Launcher, jobs_of
from domainbed_ext.train_args import TrainArgs

LOG_FOLDER = "slurm"  # in the sweep's folder
# A job that reaches its time limit goes on in the queue that often; preemption does not count.
MAX_TIMEOUTS = 100
DEFAULT_AT_ONCE = 64
MAX_ARRAY = 1000  # tasks of an array, as Slurm is set up unless told otherwise
# Between the warning and the time limit: for a step and a checkpoint.
WARNING_SECONDS = 180
_POLL_SECONDS = 0.5
_PATIENCE_SECONDS = 900
_LOCK_SECONDS, _LOCK_POLL_SECONDS = 300, 20
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")


@dataclass(frozen=True, kw_only=True)
class SlurmLauncher(Launcher):
    """Submits the jobs and returns. A job that is preempted or reaches its time limit writes a
    checkpoint and goes back into the queue.

    Attributes:
        output_dir: Of the sweep; must be seen by all nodes.
        slurm_array_parallelism: How many at once; by default `jobs`, or else 64.
        slurm_time: Of one job, as sbatch takes it.
        slurm_gpus: Of one job; by default `gpus_per_job`, none with --device cpu.
        slurm_option: Other options of sbatch, as "key=value".
        slurm_cluster: "slurm", or "local": submitit's background processes on this machine.
    """

    hands_over = True

    output_dir: str
    device: str = "auto"
    slurm_partition: str | None = None
    slurm_time: str = "12:00:00"
    slurm_gpus: int | None = None
    slurm_cpus: int = 8
    slurm_memory_gb: float = 32.0
    slurm_array_parallelism: int | None = None
    slurm_option: Sequence[str] = ()
    slurm_cluster: str = "slurm"

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group(
            "--command_launcher slurm: a Slurm cluster, one array with a task per job"
        )
        group.add_argument(
            "--slurm_partition", metavar="NAME", help="default: the cluster's default partition"
        )
        group.add_argument(
            "--slurm_time",
            default=cls.slurm_time,
            metavar="TIME",
            help="time limit of a job, as sbatch takes it; one that reaches it goes back into the "
            "queue (default: %(default)s)",
        )
        group.add_argument(
            "--slurm_gpus",
            type=int,
            metavar="N",
            help="GPUs of a job (default: --gpus_per_job, none with --device cpu)",
        )
        group.add_argument(
            "--slurm_cpus",
            type=int,
            default=cls.slurm_cpus,
            metavar="N",
            help="CPU cores of a job (default: %(default)s)",
        )
        group.add_argument(
            "--slurm_memory_gb",
            type=float,
            default=cls.slurm_memory_gb,
            metavar="GB",
            help="memory of a job (default: %(default)s)",
        )
        group.add_argument(
            "--slurm_array_parallelism",
            type=int,
            metavar="N",
            help=f"how many jobs at once (default: --jobs, or else {DEFAULT_AT_ONCE})",
        )
        group.add_argument(
            "--slurm_option",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="any other option of sbatch, such as account=vision or constraint=a100; may be "
            "given several times",
        )
        group.add_argument(
            "--slurm_cluster",
            default=cls.slurm_cluster,
            choices=("slurm", "local"),
            help="local: background processes on this machine, all at once, to try things out",
        )

    def check(self) -> None:
        super().check()
        parse_minutes(self.slurm_time)
        self._options()
        for name, least in (("gpus", 0), ("cpus", 1), ("array_parallelism", 1), ("memory_gb", 0)):
            value = getattr(self, f"slurm_{name}")
            if value is not None and value < least:
                raise UsageError(f"--slurm_{name} {value} is too small; choose {least} or more")
        if self.device != "cpu" and self._num_gpus < self.gpus_per_job:
            raise UsageError(
                f"--slurm_gpus {self.slurm_gpus} is less than --gpus_per_job {self.gpus_per_job}; "
                "leave --slurm_gpus out, or pass --device cpu"
            )
        if importlib.util.find_spec("submitit") is None:
            raise UsageError(
                "--command_launcher slurm needs submitit; `pip install submitit`, or install "
                "gmoe-ltdr with its extra [slurm]"
            )
        if self.slurm_cluster == "slurm" and shutil.which("sbatch") is None:
            raise UsageError(
                "--command_launcher slurm finds no `sbatch` here; start the sweep where jobs are "
                "submitted, or try it out with --slurm_cluster local"
            )

    def num_at_once(self, jobs: Sequence[TrainArgs]) -> int:
        return self.slurm_array_parallelism or self.jobs or DEFAULT_AT_ONCE

    def launch(self, commands: Sequence[Sequence[str]]) -> list[Path]:
        self.submit(TrainTask(), [list(command) for command in commands])
        print("`ltdr sweep status` with the same flags tells how far they are.")
        return []

    def submit(self, task: Any, commands: Sequence[Any]) -> None:
        """Hands over calls of a task, one for each command, in as few arrays as can be."""
        folder = Path(self.output_dir).absolute() / LOG_FOLDER
        arrays = [commands[at : at + MAX_ARRAY] for at in range(0, len(commands), MAX_ARRAY)]
        ids = []
        for array in arrays:
            executor = self._executor(folder, num_arrays=len(arrays))
            try:
                submitted = executor.map_array(task, array)
            except Exception as error:  # sbatch refuses in many ways, and says why
                raise UsageError(f"the jobs could not be submitted: {error}") from error
            ids.append(submitted[0].job_id.partition("_")[0])
        print(f"Submitted {len(commands)} jobs, as {', '.join(ids)}; logs in {folder}.")
        if self.slurm_cluster == "slurm":
            print(f"`squeue -j {','.join(ids)}` tells which of them wait and which run.")

    def _executor(self, folder: Path, *, num_arrays: int) -> Any:
        import submitit

        executor = submitit.AutoExecutor(
            folder / "%j", cluster=self.slurm_cluster, slurm_max_num_timeout=MAX_TIMEOUTS
        )
        executor.update_parameters(
            name="ltdr-sweep",
            timeout_min=parse_minutes(self.slurm_time),
            cpus_per_task=self.slurm_cpus,
            mem_gb=self.slurm_memory_gb,
            slurm_array_parallelism=max(1, self.num_at_once(()) // num_arrays),
            slurm_signal_delay_s=WARNING_SECONDS,
            slurm_additional_parameters=self._options(),
        )
        if self._num_gpus:
            executor.update_parameters(gpus_per_node=self._num_gpus)
        if self.slurm_partition is not None:
            executor.update_parameters(slurm_partition=self.slurm_partition)
        return executor

    @property
    def _num_gpus(self) -> int:
        if self.slurm_gpus is not None:
            return self.slurm_gpus
        return 0 if self.device == "cpu" else self.gpus_per_job

    def _options(self) -> dict[str, str | bool]:
        options: dict[str, str | bool] = {}
        for text in self.slurm_option:
            key, equals, value = text.partition("=")
            if not (key.strip("-") and equals):
                raise UsageError(
                    f"--slurm_option {text} is not KEY=VALUE, such as account=vision; give an "
                    "option that has no value as KEY="
                )
            options[key.lstrip("-")] = value or True
        return options if "no-requeue" in options else {"requeue": True, **options}


class TrainTask:
    """What runs on a node: a job in a process of its own, which is told of what Slurm sends."""

    def __init__(self) -> None:
        self._process: JobProcess | None = None
        self._told = False

    def __call__(self, command: Sequence[str]) -> str:
        (job,) = jobs_of([command])
        outcome = self._run(command, job)
        # On a shared folder the lock of a machine that died outlives it by a minute or two.
        end = time.monotonic() + (_LOCK_SECONDS if os.environ.get("SLURM_RESTART_COUNT") else 0)
        while outcome == IN_USE and time.monotonic() < end:
            time.sleep(_LOCK_POLL_SECONDS)
            outcome = self._run(command, job)
        if outcome not in ("done", IN_USE):
            raise RuntimeError(f"{job.output_dir}: {outcome}")
        return outcome

    def _run(self, command: Sequence[str], job: TrainArgs) -> str:
        process = self._process = JobProcess(command, job)
        before = signal.signal(signal.SIGTERM, self._pass_on)
        try:
            while not process.has_ended():
                time.sleep(_POLL_SECONDS)
            outcome = process.outcome()
            if self._told and outcome != "done":
                # Slurm will kill this task and, if that is how the cluster preempts, requeue it.
                # One that has ended by itself would not come back.
                time.sleep(_PATIENCE_SECONDS)
        finally:
            if not process.has_ended():  # interrupted: it must not outlive this task
                process.ask_to_stop()
            signal.signal(signal.SIGTERM, before)
        return outcome

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._told = True
        if self._process is not None:
            self._process.ask_to_stop()

    def checkpoint(self, command: Sequence[str]) -> Any:
        """Called by submitit, in a signal handler, when Slurm warns of the end: saves, and goes
        back into the queue."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.ask_to_stop()
            self._process.wait()
        return DelayedSubmission(TrainTask(), command)


def parse_minutes(text: str) -> int:
    """A time limit in whole minutes, from any form that sbatch takes."""
    found = _TIME.fullmatch(text)
    if found is None:
        raise UsageError(
            f"--slurm_time {text} is no time; give minutes (90), HOURS:MINUTES:SECONDS (12:00:00) "
            "or DAYS-HOURS (2-0)"
        )
    days, first, second, third = (None if part is None else int(part) for part in found.groups())
    if days is None and third is None:  # minutes, or minutes and seconds
        first, second, third = 0, first, second
    total = ((days or 0) * 24 + (first or 0)) * 60 + (second or 0) + bool(third)
    if total < 1:
        raise UsageError(f"--slurm_time {text} is too short; give a minute or more")
    return total
