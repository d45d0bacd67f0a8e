"""What a sweep says of its jobs: how many are in which state, how far running ones are, why others
failed."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from domainbed_ext.display import format_seconds
from domainbed_ext.estimates import measured_pace, seconds_left
from domainbed_ext.jobs import ALIVE_MINUTES, Job, JobState, last_written
from domainbed_ext.progress_file import RunProgress, read_progress
from domainbed_ext.train_args import job_label

SILENT_SECONDS = 600  # a process that lives writes its progress far more often
_MOST_FOLDERS = 20  # that are listed

States = Mapping[Path, JobState]


def print_jobs(jobs: Sequence[Job], states: States) -> None:
    """A table of data set x algorithm, with the number of jobs in each state."""
    table = _table(f"{len(jobs)} jobs", "data set", "algorithm")
    table.add_column("jobs", justify="right")
    shown = [state for state in JobState if state in states.values()]
    for state in shown:
        table.add_column(state.value.lower(), justify="right")
    rows: dict[tuple[str, str], Counter[JobState]] = {}
    for job in jobs:
        pair = (job.train_args["dataset"], job.train_args["algorithm"])
        rows.setdefault(pair, Counter())[states[job.output_dir]] += 1
    for pair, counts in rows.items():
        cells = [str(counts[state] or "-") for state in shown]
        table.add_row(*pair, str(counts.total()), *cells)
    _console(120).print(table)


def print_estimate(
    chosen: Sequence[Job],
    jobs: Sequence[Job],
    states: States,
    *,
    others: Mapping[tuple[str, str], Sequence[Path]],
    num_images: Mapping[str, int],
    device: str | None,
    at_once: int | None,
) -> None:
    """How many jobs would be run, and how long they would take as far as can be told.

    Args:
        chosen: What would be run.
        jobs: All jobs of the sweep; those that are done tell the pace.
        states: Of all jobs, by folder.
        others: Folders of finished jobs of other flags, by data set and algorithm: they tell the
            pace where no job of the sweep does.
        num_images: By data set.
        device: What the jobs would run on; None: not known here.
        at_once: How many would run side by side; None: not known here.
    """
    print(f"Dry run: {len(chosen)} jobs would be run, and nothing is.")
    if not chosen:
        return
    total, without = 0.0, 0
    for kind, of_kind in _by_kind(chosen).items():
        name = f"{kind[0]}, {kind[1]}: {len(of_kind)} jobs"
        own = [job.output_dir for job in _by_kind(jobs)[kind]]
        done = [folder for folder in own if states[folder] is JobState.DONE]
        pace, remark = measured_pace(done, device=device), ""
        if pace is None:
            pace, remark = measured_pace(others.get(kind, ()), device=device), ", of other flags"
        if pace is None:
            without += len(of_kind)
            where = "" if device is None else f" on {device}"
            print(f"  {name}, nothing to estimate from: none is done yet{where}")
            continue
        seconds = sum(
            seconds_left(job, pace, num_images=num_images.get(kind[0], 0)) for job in of_kind
        )
        total += seconds
        print(
            f"  {name}, about {format_seconds(seconds / len(of_kind))} each on {pace.device} (from "
            f"{pace.num_jobs} that are done{remark})"
        )
    if not total:
        print("How long that takes shows once the first jobs are done.")
        return
    line = f"Together about {format_seconds(total)} of computing"
    if at_once is not None and at_once > 1:
        line += f", {format_seconds(total / min(at_once, len(chosen)))} with {at_once} at once"
    if without:
        line += f", and {without} jobs more of which nothing is known"
    print(f"{line}. Evaluations are a guess, the start of jobs is not counted.")


def _by_kind(jobs: Sequence[Job]) -> dict[tuple[str, str], list[Job]]:
    kinds: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        kinds.setdefault((job.args.dataset, job.args.algorithm), []).append(job)
    return kinds


def print_running(jobs: Sequence[Job], states: States) -> None:
    """A line per running job: who works on it, how far it is, when it was last heard of."""
    running = [job for job in jobs if states[job.output_dir] is JobState.RUNNING]
    if not running:
        return
    table = _table("running", "folder", "job", "step", "left", "host", "process", "last heard of")
    now = time.time()
    for job in running:
        progress = read_progress(job.output_dir)
        cells = (
            ["?"] * 4 + [_heard(now - last_written(job.output_dir))]  # DomainBed's own training
            if progress is None
            else _progress_cells(progress, now)
        )
        table.add_row(f"{job.output_dir.name[:8]}..", job_label(job.args), *cells)
    _console(200).print(table)


def _progress_cells(progress: RunProgress, now: float) -> list[str]:
    step = progress.phase
    if progress.num_steps:
        doing = "" if progress.phase == "training" else f", {progress.phase}"
        step = f"{progress.step} of {progress.num_steps}{doing}"
    left = "?" if progress.seconds_left is None else format_seconds(progress.seconds_left)
    silent = now - progress.updated
    heard = _heard(silent)
    if silent > SILENT_SECONDS:
        heard += ": stuck, or its machine is gone?"
    return [step, left, progress.host, str(progress.pid), heard]


def _heard(silent: float) -> str:
    return f"{format_seconds(max(silent, 0.0))} ago"  # clocks of two machines differ a little


def print_failed(jobs: Sequence[Job], states: States) -> None:
    """Failed jobs with the reason, on stderr, and what to do about those that diverged."""
    bad = (JobState.FAILED, JobState.DIVERGED)
    print_reasons("failed", [job for job in jobs if states[job.output_dir] in bad])
    if JobState.DIVERGED in states.values():
        print(
            "Diverged jobs would diverge again, so launching leaves them alone; "
            "`retry_failed --diverged` starts them afresh, `delete_incomplete` removes them.",
            file=sys.stderr,
        )


def print_alive(folders: Sequence[Path], *, what: str) -> None:
    """Folders where a program that takes no lock may be at work, on stderr.

    Args:
        folders: The folders.
        what: What is done with them, or to be done.
    """
    if not folders:
        return
    print(
        f"{len(folders)} job folders look alive: written to in the last {ALIVE_MINUTES} minutes, "
        "and no lock says that nobody is at work. DomainBed's own sweep makes all folders before "
        f"it starts, and its training takes no lock where DOMAINBED_EXT is off; {what}",
        *folders[:_MOST_FOLDERS],
        *([f"and {len(folders) - _MOST_FOLDERS} more"] if len(folders) > _MOST_FOLDERS else []),
        sep="\n    ",
        file=sys.stderr,
    )


def print_reasons(word: str, jobs: Sequence[Job]) -> None:
    """Jobs with their folder and the last line of their err.txt, on stderr."""
    for job in jobs:
        print(
            f"{word}: {job.output_dir} ({job_label(job.args)})\n    {job.last_error_line()}",
            file=sys.stderr,
        )


def count_words(states: States) -> str:
    """How many jobs are in which state: "2 done, 1 failed"."""
    counts = Counter(states.values())
    return ", ".join(
        f"{counts[state]} {state.value.lower()}" for state in JobState if counts[state]
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE, title=title, title_justify="left", pad_edge=False)
    for name in columns:
        table.add_column(name)
    return table


def _console(width: int) -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=width)
