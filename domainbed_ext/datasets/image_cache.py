"""Decoded images on the disk, memory-mapped and shared by all jobs of a machine.

A cache is a folder with the pixels of all images one after the other (`images.bin`, uint8 RGB), for
each image where its pixels start and its height and width (`offsets.npy`, `sizes.npy`), and an
index. Its name holds a hash of the files' names, sizes and times and of the decoder's version, so
what was made of other files is never used. In the mode "exact" images are kept at their full size:
batches are those of decoding, bit for bit. A number as the mode reduces images to that shorter
side, which changes pixels a little; the fingerprint of the data says so.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from domainbed_ext.datasets.base import FileEnvironment, MultipleDomainDataset
from domainbed_ext.datasets.image_cache_flags import EXACT, OFF, ImageCacheOptions
from domainbed_ext.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

INDEX_FILE, PIXELS_FILE = "index.json", "images.bin"
OFFSETS_FILE, SIZES_FILE = "offsets.npy", "sizes.npy"
FORMAT = 1
GB = 10**9
ABSENT = -1  # the offset of an image that could not be decoded

Announce = Callable[[str], object]
Progress = Callable[[int, int], object]  # images done, of how many


class CachedImages:
    """The decoded images of one environment. The file is mapped when the first one is asked for."""

    def __init__(self, folder: Path, offsets: np.ndarray, sizes: np.ndarray) -> None:
        self._file = folder / PIXELS_FILE
        self._offsets = offsets
        self._sizes = sizes
        self._pixels: np.ndarray | None = None

    def image(self, index: int) -> Image.Image | None:
        """An RGB image; None for one that could not be decoded when the cache was built."""
        from PIL import Image

        pixels = self.pixels(index)
        return None if pixels is None else Image.fromarray(pixels)

    def pixels(self, index: int) -> np.ndarray | None:
        """The same as an array (H, W, 3) of its own."""
        start = int(self._offsets[index])
        if start == ABSENT:
            return None
        if self._pixels is None:
            # Read-only: a private map that may be written to could not exceed the machine's memory.
            self._pixels = np.memmap(self._file, np.uint8, mode="r")
        height, width = map(int, self._sizes[index])
        return np.array(self._pixels[start : start + height * width * 3].reshape(height, width, 3))

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the file itself; a pickled map would be a copy of all pixels.
        return {**self.__dict__, "_pixels": None}


def use_image_cache(
    dataset: MultipleDomainDataset,
    name: str,
    options: ImageCacheOptions,
    *,
    announce: Announce,
    progress: Progress | None = None,
) -> None:
    """Lets a data set's image files come out of a cache, which is built if there is none.

    Args:
        dataset: Left alone if its images are no files.
        name: Of the data set, for the cache's folder.
        options: Which cache.
        announce: Gets a line on what is used, or why nothing is.
        progress: Called while the cache is built.
    """
    from domainbed_ext.datasets.image_cache_build import build_image_cache, room_problem

    environments = [env for env in dataset.datasets if isinstance(env, FileEnvironment)]
    if options.mode == OFF or not environments or len(environments) < len(dataset.datasets):
        return
    side = options.side
    if side is not None and side < max(dataset.input_shape[1:]):
        raise UsageError(
            f"--image_cache {side} is smaller than the model's input of "
            f"{max(dataset.input_shape[1:])} pixels; pass 320 or so, or --image_cache {EXACT}"
        )
    paths = [path for environment in environments for path in environment.paths]
    prefix = f"{_folder_name(name)}-{options.mode}-"
    problem, found = None, None
    if not any(options.folder.glob(prefix + "*")):
        # before asking for the state of each file, which takes long for a large data set
        problem = room_problem(paths, options)
    if problem is None:
        folder = options.folder / (
            prefix + source_key(environments, options.mode, dataset.fingerprint())
        )
        found = read_cache(folder, len(paths))
        if found is None:
            problem = build_image_cache(
                folder, paths, options, announce=announce, progress=progress
            )
            found = read_cache(folder, len(paths))
    if found is None:
        if side is not None:
            # decoding instead would be another run under the same name
            raise UsageError(f"--image_cache {side}: {problem}")
        announce(f"image cache: not used, images are decoded as needed: {problem}")
        return
    offsets, sizes = found
    _attach(environments, folder, offsets, sizes)
    dataset.image_side = side
    num_absent = int((offsets == ABSENT).sum())
    broken = f", {num_absent} that cannot be read (`ltdr data check` names them)"
    announce(
        f"image cache: {len(paths):,} decoded images in {folder}{broken if num_absent else ''}"
    )


def _attach(
    environments: Sequence[FileEnvironment], folder: Path, offsets: np.ndarray, sizes: np.ndarray
) -> None:
    start = 0
    for environment in environments:
        part = slice(start, start + len(environment))
        environment.cache = CachedImages(folder, offsets[part], sizes[part])
        start += len(environment)


def read_cache(folder: Path, num_images: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Offsets and sizes of a whole cache; None if there is none or it is damaged."""
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        offsets = np.load(folder / OFFSETS_FILE, allow_pickle=False)
        sizes = np.load(folder / SIZES_FILE, allow_pickle=False)
        num_bytes = (folder / PIXELS_FILE).stat().st_size
        whole = (index["format"], index["num_images"]) == (FORMAT, num_images)
        whole &= num_bytes == index["num_bytes"] == 3 * int(sizes.astype(np.int64).prod(1).sum())
        whole &= offsets.shape == (num_images,) and sizes.shape == (num_images, 2)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (offsets, sizes) if whole else None


def source_key(environments: Sequence[FileEnvironment], mode: str, fingerprint: str) -> str:
    """16 hex digits that differ when any file does, by name, size or time, or the decoder."""
    import PIL
    from PIL import features

    # JPEG decoders differ in the last bit from version to version.
    decoder = [PIL.__version__, features.version("jpg"), features.version("libjpeg_turbo")]
    digest = hashlib.sha256(json.dumps([FORMAT, mode, fingerprint, decoder]).encode())
    paths = [os.path.abspath(path) for environment in environments for path in environment.paths]
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    # Threads: on a network disk each answer is a journey.
    with ThreadPoolExecutor(16) as threads:
        chunks = [paths[start : start + 1024] for start in range(0, len(paths), 1024)]
        for chunk, states in zip(chunks, threads.map(_file_states, chunks), strict=True):
            for path, state in zip(chunk, states, strict=True):
                digest.update(f"{path[len(root) :]}\0{state}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _file_states(paths: Sequence[str]) -> list[str]:
    states = []
    for path in paths:
        try:
            status = os.stat(path)
            states.append(f"{status.st_size} {status.st_mtime_ns}")
        except OSError:
            states.append("absent")
    return states


def _folder_name(name: str) -> str:
    """A name for people: "PACS", or the last part of "folder:/data/pictures"."""
    last = name.rstrip("/").rpartition("/")[2]
    return "".join(c if c.isalnum() or c in "._" else "_" for c in last)[:64] or "images"
