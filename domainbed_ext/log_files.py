"""What a run prints, kept in a file: when the disk is full, lines are lost and the run goes on."""

from __future__ import annotations

import io
import os
from pathlib import Path

from domainbed_ext.atomic_files import writing


class LogFile(io.TextIOBase):
    """A text stream behind a file's content that never fails to write.

    Lines that find no room are missing, and once there is room again the file says so.
    """

    encoding = "utf-8"

    def __init__(self, file: Path | int) -> None:
        """Takes a path, or an open descriptor, which stays open.

        Raises:
            CannotWriteError: The file cannot be opened.
        """
        # no buffer, which would keep what it could not write, and fail again when it is closed
        if isinstance(file, int):
            self._raw = io.FileIO(file, "a", closefd=False)
        else:
            with writing(file):
                self._raw = io.FileIO(file, "a")
        self._problem: str | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def write(self, text: str) -> int:
        try:
            if self._problem is not None:
                self._write_all(f"\n(output is missing here: {self._problem})\n")
                self._problem = None
            self._write_all(text)
        except OSError as error:
            self._problem = error.strerror or str(error)
        return len(text)

    def close(self) -> None:
        self._raw.close()
        super().close()

    def _write_all(self, text: str) -> None:
        content = text.encode("utf-8", "backslashreplace")
        while content:
            content = content[os.write(self._raw.fileno(), content) :]
