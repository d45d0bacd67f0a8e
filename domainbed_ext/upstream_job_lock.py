"""The lock of a job that a checkout's own train program runs, which itself knows of none.

Sweeps of both kinds may share a folder: so `ltdr sweep` must see which jobs are at work, and
neither run them a second time nor delete their folders.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import sys
from pathlib import Path

from domainbed_ext.distributed import asked_rank
from domainbed_ext.exit_status import EXIT_BUSY, EXIT_OK
from domainbed_ext.job_files import DONE_FILE
from domainbed_ext.job_locks import JobBusyError, is_locked, job_lock
from domainbed_ext.seeds import is_job_name
from domainbed_ext.upstream_programs import program, train_flags

_logger = logging.getLogger(__name__)
_held: set[Path] = set()  # asking whether one's own lock is held would give it away


def leave_to_others() -> None:
    """Ends a train program whose job another process runs or, while a sweep had it wait, has
    finished: before it writes to that one's files.

    Raises:
        SystemExit: With `EXIT_BUSY`, or `EXIT_OK` if the job is done.
    """
    folder = _folder_of_this_run()
    if folder is None or folder in _held:
        return
    if is_locked(folder):
        _leave(f"{folder} is in use by another process")
    # What is run by hand, in a folder of any name, DomainBed runs again.
    if is_job_name(folder.name) and (folder / DONE_FILE).exists():
        print(f"{folder} is done already", file=sys.stderr)
        raise SystemExit(EXIT_OK)


def hold_job() -> None:
    """Holds the job that this train program runs until the process ends; does nothing elsewhere.

    Raises:
        SystemExit: Another process has it; with `EXIT_BUSY`.
    """
    folder = _folder_of_this_run()
    if folder is None or folder in _held:
        return
    lock = contextlib.ExitStack()
    try:
        lock.enter_context(job_lock(folder))
    except JobBusyError as error:
        _leave(str(error))
    except OSError as error:  # what DomainBed runs without
        _logger.warning("gmoe-ltdr: %s cannot be locked: %s", folder, error)
        return
    _held.add(folder)
    atexit.register(lock.close)


def _folder_of_this_run() -> Path | None:
    # Loaders' workers may import the program anew; of ranks that train together, one has the job.
    if program() != "train" or multiprocessing.parent_process() is not None or asked_rank() != 0:
        return None
    return Path(train_flags().output_dir)


def _leave(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(EXIT_BUSY)
