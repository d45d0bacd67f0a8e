"""Files that are there whole or not at all, and what is said when the disk takes them no more."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# Beside the files, on the same disk; a process that is killed while it writes leaves its part here.
UNFINISHED_FOLDER = ".unfinished"


class CannotWriteError(OSError):
    """A file could not be written: the disk is full, or gone. The message names the file."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the system says of a failed write into a `CannotWriteError`."""
    try:
        yield
    except CannotWriteError:
        raise
    except OSError as error:
        raise CannotWriteError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def replaced(path: Path, *, keep: Path | None = None, durable: bool = True) -> Iterator[Path]:
    """A place to write a file to; if all goes well it is put on the disk and moved to `path`.

    Args:
        path: Where the file will be.
        keep: Where the one that is there now goes; None: nowhere.
        durable: Be there after a power cut too.

    Raises:
        CannotWriteError: What was at `path` is still there.
    """
    unfinished = path.parent / UNFINISHED_FOLDER / path.name
    with writing(path):
        try:
            unfinished.parent.mkdir(exist_ok=True)
            yield unfinished
            if durable:
                with open(unfinished, "rb+") as file:
                    os.fsync(file.fileno())
            if keep is not None and path.exists():
                os.replace(path, keep)
            os.replace(unfinished, path)
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
                unfinished.parent.rmdir()


def write_atomically(path: Path, text: str, *, durable: bool = True) -> None:
    """Writes a text file so that it is there whole or not at all; see `replaced`."""
    with replaced(path, durable=durable) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="\n")


def remove_unfinished(folder: Path) -> None:
    """Removes what a process left that was killed while it wrote into a folder."""
    shutil.rmtree(folder / UNFINISHED_FOLDER, ignore_errors=True)
