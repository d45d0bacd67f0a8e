"""The files of a job's folder, which are the whole state of a sweep: it can be stopped, moved and
continued without a database.

    results.jsonl            one record per evaluation
    out.txt, err.txt         what the run printed
    checkpoint.safetensors   everything needed to go on; gone once the job is done
    checkpoint.previous.safetensors  the one before, in case that one is damaged
    model.safetensors/.json  the trained algorithm
    done                     written last, atomically: the job is finished
    failed                   why the job stopped for good; JSON
    lock                     held while a process works on the job; gone once the job is done
    progress.json            how far the run is; gone once the job is done
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from domainbed_ext.atomic_files import remove_unfinished, write_atomically
from domainbed_ext.errors import UsageError

DONE_FILE = "done"
FAILED_FILE = "failed"
LOCK_FILE = "lock"
PROGRESS_FILE = "progress.json"
CHECKPOINT_FILE = "checkpoint.safetensors"
PREVIOUS_CHECKPOINT_FILE = "checkpoint.previous.safetensors"
OUT_FILE = "out.txt"
ERR_FILE = "err.txt"


def make_folder(folder: Path) -> None:
    """Makes a job's folder, with a clear message when that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UsageError(
            f"cannot write to the output folder {folder}: {reason}; give another --output_dir"
        ) from None


def mark_done(folder: Path) -> None:
    """The last thing a run does."""
    (folder / FAILED_FILE).unlink(missing_ok=True)
    (folder / PROGRESS_FILE).unlink(missing_ok=True)
    write_atomically(folder / DONE_FILE, "done")


def tidy_up(folder: Path) -> None:
    """Removes what a job needs no more once it is done."""
    for name in (CHECKPOINT_FILE, PREVIOUS_CHECKPOINT_FILE):
        (folder / name).unlink(missing_ok=True)
    remove_unfinished(folder)


def has_checkpoint(folder: Path) -> bool:
    """Whether a run in this folder would go on rather than begin."""
    names = (CHECKPOINT_FILE, PREVIOUS_CHECKPOINT_FILE)
    return any((folder / name).exists() for name in names)


def mark_failed(folder: Path, *, reason: str, message: str, step: int | None = None) -> None:
    """Says that the job stopped for good.

    Args:
        folder: The job's folder.
        reason: "diverged" (would diverge again, so launching again leaves it alone), "memory" (ran
            out), "died" (its process was killed) or "error".
        message: One line.
        step: Where, if known.
    """
    write_atomically(
        folder / FAILED_FILE,
        json.dumps({"reason": reason, "message": message, "step": step}) + "\n",
    )


def read_failure(folder: Path) -> dict[str, Any] | None:
    """What `mark_failed` wrote, or None."""
    try:
        failure = json.loads((folder / FAILED_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        failure = None
    return (
        failure
        if isinstance(failure, dict)
        else {"reason": "error", "message": "unreadable failure marker"}
    )
