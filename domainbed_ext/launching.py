"""Which jobs a sweep launches, in rounds: those that are free, then what other launchers on the
same folder leave behind."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from domainbed_ext.job_files import FAILED_FILE
from domainbed_ext.job_locks import JobBusyError
from domainbed_ext.jobs import Job, JobState, delete_job
from domainbed_ext.launchers import TRAIN_MODULE, Launcher
from domainbed_ext.torchrun import distributed_command

# A diverged job would diverge again, step for step; the others are worth another try.
LAUNCHABLE = (JobState.NOT_LAUNCHED, JobState.INCOMPLETE, JobState.FAILED)
MAX_LAUNCHES = 3  # of one job by one launcher: it may be the job that kills its process
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 10.0


def chosen_jobs(
    command: str, jobs: Sequence[Job], states: Mapping[Path, JobState], *, diverged: bool
) -> list[Job]:
    """The jobs that "launch", "resume" or "retry_failed" would run.

    Args:
        command: One of these.
        jobs: All jobs of the sweep.
        states: Of the jobs, by folder.
        diverged: Whether "retry_failed" means jobs that diverged too.
    """
    if command == "resume":
        return [job for job in jobs if job.is_interrupted]
    wanted: Collection[JobState] = LAUNCHABLE
    if command == "retry_failed":
        wanted = (JobState.FAILED, JobState.DIVERGED) if diverged else (JobState.FAILED,)
    return [job for job in jobs if states[job.output_dir] in wanted]


def clear_failure(job: Job, state: JobState) -> bool:
    """Makes a failed job one to be gone on with, and a diverged one a new one: from its last
    checkpoint it would only diverge again. False if another process has it by now.
    """
    if state is JobState.FAILED:
        (job.output_dir / FAILED_FILE).unlink(missing_ok=True)
    if state is JobState.DIVERGED:
        try:
            delete_job(job.output_dir)
        except JobBusyError:
            return False
    return True


def commands_of(jobs: Sequence[Job], *, gpus_per_job: int) -> list[list[str]]:
    """The command line of each job."""
    commands = [[sys.executable, "-m", TRAIN_MODULE, *job.args.command_line()] for job in jobs]
    if gpus_per_job == 1:
        return commands
    return [distributed_command(command, gpus_per_job) for command in commands]


def launch_in_rounds(
    chosen: Sequence[Job],
    jobs: Sequence[Job],
    elsewhere: Collection[Path],
    launcher: Launcher,
    *,
    wait: bool,
) -> list[Job]:
    """Runs jobs, then those that other processes were at work on and have left.

    Args:
        chosen: To begin with.
        jobs: All jobs of the sweep.
        elsewhere: The folders of jobs that other processes are at work on.
        launcher: One that does not hand over.
        wait: Whether to wait for the other processes.

    Returns:
        All that were launched.
    """
    elsewhere = {*elsewhere}
    launches: Counter[Path] = Counter()
    while True:
        if chosen:
            elsewhere -= {job.output_dir for job in chosen}
            launches.update(job.output_dir for job in chosen)
            commands = commands_of(chosen, gpus_per_job=launcher.gpus_per_job)
            elsewhere |= {*launcher.launch(commands)}
        candidates = [
            job
            for job in jobs
            if job.output_dir in elsewhere and launches[job.output_dir] < MAX_LAUNCHES
        ]
        chosen = left_behind(candidates, wait=wait)
        if not chosen:
            return [job for job in jobs if launches[job.output_dir]]


def left_behind(jobs: Sequence[Job], *, wait: bool) -> list[Job]:
    """Those of the jobs that were begun and that nobody works on any more.

    Args:
        jobs: What to look at.
        wait: Look until some are left behind, or none is worked on.
    """
    pause = _FIRST_WAIT
    told = False
    while True:
        left = [job for job in jobs if job.is_interrupted]
        running = sum(job.state is JobState.RUNNING for job in jobs)
        if left or not running or not wait:
            return left
        if not told:
            print(
                f"waiting for {running} jobs that other processes run, to take over what they "
                "leave; Ctrl-C ends the waiting, --no-wait does without",
                file=sys.stderr,
                flush=True,
            )
            told = True
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_WAIT)
