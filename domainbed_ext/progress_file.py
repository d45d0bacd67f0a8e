"""How far a run is, as a file in its folder: for `sweep status` and launchers, on any machine that
sees the folder.

It is a sign of life for people. Whether a job is taken is told by its lock alone, never by this.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from domainbed_ext.atomic_files import write_atomically
from domainbed_ext.display import IMAGE_PHASES, RunState
from domainbed_ext.job_files import PROGRESS_FILE

WRITE_SECONDS = 10.0
STARTING, STOPPED = "starting", "stopped"


@dataclass(frozen=True)
class RunProgress:
    """What the file says.

    Attributes:
        host, pid: The process that works on the job, or the last that did.
        started: When that process took the job, in seconds since 1970, as all times.
        updated: When this was written.
        phase: `STARTING`, `STOPPED`, or that of a `RunState`.
        step, num_steps: As in a `RunState`.
        seconds_left: At the pace so far, evaluations included; None if nothing is known.
    """

    host: str
    pid: int
    started: float
    updated: float
    phase: str
    step: int = 0
    num_steps: int = 0
    seconds_left: float | None = None


def read_progress(folder: Path) -> RunProgress | None:
    """The last progress of a job; None if there is none, or none that can be read."""
    try:
        return RunProgress(**json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


class ProgressFile:
    """Writes the file of a run: at once when the phase changes, else every few seconds."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / PROGRESS_FILE
        now = time.time()
        self._last = RunProgress(socket.gethostname(), os.getpid(), now, now, STARTING)
        self._first_step: tuple[float, int] | None = None
        self._write()

    def __call__(self, state: RunState) -> None:
        """Takes a run's state."""
        now = time.time()
        if state.phase not in IMAGE_PHASES and self._first_step is None:
            self._first_step = (now, state.step)
        if state.phase == self._last.phase and now - self._last.updated < WRITE_SECONDS:
            return
        left = None
        if self._first_step is not None and state.step > self._first_step[1]:
            began, first = self._first_step
            left = (now - began) / (state.step - first) * (state.num_steps - state.step)
        self._last = replace(
            self._last,
            updated=now,
            phase=state.phase,
            step=state.step,
            num_steps=state.num_steps,
            seconds_left=left,
        )
        self._write()

    def stopped(self) -> None:
        """The run leaves because a signal asked it to."""
        self._last = replace(self._last, updated=time.time(), phase=STOPPED, seconds_left=None)
        self._write()

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # a full disk is for the run to find out
            write_atomically(self._path, json.dumps(asdict(self._last)) + "\n", durable=False)
