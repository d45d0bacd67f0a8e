"""Downloads that go on where they were cut, checked before they count.

What has arrived lies in `NAME.part`, the server's version of it in `NAME.part.tag`; a file under
its own name is whole and has the wanted size and checksum.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

BLOCK = 1 << 18
TIMEOUT_SECONDS = 60.0
# A full disk or a folder that cannot be written: no other place helps.
_AT_HOME = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOENT)
ATTEMPTS = 5  # in a row without a single byte
WAIT_SECONDS = 2.0

Progress = Callable[[int, "int | None"], object]  # bytes there, of how many


class DownloadError(Exception):
    """A line on why a file cannot be had from a place."""


def fetch(
    url: str,
    path: Path,
    *,
    md5: str | None = None,
    sha256: str | None = None,
    num_bytes: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Downloads a file, unless it is there.

    Args:
        url: http or https.
        path: What to write.
        md5, sha256: The checksum that it must have.
        num_bytes: The size that it must have.
        progress: Called with the bytes that are there.

    Raises:
        DownloadError: It cannot be had, or is not what was wanted.
    """
    if path.exists():
        return
    part = path.with_name(path.name + ".part")
    failures = 0
    while True:
        before = _size(part)
        try:
            _continue(url, part, num_bytes, progress)
            break
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError):
                if error.code == 416:  # there is more than the server has: not the same file
                    _discard(part)
                elif error.code < 500:
                    raise DownloadError(f"{url} answers {error.code} {error.reason}") from error
            elif getattr(error, "errno", None) in _AT_HOME:
                raise
            failures = failures + 1 if _size(part) <= before else 0
            if failures == ATTEMPTS:
                reason = getattr(error, "reason", None) or error or type(error).__name__
                raise DownloadError(f"{url}: {reason}") from error
            time.sleep(WAIT_SECONDS * failures)
    problem = _problem(part, md5, sha256, num_bytes)
    if problem:
        _discard(part)
        raise DownloadError(f"{url} {problem}")
    os.replace(part, path)
    _tag(part).unlink(missing_ok=True)


def _continue(url: str, part: Path, num_bytes: int | None, progress: Progress | None) -> None:
    """Gets what is missing. Returns when all is there, raises when the connection is cut."""
    start = _size(part)
    if num_bytes is not None and start >= num_bytes:
        return
    headers = {"User-Agent": "gmoe-ltdr", "Accept-Encoding": "identity"}
    tag = _tag(part).read_text(encoding="utf-8") if start and _tag(part).exists() else ""
    if start and tag:
        # without a tag nobody can say that the rest belongs to the same file
        headers |= {"Range": f"bytes={start}-", "If-Range": tag}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        if response.headers.get_content_type() == "text/html":
            raise DownloadError(f"{url} gives a web page instead of the file")
        if response.status != 206:
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else num_bytes
        new_tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        _tag(part).write_text("" if new_tag.startswith("W/") else new_tag, encoding="utf-8")
        with open(part, "ab" if start else "wb") as file:
            done = start
            while block := response.read(BLOCK):
                file.write(block)
                done += len(block)
                if progress is not None:
                    progress(done, total)
        if total is not None and done < total:
            raise ConnectionError(f"the connection was cut at byte {done:,} of {total:,}")


def _problem(path: Path, md5: str | None, sha256: str | None, num_bytes: int | None) -> str | None:
    if num_bytes is not None and path.stat().st_size != num_bytes:
        return f"gives {path.stat().st_size:,} bytes instead of {num_bytes:,}"
    for name, wanted in (("md5", md5), ("sha256", sha256)):
        if wanted is not None and (found := checksum(path, name)) != wanted:
            return f"gives a file with the {name} {found} instead of {wanted}"
    return None


def checksum(path: Path, name: str) -> str:
    """A file's checksum by the hash `name`, in hex."""
    digest = hashlib.new(name, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag(part).unlink(missing_ok=True)


def _tag(part: Path) -> Path:
    return part.with_name(part.name + ".tag")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
