"""Runs jobs on a Ray cluster, one task each; the launcher stays and shows how far they are."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domainbed_ext.display import RunState, SweepProgress
from domainbed_ext.errors import UsageError
from domainbed_ext.job_process import JobProcess
from domainbed_ext.jobs import IN_USE, taken_by_others
from domainbed_ext.launchers.base import Launcher, jobs_of
from domainbed_ext.progress_file import RunProgress, read_progress
from domainbed_ext.stop_signals import Stopped, stop_requested, stops_deferred
from domainbed_ext.train_args import TrainArgs, job_label

# A task whose node dies is given to another node that often.
MAX_RETRIES = 10
_POLL_SECONDS = 1.0
_STOP_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class RayLauncher(Launcher):
    """Gives each job to Ray as a task. The folders of sweep and data must be seen by all nodes.

    Attributes:
        ray_address: Of the cluster; "auto" finds the one that this machine belongs to, or else
            starts one here; "local" starts one here.
        ray_gpus: Of one job, also a part of one (0.5); by default `gpus_per_job`, none with
            --device cpu, and none in a cluster without GPUs.
        ray_cpus: Of one job.
    """

    device: str = "auto"
    ray_address: str = "auto"
    ray_gpus: float | None = None
    ray_cpus: float = 1.0

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group("--command_launcher ray: a Ray cluster, one task per job")
        group.add_argument(
            "--ray_address",
            default=cls.ray_address,
            metavar="HOST:PORT",
            help="auto: the cluster that this machine belongs to, or else one started here; local: "
            "one started here (default: auto)",
        )
        group.add_argument(
            "--ray_gpus",
            type=float,
            metavar="N",
            help="GPUs of a job; 0.5 puts two jobs on each (default: --gpus_per_job, none with "
            "--device cpu)",
        )
        group.add_argument(
            "--ray_cpus",
            type=float,
            default=cls.ray_cpus,
            metavar="N",
            help="CPU cores of a job (default: 1)",
        )

    def check(self) -> None:
        super().check()
        if self.ray_cpus < 0 or (self.ray_gpus is not None and self.ray_gpus < 0):
            raise UsageError(
                f"--ray_cpus {self.ray_cpus} and --ray_gpus {self.ray_gpus}: neither can be below 0"
            )
        if self.ray_gpus is not None and self.gpus_per_job > max(1, self.ray_gpus):
            raise UsageError(
                f"--ray_gpus {self.ray_gpus} is less than --gpus_per_job {self.gpus_per_job}; "
                "leave --ray_gpus out"
            )
        if importlib.util.find_spec("ray") is None:
            raise UsageError(
                "--command_launcher ray needs Ray; `pip install ray`, or install gmoe-ltdr with "
                "its extra [ray]"
            )

    def launch(self, commands: Sequence[Sequence[str]]) -> list[Path]:
        import ray

        handler = signal.getsignal(signal.SIGTERM)
        self._connect(ray)
        try:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # Ray has put its own in its place
            return _run(ray, commands, jobs_of(commands), self._resources(ray), at_once=self.jobs)
        finally:
            ray.shutdown()  # of a cluster that was there before, this only leaves it

    def _connect(self, ray: Any) -> None:
        """Joins the cluster, or starts one on this machine."""
        options = {"log_to_driver": False, "logging_level": "warning"}
        if self.ray_address != "local":
            try:
                ray.init(address=self.ray_address, **options)
                return
            except ConnectionError as error:
                if self.ray_address != "auto":
                    raise UsageError(
                        f"--ray_address {self.ray_address}: no Ray cluster answers there ({error})"
                    ) from None
                print("No Ray cluster is running here: starting one on this machine.", flush=True)
        ray.init(address="local", include_dashboard=False, **options)

    def _resources(self, ray: Any) -> dict[str, float]:
        gpus = self.ray_gpus
        there = ray.cluster_resources()
        if gpus is None:
            gpus = 0 if self.device == "cpu" else self.gpus_per_job
            if self.device == "auto" and not there.get("GPU"):
                gpus = 0
        if gpus > there.get("GPU", 0):
            raise UsageError(
                f"the Ray cluster has {there.get('GPU', 0):g} GPUs, a job asks for {gpus:g}; give "
                "--ray_gpus, or --device cpu"
            )
        return {"num_gpus": gpus, "num_cpus": self.ray_cpus}


@dataclass
class _Running:
    """A task that was handed to Ray.

    Attributes:
        job: What it runs.
        before: What the job's folder said before.
        shown: Whether it has been seen at work.
    """

    job: TrainArgs
    before: RunProgress | None
    shown: bool = False


def _run(
    ray: Any,
    commands: Sequence[Sequence[str]],
    jobs: Sequence[TrainArgs],
    resources: dict[str, float],
    *,
    at_once: int | None,
) -> list[Path]:
    task = ray.remote(max_retries=MAX_RETRIES, **resources)(run_job_on_node)
    environment = {
        name: os.environ[name] for name in ("PYTHONPATH", "DOMAINBED_EXT") if name in os.environ
    }
    in_use: list[Path] = []

    def ended(job: TrainArgs, outcome: str) -> None:
        progress.finished(job_label(job), outcome)
        if outcome == IN_USE:
            in_use.append(Path(job.output_dir))

    waiting = deque(zip(commands, jobs, strict=True))
    running: dict[Any, _Running] = {}
    # an exception of a signal handler does not come out of Ray's calls as what it was
    with SweepProgress(len(jobs)) as progress, stops_deferred():
        try:
            while waiting or running:
                if stop_requested():
                    raise Stopped
                while waiting and (at_once is None or len(running) < at_once):
                    command, job = waiting.popleft()
                    folder = Path(job.output_dir)
                    taken = taken_by_others(folder)
                    if taken is not None:
                        ended(job, taken)
                        continue
                    item = _Running(job, before=read_progress(folder))
                    running[task.remote(list(command), job, os.getcwd(), environment)] = item
                if not running:
                    break
                over, _ = ray.wait(list(running), num_returns=1, timeout=_POLL_SECONDS)
                for reference in over:
                    ended(running.pop(reference).job, _outcome(ray, reference))
                for item in running.values():
                    _show(item, progress)
        finally:
            _stop(ray, list(running))
    return in_use


def run_job_on_node(
    command: Sequence[str], job: TrainArgs, folder: str, environment: Mapping[str, str]
) -> str:
    """What runs on a node: a job in a process of its own. Returns what became of it.

    Args:
        command: Of the job.
        job: The job.
        folder: Where the sweep was started; paths may be relative to it.
        environment: Variables of the machine on which the sweep was started.
    """
    os.chdir(folder)
    process = JobProcess([sys.executable, *command[1:]], job, environment=environment)
    try:
        process.wait()
    finally:
        if not process.has_ended():  # cancelled, by a KeyboardInterrupt
            process.ask_to_stop()
            process.wait()
    return process.outcome()


def _outcome(ray: Any, reference: Any) -> str:
    try:
        return ray.get(reference)
    except Exception as error:  # the task's, or that its node died too often
        return f"failed ({type(error).__name__}: {str(error).splitlines()[0]})"


def _show(item: _Running, progress: SweepProgress) -> None:
    """Shows what the job's own file says; the job may still wait for a place."""
    label = job_label(item.job)
    found = read_progress(Path(item.job.output_dir))
    if found is None or found == item.before:
        return
    if not item.shown:
        progress.started(label)
        item.shown = True
    if found.num_steps:
        progress.report(label, RunState(found.step, found.num_steps, phase=found.phase))


def _stop(ray: Any, references: Sequence[Any]) -> None:
    """Cancels what is left, and waits for checkpoints to be written."""
    for reference in references:
        ray.cancel(reference)
    if references:
        ray.wait(list(references), num_returns=len(references), timeout=_STOP_SECONDS)
