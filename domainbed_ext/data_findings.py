"""What can be said about a data set before training on it: counts, and what is unreadable, there
twice, clipped or left out.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from domainbed_ext.datasets import get_dataset_class
from domainbed_ext.datasets.base import (
    Environment,
    FileEnvironment,
    read_image,
)
from domainbed_ext.datasets.folder import IMAGE_SUFFIXES
from domainbed_ext.datasets.image_cache_build import CHUNK, num_threads
from domainbed_ext.datasets.near_duplicates import Pair, near_duplicates, thumbnail

_CLUTTER = ("thumbs.db", "desktop.ini")  # that file managers leave behind


@dataclass(frozen=True)
class Findings:
    """What is known about a data set.

    Attributes:
        environments, class_names: What there is.
        warnings: What differs from the published copy, pictures in two domains, files that are
            clipped, listed twice or left out.
        wrong: What must be mended.
        unreadable: Paths and reasons.
        pairs: Near duplicates, as positions in `paths`.
        paths: Of all images, domain by domain; empty for data in memory.
    """

    environments: Sequence[Environment]
    class_names: Sequence[str]
    warnings: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    @property
    def counts(self) -> np.ndarray:
        """Images, (domains, classes)."""
        num = len(self.class_names)
        return np.stack([np.bincount(env.labels, minlength=num) for env in self.environments])

    def domain_of(self, position: int) -> str:
        for environment in self.environments:
            if position < len(environment):
                return environment.name
            position -= len(environment)
        raise IndexError(position)


def check(name: str, data_dir: str | Path, *, decode: bool = True) -> Findings:
    """Looks at a data set.

    Args:
        name: As for `train --dataset`.
        data_dir: Where benchmarks are.
        decode: Whether to read the images, for what is unreadable or there twice.
    """
    found = _load(name, data_dir)
    files = [env for env in found.environments if isinstance(env, FileEnvironment)]
    found.paths.extend(path for environment in files for path in environment.paths)
    if decode and files:
        thumbnails, modes = _decode(found)
        domains = np.repeat(np.arange(len(files)), [len(env) for env in files])
        found.pairs.extend(near_duplicates(thumbnails, domains))
        found.warnings.extend(_clipped(found.paths, modes))
    found.warnings.extend(_listed_twice(files))
    if name.startswith("folder:"):
        found.warnings.extend(_not_read(name.partition(":")[2]))
    if found.unreadable:
        found.wrong.append(f"{len(found.unreadable):,} images cannot be read")
    if found.pairs:
        found.warnings.append(f"{len(found.pairs):,} pairs of alike images in different domains")
    return found


def _load(name: str, data_dir: str | Path) -> Findings:
    from domainbed_ext.datasets.benchmarks import Benchmark
    from domainbed_ext.datasets.folder import IndexedDataset

    dataset_class: Any = get_dataset_class(name)
    if issubclass(dataset_class, IndexedDataset):
        index = dataset_class.INDEX
        return Findings(index.environments(index.domains), index.class_names)
    if not issubclass(dataset_class, Benchmark):
        dataset = dataset_class(data_dir, [], {})
        return Findings(dataset.datasets, dataset.class_names)
    index = dataset_class.index(data_dir)
    found = Findings(index.environments(dataset_class.ENVIRONMENTS), index.class_names)
    problem = dataset_class.count_problem(index)
    if problem:
        (found.warnings if dataset_class.is_known_copy(index) else found.wrong).append(problem)
    return found


def _decode(found: Findings) -> tuple[np.ndarray, list[str]]:
    """Thumbnails of all images and Pillow's modes of their files; unreadable ones are noted, and
    are black.
    """

    def one(path: str) -> tuple[np.ndarray, str, str | None]:
        try:
            with Image.open(path) as file:
                mode = file.mode
            return thumbnail(read_image(path)), mode, None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = str(error) if Path(path).exists() else "it does not exist"
            return np.zeros((16, 16), np.uint8), "", reason

    console = Console(stderr=True)
    chunks = [found.paths[start : start + CHUNK] for start in range(0, len(found.paths), CHUNK)]
    if console.is_terminal:
        chunks = track(chunks, "decoding", console=console, transient=True)  # type: ignore[assignment]
    thumbnails, modes = [], []
    with ThreadPoolExecutor(num_threads()) as threads:
        for chunk in chunks:
            for path, (small, mode, reason) in zip(chunk, threads.map(one, chunk), strict=True):
                thumbnails.append(small)
                modes.append(mode)
                if reason is not None:
                    found.unreadable.append((path, reason))
    return np.stack(thumbnails), modes


def _clipped(paths: Sequence[str], modes: Sequence[str]) -> Iterator[str]:
    deep = [path for path, mode in zip(paths, modes, strict=True) if mode.startswith(("I", "F"))]
    if deep:
        yield (
            f"{len(deep):,} images have more than 8 bits a pixel, and reading clips what is above "
            f"255 to white (as in DomainBed): convert them to 8 bits; the first is {deep[0]}"
        )


def _listed_twice(environments: Sequence[FileEnvironment]) -> Iterator[str]:
    for environment in environments:
        counts = Counter(map(os.path.normpath, environment.paths))
        twice = [path for path, count in counts.items() if count > 1]
        if twice:
            yield (
                f"{len(twice):,} files are listed twice or more in {environment.name}, and may be "
                f"trained on and validated on at once; the first is {twice[0]}"
            )


def _not_read(root: str) -> Iterator[str]:
    """Of a `domain/class/image` folder: files that are no images by their ending."""
    endings: Counter[str] = Counter()
    for place, folders, names in os.walk(Path(root).expanduser(), followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        if len(Path(place).relative_to(Path(root).expanduser()).parts) >= 2:
            endings.update(
                Path(name).suffix.lower() or "no ending"
                for name in names
                if not name.lower().endswith((*IMAGE_SUFFIXES, *_CLUTTER))
                and not name.startswith(".")
            )
    if endings:
        listing = ", ".join(f"{ending} ({count})" for ending, count in sorted(endings.items()))
        yield f"{endings.total():,} files are left out, whose endings are not read: {listing}"
