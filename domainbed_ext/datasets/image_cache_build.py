"""Fills an image cache: every image decoded once, written aside, put in place whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from domainbed_ext.datasets.base import read_image
from domainbed_ext.datasets.image_cache import (
    ABSENT,
    FORMAT,
    GB,
    INDEX_FILE,
    OFFSETS_FILE,
    PIXELS_FILE,
    SIZES_FILE,
    Announce,
    Progress,
    read_cache,
)
from domainbed_ext.datasets.image_cache_flags import ImageCacheOptions

LOCK_FILE = "lock"
PARTIAL, TOO_LARGE = ".partial", ".too_large"
NUM_SAMPLES = 512  # images whose headers are read to guess how much room all of them need
CHUNK = 256
MAX_THREADS = 16
WAIT_SECONDS = 0.2


class NoRoomError(Exception):
    """The cache would exceed its limit, or the disk. Says so in a line."""


def build_image_cache(
    folder: Path,
    paths: Sequence[str],
    options: ImageCacheOptions,
    *,
    announce: Announce,
    progress: Progress | None = None,
) -> str | None:
    """Makes the cache `folder` of all `paths`. Returns None, or why there is none.

    One process builds at a time; the others wait and find the cache there.
    """
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        # before the lock: a hopeless case must wait for nobody
        _check_room(_estimated_bytes(paths, options.side), options, _marker(folder))
        with _lock(options.folder, announce):
            if read_cache(folder, len(paths)) is not None:
                return None
            _check_room(0, options, _marker(folder))
            announce(f"image cache: decoding {len(paths):,} images into {folder}")
            _build(folder, paths, options, progress)
    except (NoRoomError, OSError) as error:
        return _reason(error, options)
    return None


def room_problem(paths: Sequence[str], options: ImageCacheOptions) -> str | None:
    """Why a cache of these files cannot be, as far as a glance at some of them tells; or None."""
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        _check_room(_estimated_bytes(paths, options.side), options)
    except (NoRoomError, OSError) as error:
        return _reason(error, options)
    return None


def _reason(error: NoRoomError | OSError, options: ImageCacheOptions) -> str:
    if isinstance(error, NoRoomError):
        return str(error)
    return f"{options.folder}: {error.strerror or error}; pass another --image_cache_dir"


def _build(
    folder: Path, paths: Sequence[str], options: ImageCacheOptions, progress: Progress | None
) -> None:
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)  # of a builder that was killed
    shutil.rmtree(folder, ignore_errors=True)  # damaged, or it would have been used
    partial.mkdir()
    try:
        room = int(options.limit_gb * GB) - used_bytes(options.folder)
        with open(partial / PIXELS_FILE, "wb") as file:
            writer = _Writer(file.fileno(), len(paths), options.side, room)
            with ThreadPoolExecutor(num_threads()) as threads:
                for start in range(0, len(paths), CHUNK):
                    chunk = range(start, min(start + CHUNK, len(paths)))
                    list(threads.map(writer.store, chunk, [paths[i] for i in chunk]))
                    if progress is not None:
                        progress(chunk.stop, len(paths))
            os.fsync(file.fileno())
        np.save(partial / OFFSETS_FILE, writer.offsets)
        np.save(partial / SIZES_FILE, writer.sizes)
        index = {
            "format": FORMAT,
            "num_images": len(paths),
            "num_bytes": writer.end,
            "num_unreadable": int((writer.offsets == ABSENT).sum()),
        }
        (partial / INDEX_FILE).write_text(json.dumps(index) + "\n", encoding="utf-8")
        os.replace(partial, folder)
    except NoRoomError as error:
        # that much was needed at least: the next job need not find out again
        needed = writer.end * len(paths) // max(chunk.start, 1)
        _marker(folder).write_text(str(needed), encoding="utf-8")
        raise NoRoomError(_no_room(needed, options)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Writer:
    """Puts decoded images one behind the other, in whatever order they come."""

    def __init__(self, file: int, num_images: int, side: int | None, room: int) -> None:
        self.offsets = np.full(num_images, ABSENT, np.int64)
        self.sizes = np.zeros((num_images, 2), np.int32)
        self.end = 0
        self._file, self._side, self._room = file, side, room
        self._lock = threading.Lock()

    def store(self, position: int, path: str) -> None:
        try:
            image = read_image(path)
        except OSError:
            return  # decoding it when it is asked for names it
        size = reduced_size(image.size, self._side)
        if size != image.size:
            from PIL import Image

            image = image.resize(size, Image.Resampling.BICUBIC)
        pixels = np.asarray(image)
        with self._lock:
            start = self.end
            if start + pixels.nbytes > self._room:
                raise NoRoomError
            self.end += pixels.nbytes
        _write_all(self._file, pixels.reshape(-1).data, start)
        self.offsets[position] = start
        self.sizes[position] = pixels.shape[:2]


def _write_all(file: int, content: memoryview, start: int) -> None:
    # Not through a memory map: a full disk would kill the process instead of raising.
    while content:
        written = os.pwrite(file, content, start)
        content, start = content[written:], start + written


def reduced_size(size: tuple[int, int], side: int | None) -> tuple[int, int]:
    """Width and height with the shorter one at most `side`, in the same proportion."""
    width, height = size
    if side is None or min(size) <= side:
        return size
    scale = side / min(size)
    return max(side, round(width * scale)), max(side, round(height * scale))


def used_bytes(folder: Path) -> int:
    """What all caches in the folder take."""
    return sum(file.stat().st_size for file in folder.glob(f"*/{PIXELS_FILE}"))


def num_threads() -> int:
    """How many threads decode: decoders release Python's lock, so no processes are needed."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(available or 1, MAX_THREADS)


def _marker(folder: Path) -> Path:
    """Where it is noted that a build found too little room, with the bytes that it would take."""
    return folder.with_name(folder.name + TOO_LARGE)


def _check_room(needed: int, options: ImageCacheOptions, marker: Path | None = None) -> None:
    if marker is not None:
        with contextlib.suppress(OSError, ValueError):
            needed = max(needed, int(marker.read_text(encoding="utf-8")))
    if needed > options.limit_gb * GB - used_bytes(options.folder):
        raise NoRoomError(_no_room(needed, options))
    free = shutil.disk_usage(options.folder).free
    if needed > 0.95 * free:
        raise NoRoomError(
            f"it needs about {needed / GB:.1f} GB, and {options.folder} has {free / GB:.1f} GB "
            "free; pass another --image_cache_dir"
        )


def _no_room(needed: int, options: ImageCacheOptions) -> str:
    used = used_bytes(options.folder)
    return (
        f"it needs about {needed / GB:.1f} GB, and {used / GB:.1f} of the {options.limit_gb:g} GB "
        f"allowed in {options.folder} are taken; pass --image_cache_gb "
        f"{1.1 * (needed + used) / GB:.2g} or more, --image_cache 320, or delete what is not "
        "needed there"
    )


def _estimated_bytes(paths: Sequence[str], side: int | None) -> int:
    """From the headers of some images, evenly spread."""
    from PIL import Image

    sizes = []
    for path in paths[:: max(1, len(paths) // NUM_SAMPLES)]:
        with contextlib.suppress(OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            with Image.open(path) as image:
                width, height = reduced_size(image.size, side)
            sizes.append(3 * width * height)
    return int(len(paths) * np.mean(sizes)) if sizes else 0


@contextlib.contextmanager
def _lock(folder: Path, announce: Announce) -> Iterator[None]:
    """Holds the folder against other builders; the system gives it back when a process ends."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    with open(folder / LOCK_FILE, "a") as file:
        waiting = False
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
            if not waiting:
                announce(f"image cache: waiting for another process that fills {folder}")
                waiting = True
            time.sleep(WAIT_SECONDS)
        yield
