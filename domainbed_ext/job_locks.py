"""The lock of a job's folder: no two processes ever work on one job."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from domainbed_ext.atomic_files import writing
from domainbed_ext.errors import UsageError
from domainbed_ext.job_files import DONE_FILE, LOCK_FILE

_logger = logging.getLogger(__name__)


class JobBusyError(UsageError):
    """Another process works on the job."""


@contextlib.contextmanager
def job_lock(folder: Path) -> Iterator[None]:
    """Holds a job, so that no two processes ever work on the same one.

    The operating system gives the lock back when its process ends, however it ends.
    """
    path = folder / LOCK_FILE
    with contextlib.ExitStack() as held:
        while True:
            with writing(path):
                folder.mkdir(parents=True, exist_ok=True)
                file = held.enter_context(open(path, "a"))
            _lock(file, folder)
            if _is_at(file, path):
                break
            file.close()  # the process that had it before has deleted it
        yield
        if (folder / DONE_FILE).exists():
            path.unlink(missing_ok=True)


def _lock(file: IO[str], folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return
    for attempt in range(4):
        try:
            # lockf, unlike flock, is not inherited by the loaders' worker processes, which may live
            # a little longer.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                _logger.warning(
                    "%s cannot be locked (%s); start no second sweep on this folder",
                    folder / LOCK_FILE,
                    error,
                )
                return
            if attempt == 3:
                raise JobBusyError(
                    f"{folder} is in use by another process; wait for it, or give another "
                    "--output_dir"
                ) from None
            time.sleep(0.05)  # `is_locked` of another process holds the lock for an instant


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def is_locked(folder: Path) -> bool:
    """Whether another process works on the job at this moment."""
    return _tried_lock(folder) is True


def was_left(folder: Path) -> bool:
    """Whether a process had the job and is gone; False, too, where no lock can tell."""
    return _tried_lock(folder) is False


def _tried_lock(folder: Path) -> bool | None:
    """Whether the job's lock is held; None: there is none, or none that works."""
    try:
        import fcntl

        with open(folder / LOCK_FILE, "r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return True if error.errno in (errno.EACCES, errno.EAGAIN) else None
    except ImportError:
        return None
    return False
