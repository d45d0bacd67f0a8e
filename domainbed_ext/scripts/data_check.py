"""Checks a data set: `python -m domainbed_ext.scripts.data_check check`, `ltdr data check`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from domainbed_ext.datasets import DATASETS, DEFAULT_DATA_DIR, get_dataset_class
from domainbed_ext.datasets.base import (
    Environment,
    FileEnvironment,
    data_fingerprint,
    read_image,
)
from domainbed_ext.datasets.image_cache_build import CHUNK, num_threads
from domainbed_ext.datasets.near_duplicates import Pair, near_duplicates, thumbnail
from domainbed_ext.errors import UsageError
from domainbed_ext.exit_status import EXIT_OK, EXIT_USAGE

EXIT_WRONG = 1
MAX_LISTED = 20
MAX_CLASSES = 100

DESCRIPTION = """\
Decode every image of a data set, count them by domain and class, compare the counts with the
published ones, and look for pictures that are in two domains at once: training on one and testing
on the other measures memory.
"""
EXAMPLES = """\
examples:
  ltdr data check PACS --data_dir /data
  ltdr data check folder:/path/to/pictures
  ltdr data check manifest:/path/to/list.csv
  ltdr data check DomainNet --data_dir /data --counts_only     seconds: no image is decoded

exit status: 0 nothing is wrong, 1 an image is unreadable or the copy is incomplete, 2 bad input or
a layout that cannot be used. Near duplicates are a warning: published data sets hold some.
"""


@dataclass(frozen=True)
class Findings:
    """What is known about a data set.

    Attributes:
        environments, class_names: What there is.
        warnings: What differs from the published copy, and pictures in two domains.
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
        thumbnails = _decode(found)
        domains = np.repeat(np.arange(len(files)), [len(env) for env in files])
        found.pairs.extend(near_duplicates(thumbnails, domains))
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


def _decode(found: Findings) -> np.ndarray:
    """Thumbnails of all images; unreadable ones are noted, and are black."""

    def one(path: str) -> tuple[np.ndarray, str | None]:
        try:
            return thumbnail(read_image(path)), None
        except OSError as error:
            reason = str(error) if Path(path).exists() else "it does not exist"
            return np.zeros((16, 16), np.uint8), reason

    console = Console(stderr=True)
    chunks = [found.paths[start : start + CHUNK] for start in range(0, len(found.paths), CHUNK)]
    if console.is_terminal:
        chunks = track(chunks, "decoding", console=console, transient=True)  # type: ignore[assignment]
    thumbnails = []
    with ThreadPoolExecutor(num_threads()) as threads:
        for chunk in chunks:
            for path, (small, reason) in zip(chunk, threads.map(one, chunk), strict=True):
                thumbnails.append(small)
                if reason is not None:
                    found.unreadable.append((path, reason))
    return np.stack(thumbnails)


def show(name: str, found: Findings, *, all_classes: bool = False) -> None:
    """Prints what was found: tables on a terminal, plain columns elsewhere."""
    console = Console(highlight=False, soft_wrap=True)
    style = box.SIMPLE if console.is_terminal else None
    counts = found.counts
    names = [environment.name for environment in found.environments]
    table = Table(box=style, pad_edge=False, title=f"{name}: images", title_justify="left")
    table.add_column("class")
    for domain in names:
        table.add_column(domain, justify="right")
    table.add_column("all", justify="right")
    order = np.arange(len(found.class_names))
    few = len(order) > MAX_CLASSES and not all_classes
    if few:
        order = np.sort(np.argsort(counts.sum(0), kind="stable")[:MAX_LISTED])
    for label in order:
        row = counts[:, label]
        table.add_row(found.class_names[int(label)], *map(_number, row), _number(row.sum()))
    table.add_section()
    table.add_row("all", *map(_number, counts.sum(1)), _number(counts.sum()), style="bold")
    console.print(table)
    if few:
        print(f"The {MAX_LISTED} smallest of {len(found.class_names)} classes; --all_classes.")
    print(f"fingerprint: {data_fingerprint(found.environments, found.class_names)}")
    for path, reason in found.unreadable:
        print(f"unreadable: {path}: {reason}")
    for pair in found.pairs[:MAX_LISTED]:
        print(
            f"alike ({found.domain_of(pair.first)}, {found.domain_of(pair.second)}; correlation "
            f"{pair.correlation:.3f}): {found.paths[pair.first]} {found.paths[pair.second]}"
        )
    if len(found.pairs) > MAX_LISTED:
        print(f"and {len(found.pairs) - MAX_LISTED:,} pairs more")
    for text in found.warnings:
        print(f"warning: {text}")
    for text in found.wrong:
        print(f"wrong: {text}")
    if not found.warnings and not found.wrong:
        print("nothing is wrong")


def _number(value: int) -> str:
    return f"{value:,}"


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("check",), help="the one thing it does")
    parser.add_argument(
        "dataset", metavar="DATASET", help=f"{', '.join(DATASETS)}, folder:PATH or manifest:FILE"
    )
    parser.add_argument("--data_dir", default=DEFAULT_DATA_DIR, help="default: %(default)s")
    parser.add_argument("--counts_only", action="store_true", help="decode no image")
    parser.add_argument(
        "--all_classes", action="store_true", help=f"show all, even if more than {MAX_CLASSES}"
    )
    return parser


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """The command line. Returns the exit status."""
    args = build_parser(prog).parse_args(argv)
    try:
        found = check(args.dataset, args.data_dir, decode=not args.counts_only)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    show(args.dataset, found, all_classes=args.all_classes)
    return EXIT_WRONG if found.wrong else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
