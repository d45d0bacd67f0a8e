"""Gets a benchmark: one place after the other, or archives that the user has."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from domainbed_ext.datasets.benchmark_files import install
from domainbed_ext.datasets.benchmarks import Benchmark
from domainbed_ext.datasets.resumable_http import DownloadError, fetch
from domainbed_ext.datasets.sources import BY_HAND, DUPLICATES, SOURCES, Remote, Source
from domainbed_ext.errors import UsageError

DOWNLOADS = "downloads"  # below the data folder

Announce = Callable[[str], object]


class Bars(Protocol):
    """What shows how far things are."""

    def bytes(self, name: str, done: int, total: int | None) -> object: ...

    def images(self, name: str, count: int) -> object: ...


def download_benchmark(
    dataset_class: type[Benchmark],
    data_dir: Path,
    *,
    from_archive: Sequence[Path] = (),
    duplicates: Path | None = None,
    keep_archives: bool = False,
    announce: Announce,
    bars: Bars,
) -> str | None:
    """Makes the data set's folder.

    Args:
        dataset_class: Which.
        data_dir: Where data sets are kept.
        from_archive: Take these instead of downloading.
        duplicates: DomainNet's list of duplicates, if it is not to be downloaded.
        keep_archives: Leave what was downloaded.
        announce: Gets a line on each place that is tried.
        bars: Shows progress.

    Returns:
        How the copy differs from the published one, or None.

    Raises:
        UsageError: It cannot be had; says why for each place, and what to do by hand.
    """
    name = dataset_class.__name__
    downloads = data_dir / DOWNLOADS / name

    def listing() -> Path:
        if duplicates is not None:
            if not duplicates.is_file():
                raise UsageError(f"no list of duplicates at {duplicates}")
            return duplicates
        try:
            return _fetch(DUPLICATES, downloads, bars)
        except DownloadError as error:
            raise UsageError(
                f"DomainNet's list of duplicates cannot be had ({error}); pass --duplicates FILE, "
                "the file domainbed/misc/domain_net_duplicates.txt of a DomainBed checkout"
            ) from error

    def unpack(archives: Sequence[Path], *, strict: bool) -> str | None:
        return install(
            dataset_class,
            archives,
            data_dir,
            duplicates=listing,
            strict=strict,
            progress=lambda count: bars.images(name, count),
        )

    if from_archive:
        return unpack(from_archive, strict=False)
    failures = []
    for source in SOURCES[name]:
        announce(f"{name}: trying {source.title}")
        try:
            problem = unpack(_fetch_all(source, downloads, bars), strict=True)
        except (DownloadError, UsageError) as error:
            announce(f"{name}: {error}")
            failures.append(f"{source.title}: {error}")
            continue
        if not keep_archives:
            shutil.rmtree(downloads, ignore_errors=True)
        return problem
    raise UsageError(_by_hand(dataset_class, data_dir, failures))


def _fetch_all(source: Source, folder: Path, bars: Bars) -> list[Path]:
    return [_fetch(remote, folder, bars) for remote in source.files]


def _fetch(remote: Remote, folder: Path, bars: Bars) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / remote.name
    fetch(
        remote.url,
        path,
        md5=remote.md5,
        sha256=remote.sha256,
        num_bytes=remote.num_bytes,
        progress=lambda done, total: bars.bytes(remote.name, done, total),
    )
    return path


def _by_hand(dataset_class: type[Benchmark], data_dir: Path, failures: Sequence[str]) -> str:
    name = dataset_class.__name__
    domains = ", ".join(dataset_class.DOMAIN_FOLDERS)
    text = (
        f"{name} cannot be had from any place that is known ({'; '.join(failures)}). Get it by "
        f"hand from {BY_HAND[name]}; then run: ltdr download {name} --data_dir {data_dir} "
        "--from-archive FILE... Or put it at "
        f"{data_dir / dataset_class.FOLDER} as domain/class/image yourself, with the domain "
        f"folders {domains}"
    )
    downloads = data_dir / DOWNLOADS / name
    left = sorted(path.name for path in downloads.glob("*")) if downloads.is_dir() else []
    if left:
        text += f". What arrived is kept in {downloads} ({', '.join(left)}): running this again "
        text += "goes on there"
    return text
