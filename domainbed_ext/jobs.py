"""A job: one training run of a sweep, what its folder says about it, and its deletion."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from domainbed_ext.job_files import DONE_FILE, ERR_FILE, LOCK_FILE, read_failure
from domainbed_ext.job_locks import is_locked, job_lock, was_left
from domainbed_ext.seeds import job_hash
from domainbed_ext.train_args import TrainArgs

IN_USE = "in use by another process"
# DomainBed's training, which takes no lock, writes at each evaluation.
ALIVE_MINUTES = 30


class JobState(str, Enum):
    """What a job's folder says about it. The first three are DomainBed's."""

    NOT_LAUNCHED = "Not launched"
    INCOMPLETE = "Incomplete"
    DONE = "Done"
    RUNNING = "Running"
    FAILED = "Failed"
    DIVERGED = "Diverged"


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        train_args: What the sweep passes to it; their hash names the folder, as in DomainBed.
        output_dir: `<sweep>/<hash>`.
    """

    train_args: Mapping[str, Any]
    output_dir: Path
    extra_args: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def in_sweep(
        cls, train_args: Mapping[str, Any], sweep_dir: str | os.PathLike[str], **extra_args: Any
    ) -> Job:
        return cls(train_args, Path(sweep_dir) / job_hash(train_args), extra_args)

    @property
    def args(self) -> TrainArgs:
        return TrainArgs(**self.train_args, output_dir=str(self.output_dir), **self.extra_args)

    @property
    def state(self) -> JobState:
        return job_state(self.output_dir)

    @property
    def is_interrupted(self) -> bool:
        """Whether it was begun and left, through no fault of its own."""
        return self.state is JobState.INCOMPLETE or (
            self.state is JobState.FAILED and has_died(self.output_dir)
        )

    def last_error_line(self) -> str:
        """The last line of err.txt, which says why a job failed."""
        with contextlib.suppress(OSError):
            text = (self.output_dir / ERR_FILE).read_text(encoding="utf-8", errors="replace")
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            if lines:
                return lines[-1]
        return str((read_failure(self.output_dir) or {}).get("message", "no message in err.txt"))


def job_state(folder: Path) -> JobState:
    """What a job's folder says about it."""
    if not folder.is_dir():
        return JobState.NOT_LAUNCHED
    if (folder / DONE_FILE).exists():
        return JobState.DONE
    if is_locked(folder):
        return JobState.RUNNING
    failure = read_failure(folder)
    if failure is not None:
        return JobState.DIVERGED if failure.get("reason") == "diverged" else JobState.FAILED
    return JobState.INCOMPLETE


def has_died(folder: Path) -> bool:
    """Whether a job failed because its process was killed."""
    return (read_failure(folder) or {}).get("reason") == "died"


def last_written(folder: Path) -> float:
    """When a job's folder or a file in it was last written to, in seconds since 1970."""
    times = [folder.stat().st_mtime]
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times)


def looks_alive(folder: Path) -> bool:
    """Whether an incomplete job may be at work in a program that takes no lock: DomainBed's own
    without our hook, or any on a system without locks."""
    try:
        return not was_left(folder) and time.time() - last_written(folder) < 60 * ALIVE_MINUTES
    except FileNotFoundError:  # deleted by now
        return False


def taken_by_others(folder: Path) -> str | None:
    """What other processes have made of a job that was to be run, in words; None: nothing."""
    state = job_state(folder)
    if state is JobState.DONE:
        return "done by another process"
    if state is JobState.RUNNING:
        return IN_USE
    if state in (JobState.FAILED, JobState.DIVERGED) and not has_died(folder):
        return "failed in another process"
    return None


def delete_job(folder: Path) -> None:
    """Deletes a job's folder with all that is in it.

    Raises:
        JobBusyError: Another process works on the job.
    """
    with job_lock(folder):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK_FILE:
                path.unlink()
        (folder / LOCK_FILE).unlink()
    with contextlib.suppress(OSError):  # another process may have begun the job anew by now
        folder.rmdir()
