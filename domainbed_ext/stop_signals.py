"""Leaving when told to: SIGTERM, which preempts a job on a cluster, SIGUSR1 and SIGUSR2, which
Slurm's --signal sends ahead of it, and SIGHUP, the end of a terminal.

A request ends what is going on as Ctrl-C does, by an exception, here `Stopped`. Where something is
worth saving first (`stops_deferred`), it is only noted, and `stop_requested` tells of it. A second
SIGTERM ends the process at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from domainbed_ext.exit_status import EXIT_STOPPED

# `timeout` and systemd send SIGTERM to a process and to its group: that is one request.
REPEAT_SECONDS = 1.0
_NAMES = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")


class Stopped(BaseException):
    """A signal asked for an end; like KeyboardInterrupt no error.

    Attributes:
        step: The step after which a checkpoint was written; None if there was nothing to save.
    """

    def __init__(self, step: int | None = None) -> None:
        super().__init__(step)
        self.step = step


class _Requests:
    def __init__(self) -> None:
        self.deferred = False
        self.forget()

    def forget(self) -> None:
        self.stop = False
        self.first_sigterm: float | None = None

    def receive(self, number: int, frame: Any) -> None:
        """The signal handler."""
        if number == signal.SIGTERM:
            now = time.monotonic()
            if self.first_sigterm is None:
                self.first_sigterm = now
            elif now - self.first_sigterm >= REPEAT_SECONDS:
                os._exit(EXIT_STOPPED)
        if self.stop:
            return
        self.stop = True
        if not self.deferred:
            raise Stopped


_requests = _Requests()  # of this process, as signals are


def stop_requested() -> bool:
    """Whether a signal has asked this process to leave."""
    return _requests.stop


@contextlib.contextmanager
def stops_on_signals() -> Iterator[None]:
    """Within this block, signals ask for a stop. Does nothing outside the main thread, which alone
    gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        getattr(signal, name): signal.signal(getattr(signal, name), _requests.receive)
        for name in _NAMES
        if hasattr(signal, name) and not _is_from_nohup(name)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _requests.forget()


@contextlib.contextmanager
def stops_deferred() -> Iterator[None]:
    """Within this block a request is only noted: ask `stop_requested`."""
    before, _requests.deferred = _requests.deferred, True
    try:
        yield
    finally:
        _requests.deferred = before


def ask_to_stop(pid: int) -> None:
    """Asks one of our processes to leave; never its second SIGTERM."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, getattr(signal, "SIGUSR2", signal.SIGTERM))


def leave_stops_to_parent(_number: int = 0) -> None:
    """For helper processes: a signal to the whole group is for the process that they work for."""
    for name in _NAMES:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


@contextlib.contextmanager
def children_ignore_user_signals() -> Iterator[None]:
    """Processes started within this block ignore SIGUSR1 and SIGUSR2 unless they ask for them: for
    a program that would die of what Slurm sends to all processes of a job."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in _NAMES[1:3] if hasattr(signal, name)]
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _is_from_nohup(name: str) -> bool:
    return name == "SIGHUP" and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
