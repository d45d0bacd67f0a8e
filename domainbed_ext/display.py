"""What runs and sweeps show: table rows, files that repeat the terminal, progress bars or plain
lines.

A terminal gets bars that move; a pipe or a log file gets whole lines, and not too many of them.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from domainbed_ext.job_files import ERR_FILE, OUT_FILE, make_folder
from domainbed_ext.log_files import LogFile

PLAIN_SECONDS = 10.0
COLUMN_WIDTH = 12
# The phases before a run's first step, in which steps are images.
CACHING, PREPARING = IMAGE_PHASES = ("decoding", "preparing")


@dataclass(frozen=True)
class RunState:
    """How far a run is.

    Attributes:
        step: Steps taken; in one of `IMAGE_PHASES`, images done.
        num_steps: Of how many.
        loss: The last one.
        phase: "training", "evaluating", "saving" or one of `IMAGE_PHASES`.
    """

    step: int
    num_steps: int
    loss: float | None = None
    phase: str = "training"


ReportProgress = Callable[[RunState], None]


def format_row(values: Sequence[Any], *, width: int = COLUMN_WIDTH) -> str:
    """One row of out.txt: columns cut or padded to the same width, as DomainBed prints them."""
    texts = [f"{value:.10f}" if isinstance(value, float) else str(value) for value in values]
    return "  ".join(text.ljust(width)[:width] for text in texts)


class Tee:
    """A text stream that writes to several."""

    def __init__(self, *streams: TextIO | LogFile) -> None:
        self._streams = streams

    def write(self, text: str) -> int:
        for stream in self._streams:
            stream.write(text)
        self.flush()
        return len(text)

    def flush(self) -> None:
        for stream in self._streams:
            stream.flush()

    def isatty(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:  # encoding, fileno and so on: those of the terminal
        return getattr(self._streams[0], name)


@contextlib.contextmanager
def tee_output(folder: Path) -> Iterator[None]:
    """Repeats what is printed in the folder's out.txt and err.txt, behind what is there already."""
    make_folder(folder)
    stdout, stderr = sys.stdout, sys.stderr
    with LogFile(folder / OUT_FILE) as out, LogFile(folder / ERR_FILE) as err:
        sys.stdout, sys.stderr = Tee(stdout, out), Tee(stderr, err)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = stdout, stderr


@contextlib.contextmanager
def run_progress(label: str) -> Iterator[ReportProgress]:
    """Shows one run on stderr: a bar with loss and time left, or a plain line now and then."""
    if not sys.stderr.isatty():
        yield _PlainRun(sys.stderr)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    # Rows printed meanwhile go above the bar, unless they go to a file of their own.
    console = Console(stderr=True)
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        redirect_stdout=sys.stdout.isatty(),
        transient=True,
    ) as bars:
        task = bars.add_task(label, total=None, detail="starting")
        phase = ""

        def report(state: RunState) -> None:
            nonlocal phase
            if phase in IMAGE_PHASES and state.phase != phase:
                bars.reset(task)  # the speed of decoding says nothing about training
            phase = state.phase
            bars.update(task, completed=state.step, total=state.num_steps, detail=_detail(state))

        yield report


class _PlainRun:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._started: tuple[float, int] | None = None
        self._shown = time.monotonic()
        self._counted = ""

    def __call__(self, state: RunState) -> None:
        now = time.monotonic()
        unit = "image" if state.phase in IMAGE_PHASES else "step"
        counted = state.phase if unit == "image" else unit
        if self._started is None or counted != self._counted:
            self._started = (now, state.step)
            self._counted = counted
        if now - self._shown < PLAIN_SECONDS:
            return
        self._shown = now
        began, first = self._started
        steps = state.step - first
        left = (
            f", {format_seconds((now - began) / steps * (state.num_steps - state.step))} left"
            if steps
            else ""
        )
        print(
            f"{unit} {state.step} of {state.num_steps}, {_detail(state)}{left}",
            file=self._stream,
            flush=True,
        )


class SweepProgress:
    """Shows a sweep: all jobs together, and one line per running job."""

    def __init__(self, num_jobs: int, *, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._num_jobs = num_jobs
        self._finished = 0
        self._fractions: dict[str, float] = {}
        self._tasks: dict[str, TaskID] = {}
        self._began = self._shown = time.monotonic()
        self._bars: Progress | None = None
        if self._stream.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[detail]}"),
            )
            self._bars = Progress(
                *columns, TimeRemainingColumn(), console=Console(file=self._stream)
            )
            self._all = self._bars.add_task(
                "[bold]sweep", total=num_jobs, detail=f"0 of {num_jobs} jobs"
            )

    def __enter__(self) -> SweepProgress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def started(self, label: str) -> None:
        """A job starts."""
        self._fractions[label] = 0.0
        if self._bars is not None:
            self._tasks[label] = self._bars.add_task(f"  {label}", total=None, detail="starting")

    def report(self, label: str, state: RunState) -> None:
        """A running job got somewhere."""
        if state.phase not in IMAGE_PHASES:
            self._fractions[label] = state.step / max(state.num_steps, 1)
        if self._bars is not None:
            self._bars.update(
                self._tasks[label],
                completed=state.step,
                total=state.num_steps,
                detail=_detail(state),
            )
        self._update()

    def finished(self, label: str, outcome: str) -> None:
        """A job ended, or need not be started; `outcome` is a word or two."""
        self._finished += 1
        self._fractions.pop(label, None)
        if self._bars is not None:
            if label in self._tasks:
                self._bars.remove_task(self._tasks.pop(label))
            if outcome != "done":
                self._bars.console.print(f"{label}: {outcome}", highlight=False, markup=False)
            self._update()
        else:
            self._plain_line(f"{outcome}: {label}")

    def put_back(self, label: str, why: str) -> None:
        """A job has to be run again."""
        self._fractions.pop(label, None)
        if self._bars is not None:
            self._bars.remove_task(self._tasks.pop(label))
            self._bars.console.print(f"{label}: {why}", highlight=False, markup=False)
            self._update()
        else:
            self._plain_line(f"{why}: {label}")

    def _update(self) -> None:
        if self._bars is not None:
            detail = f"{self._finished} of {self._num_jobs} jobs"
            self._bars.update(
                self._all, completed=self._finished + sum(self._fractions.values()), detail=detail
            )
        elif time.monotonic() - self._shown > 6 * PLAIN_SECONDS:
            self._plain_line(f"{len(self._fractions)} running")

    def _plain_line(self, text: str) -> None:
        self._shown = time.monotonic()
        completed = self._finished + sum(self._fractions.values())
        left = ""
        if 0 < completed < self._num_jobs:
            per_job = (self._shown - self._began) / completed
            left = f", {format_seconds(per_job * (self._num_jobs - completed))} left"
        print(
            f"[{self._finished} of {self._num_jobs} jobs{left}] {text}",
            file=self._stream,
            flush=True,
        )


def format_seconds(seconds: float) -> str:
    """A duration as people say it: "45 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _detail(state: RunState) -> str:
    loss = "" if state.loss is None else f"loss {state.loss:.4f}"
    return loss if state.phase == "training" else f"{loss} {state.phase}".strip()
