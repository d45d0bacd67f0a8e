"""Checks a data set: `python -m domainbed_ext.scripts.data_check check`, `ltdr data check`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from domainbed_ext.data_findings import Findings, check
from domainbed_ext.datasets import DATASETS, DEFAULT_DATA_DIR
from domainbed_ext.datasets.base import (
    data_fingerprint,
)
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
