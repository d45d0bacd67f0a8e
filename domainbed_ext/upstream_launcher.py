"""`--command_launcher ltdr_local` and `ltdr_slurm` for a DomainBed checkout's own sweep.

DomainBed's "local" runs whichever `python` comes first on PATH, one job after another, and reports
success whatever became of them. Ours run this interpreter: `ltdr_local` one job per GPU, and fails
when a job did; `ltdr_slurm` hands the jobs to Slurm.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from domainbed_ext.errors import UsageError
from domainbed_ext.exit_status import EXIT_BUSY
from domainbed_ext.jobs import IN_USE, JobState, job_state
from domainbed_ext.launchers.devices import cuda_devices
from domainbed_ext.launchers.slurm import SlurmLauncher

_POLL_SECONDS = 0.1


def ltdr_local(commands: Sequence[str]) -> None:
    """Runs shell commands that begin with `python`; one per CUDA device at a time, else one.

    Raises:
        SystemExit: With status 1 after all have ended, if any of them failed.
    """
    waiting = deque(_arguments(command) for command in commands)
    free: list[str | None] = [*cuda_devices()] or [None]
    running: list[tuple[subprocess.Popen, str | None, list[str]]] = []
    failed: list[str] = []
    try:
        while waiting or running:
            while waiting and free:
                arguments = waiting.popleft()
                if _is_taken(arguments):
                    continue
                device = free.pop(0)
                running.append((_start(arguments, device), device, arguments))
            for item in [item for item in running if item[0].poll() is not None]:
                process, device, arguments = item
                running.remove(item)
                free.append(device)
                if process.returncode == EXIT_BUSY:
                    _say_taken(arguments, IN_USE)
                elif process.returncode != 0:
                    failed.append(f"{_folder(arguments)} (exit status {process.returncode})")
            time.sleep(_POLL_SECONDS)
    finally:
        for process, *_ in running:
            process.terminate()
        for process, *_ in running:
            process.wait()
    if failed:
        listing = "\n".join(f"  {line}" for line in sorted(failed))
        print(
            f"error: {len(failed)} of {len(commands)} jobs failed; their err.txt says why, and "
            f"delete_incomplete lets them be launched again:\n{listing}",
            file=sys.stderr,
        )
        raise SystemExit(1)


def ltdr_slurm(commands: Sequence[str]) -> None:
    """Submits shell commands that begin with `python` to Slurm: one array, a GPU for each job.

    What sbatch reads from the environment (SBATCH_PARTITION, SBATCH_TIMELIMIT, ...) goes before
    what is asked for here.
    """
    if not commands:
        return
    jobs = [_arguments(command) for command in commands]
    launcher = SlurmLauncher(output_dir=os.path.dirname(_folder(jobs[0])) or ".")
    try:
        launcher.check()
        launcher.submit(run_task, jobs)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def run_task(arguments: list[str]) -> None:
    """What runs on a node. DomainBed's training cannot go on where it was interrupted: one that
    Slurm starts again begins anew, without the records that it has left."""
    if os.environ.get("SLURM_RESTART_COUNT"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(_folder(arguments), "results.jsonl"))
    done = subprocess.run([sys.executable, *arguments[1:]])
    if done.returncode != EXIT_BUSY:
        done.check_returncode()


def _arguments(command: str) -> list[str]:
    program, *rest = shlex.split(command)
    return [sys.executable if program == "python" else program, *rest]


def _start(arguments: list[str], device: str | None) -> subprocess.Popen:
    environment = dict(os.environ)
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    return subprocess.Popen(arguments, env=environment)


def _is_taken(arguments: Sequence[str]) -> bool:
    """Whether a job that waited for its turn is at work or done by now, in a sweep on the same
    folder; says so."""
    folder = _output_dir(arguments)
    state = None if folder is None else job_state(Path(folder))
    if state is JobState.RUNNING:
        _say_taken(arguments, IN_USE)
    if state is JobState.DONE:
        _say_taken(arguments, "done by another process")
    return state in (JobState.RUNNING, JobState.DONE)


def _say_taken(arguments: Sequence[str], how: str) -> None:
    print(f"{_folder(arguments)}: {how}", file=sys.stderr)


def _folder(arguments: Sequence[str]) -> str:
    """Which job it was, for people."""
    return _output_dir(arguments) or shlex.join(arguments)


def _output_dir(arguments: Sequence[str]) -> str | None:
    if "--output_dir" in arguments[:-1]:
        return arguments[arguments.index("--output_dir") + 1]
    return None
