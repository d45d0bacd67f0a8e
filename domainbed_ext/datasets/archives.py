"""Reads archives from strangers: nothing is written but images, below a folder that we choose.

Names that lead elsewhere, links that do, and contents out of all proportion are refused, and with
them the whole archive.
"""

from __future__ import annotations

import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from domainbed_ext.errors import UsageError

MAX_GROWTH = 100  # times the archive's size; images hardly shrink at all
GROWTH_FREE = 1 << 30  # bytes that are fine in any case

# What readers raise on truncated or tampered archives.
DAMAGED = (
    EOFError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    tarfile.TarError,
    OSError,
    NotImplementedError,
)


@dataclass(frozen=True)
class Member:
    """A file in an archive.

    Attributes:
        name: Its path, relative and without "..".
        num_bytes: Its size, as the archive says.
    """

    name: PurePosixPath
    num_bytes: int
    _archive: Any
    _entry: Any

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        if isinstance(self._archive, zipfile.ZipFile):
            file = self._archive.open(self._entry)
        else:
            try:
                # follows links, which lead to other members: that was checked
                file = self._archive.extractfile(self._entry)
            except (KeyError, RecursionError):
                raise tarfile.TarError(f"{self.name} is a link to nothing") from None
        if file is None:
            raise tarfile.TarError(f"{self.name} is no file")
        with file:
            yield file

    def write_to(self, path: Path) -> None:
        """Copies it to a place, whose folders are made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.open() as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)


@contextmanager
def open_archive(path: Path) -> Iterator[Iterator[Member]]:
    """The files of a zip, tar, tar.gz, tar.bz2 or tar.xz, whatever its name.

    Raises:
        UsageError: It is none of these, is damaged, or holds what no data set needs.
    """
    try:
        if not path.is_file():
            raise UsageError(f"no archive at {path}")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as opened:
                yield _zip_members(opened, path)
        elif tarfile.is_tarfile(path):
            with tarfile.open(path, "r:*", tarinfo=_Entry) as opened_tar:
                yield _tar_members(opened_tar, path)
        else:
            raise UsageError(
                f"{path} is neither a zip nor a tar archive, or it is cut off; fetch it again"
            )
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's trouble, not the archive's
        raise UsageError(f"the archive {path} is damaged ({error}); fetch it again") from error


def _zip_members(archive: zipfile.ZipFile, path: Path) -> Iterator[Member]:
    guard = _Guard(path)
    for entry in archive.infolist():
        if entry.is_dir():
            continue
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise UsageError(f"{path} holds a link, {entry.filename!r}; it is not unpacked")
        if entry.flag_bits & 1:
            raise UsageError(f"{path} is encrypted; unpack it yourself")
        name = guard.checked(entry.filename, entry.file_size)
        yield Member(name, entry.file_size, archive, entry)


class _Entry(tarfile.TarInfo):
    """A tar's entry. For the module an archive ends at whatever is no entry, so what was cut off or
    overwritten would be missing in silence; here it ends at the mark that tells its end.
    """

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Entry:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no further entry, and no end: {error}") from None


def _check_to_the_end(archive: tarfile.TarFile) -> None:
    """Reads what follows the last entry, as checksums of compressed archives are at their end."""
    left = GROWTH_FREE
    while left > 0 and (block := archive.fileobj.read(1 << 20)):
        left -= len(block)
    if left <= 0:
        raise tarfile.ReadError("it does not end")


def _tar_members(archive: tarfile.TarFile, path: Path) -> Iterator[Member]:
    guard = _Guard(path)
    for entry in archive:
        if entry.isdir():
            continue
        name = guard.checked(entry.name, entry.size)
        if entry.issym() or entry.islnk():
            # a symbolic link starts at its own folder, a hard link at the archive's
            base = PurePosixPath(entry.name).parent if entry.issym() else PurePosixPath()
            guard.check_link(entry.name, base, entry.linkname)
        elif not entry.isfile():
            raise UsageError(f"{path} holds a device or pipe, {entry.name!r}; it is not unpacked")
        yield Member(name, entry.size, archive, entry)
    _check_to_the_end(archive)


class _Guard:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._left = max(GROWTH_FREE, MAX_GROWTH * path.stat().st_size)

    def checked(self, name: str, num_bytes: int) -> PurePosixPath:
        place = PurePosixPath(name)
        strange = "\\" in name or "\0" in name or (len(name) > 1 and name[1] == ":")
        if place.is_absolute() or ".." in place.parts or strange or not place.parts:
            raise UsageError(
                f"{self._path} holds a file that would be written elsewhere, {name!r}; it is not "
                "unpacked"
            )
        self._left -= num_bytes
        if self._left < 0:
            raise UsageError(
                f"{self._path} unpacks to more than {MAX_GROWTH} times its size; it is not unpacked"
            )
        return place

    def check_link(self, name: str, base: PurePosixPath, target: str) -> None:
        depth = 0
        parts = (base / target).parts
        for part in parts:
            depth += -1 if part == ".." else part not in ("", ".")
            if depth < 0:
                break
        if PurePosixPath(target).is_absolute() or depth < 0:
            raise UsageError(
                f"{self._path} holds a link that leads elsewhere, {name!r} to {target!r}; it is "
                "not unpacked"
            )
