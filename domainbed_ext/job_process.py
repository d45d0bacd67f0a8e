"""A job in a process of its own: how it is started, told to stop, and what became of it."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from domainbed_ext.exit_status import (
    EXIT_BUSY,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_STOPPED,
    EXIT_USAGE,
)
from domainbed_ext.job_files import ERR_FILE, make_folder, mark_failed, read_failure
from domainbed_ext.jobs import IN_USE
from domainbed_ext.progress_file import STOPPED, read_progress
from domainbed_ext.stop_signals import ask_to_stop, children_ignore_user_signals
from domainbed_ext.train_args import TrainArgs

TORCHRUN_MODULE = "torch.distributed.run"
# What the exit statuses of `train` mean.
OUTCOMES = {
    EXIT_OK: "done",
    EXIT_FAILED: "failed",
    EXIT_USAGE: "failed",
    EXIT_BUSY: IN_USE,
    EXIT_INTERRUPTED: "interrupted",
    EXIT_STOPPED: "stopped, to be gone on with",
}
_SAVE_SECONDS = 120  # that torchrun gives processes it has told to end; its default is 30
_LAST_LINES = 20
_POLL_SECONDS = 0.1
_LAUNCHER_AT_STDIN = "LTDR_LAUNCHER_AT_STDIN"


class JobProcess:
    """A running job. Its output is in its folder; what is said before it has one is kept.

    Args:
        command: `[python, "-m", "domainbed_ext.scripts.train", *flags]`, with or without torchrun.
        job: What it runs.
        environment: Variables to change.
    """

    def __init__(
        self,
        command: Sequence[str],
        job: TrainArgs,
        *,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.job = job
        self._by_torchrun = TORCHRUN_MODULE in command[:3]
        self._said = tempfile.TemporaryFile()
        # torchrun knows of SIGTERM alone, and of that but once: hence, too, the session of its own
        with children_ignore_user_signals() if self._by_torchrun else contextlib.nullcontext():
            self._process = subprocess.Popen(
                list(command),
                env={
                    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_SAVE_SECONDS),
                    **os.environ,
                    **(environment or {}),
                    _LAUNCHER_AT_STDIN: "1",
                },
                stdin=subprocess.PIPE,  # open as long as this process lives
                stdout=subprocess.DEVNULL,
                stderr=self._said,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def has_ended(self) -> bool:
        """May be asked in a signal handler; Popen.poll, interrupted by one, would be of no use
        there."""
        if self._process.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                return True  # who was interrupted has its status
            if pid:
                self._process.returncode = os.waitstatus_to_exitcode(status)
        return self._process.returncode is not None

    def ask_to_stop(self) -> None:
        """Makes it write a checkpoint and leave. Asking again changes nothing."""
        ranks = _ranks_of(self.pid) if self._by_torchrun else [self.pid]
        for pid in ranks:
            ask_to_stop(pid)
        if not ranks:
            self._process.terminate()

    def wait(self) -> None:
        """Returns when it has ended."""
        while not self.has_ended():
            time.sleep(_POLL_SECONDS)

    def outcome(self) -> str:
        """What became of a job that has ended, in a word or two. Leaves the reason in its folder if
        nothing else did."""
        self.wait()
        status = self._process.returncode
        if self._process.stdin is not None:
            self._process.stdin.close()
        with self._said as said:
            said.seek(0)
            lines = said.read().decode("utf-8", errors="replace").splitlines()
        if status in OUTCOMES and OUTCOMES[status] != "failed":
            return OUTCOMES[status]
        folder = Path(self.job.output_dir)
        failure = read_failure(folder)
        if failure is not None:
            return "diverged" if failure.get("reason") == "diverged" else "failed"
        progress = read_progress(folder)
        if progress is not None and progress.phase == STOPPED:
            return OUTCOMES[EXIT_STOPPED]  # torchrun has no status for that
        by = "torchrun: " if self._by_torchrun else ""
        message = f"a process of the job died ({by}exit status {status})"
        with contextlib.suppress(OSError, ValueError):  # a full disk must not end the sweep
            make_folder(folder)
            with open(folder / ERR_FILE, "a", encoding="utf-8") as file:
                for line in [*lines[-_LAST_LINES:], f"error: {message}"]:
                    file.write(f"{line}\n")
            mark_failed(folder, reason="died", message=message)
        return "failed"


def launcher_is_gone() -> bool:
    """Whether this process was started by a `JobProcess` of a process that has ended."""
    if _LAUNCHER_AT_STDIN not in os.environ:
        return False
    # Nothing is ever written to it: what can be read is its end.
    readable, _, _ = select.select([0], [], [], 0)
    return bool(readable)


def _ranks_of(pid: int) -> list[int]:
    """The processes that torchrun has started, on Linux; none if they are not there yet."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        commands = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    except OSError:
        return []
    return [child for child, command in commands.items() if b"--distributed" in command]
