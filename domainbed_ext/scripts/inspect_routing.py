"""Looks at a model's routers: `python -m domainbed_ext.scripts.inspect_routing`, `ltdr inspect`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainbed_ext.datasets import DATASETS
from domainbed_ext.datasets.image_cache_flags import add_flags
from domainbed_ext.errors import UsageError
from domainbed_ext.exit_status import EXIT_OK, EXIT_USAGE
from domainbed_ext.job_files import make_folder
from domainbed_ext.train_args import TrainArgs

if TYPE_CHECKING:
    from domainbed_ext.routing_inspection import Inspection
    from gmoe_ltdr.token_stats import TokenStats

MOST_SHOWN_EXPERTS = 12

DESCRIPTION = """\
Show what the routers of a trained model do with the images of every domain of a data set, those it
was trained on and those it has never seen: which experts they choose, how sure they are, which
tokens are tail tokens. Prints a table and writes routing.json and figures.
"""
EXAMPLES = """\
examples:
  a finished run, on the held-out images of its own data set:
    ltdr inspect sweep_output/0123456789abcdef0123456789abcdef

  on other data with the same kind of images, and all of them:
    ltdr inspect RUN --dataset VLCS --data_dir data --split all

  two models in one figure of routing-probability variance:
    ltdr inspect GMOE_RUN
    ltdr inspect LTDR_RUN --compare GMOE_RUN

columns:
  load       share of each expert in the first choices
  even       entropy of these shares; 1: all experts alike, 0: one gets everything
  unsure     mean entropy of a token's distribution over the experts; 1: it knows nothing
  RPV        mean routing-probability variance; those of head and tail tokens are in routing.json
  tail       share of tail tokens
  experts    experts per token
  dead       experts that no token chose
"""


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        metavar="RUN_OR_MODEL",
        help="folder of a finished run, or one that gmoe_ltdr.save_model wrote",
    )
    parser.add_argument(
        "--dataset",
        help=f"{', '.join(DATASETS)}, folder:PATH or manifest:FILE (default: the run's)",
    )
    parser.add_argument("--data_dir", help="where the data sets are (default: the run's)")
    parser.add_argument(
        "--split",
        default="out",
        help="which images of each domain: in, out, or all (default: out, which was not trained "
        "on in any domain)",
    )
    parser.add_argument(
        "--max_images", type=int, metavar="N", help="look at the first N of each domain only"
    )
    parser.add_argument(
        "--by_class", action="store_true", help="also which experts each class chooses"
    )
    parser.add_argument(
        "--masks",
        metavar="DIR",
        help="foreground masks, domain/class/name.png like the images: whether tail tokens are "
        "foreground",
    )
    parser.add_argument(
        "--compare",
        metavar="RUN",
        nargs="+",
        default=[],
        help="models inspected before, whose RPV is drawn too",
    )
    parser.add_argument(
        "--name", default="model", help="which model of a run, such as model_step300"
    )
    parser.add_argument(
        "--output_dir", help="where figures and routing.json go (default: inspect in the model's)"
    )
    parser.add_argument(
        "--format", default="png", choices=("png", "pdf", "svg", "none"), help="of the figures"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="changes no number")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--num_workers", type=int, help="processes that decode image files")
    add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """The command line. Returns the exit status."""
    args = build_parser(prog).parse_args(argv)
    try:
        _inspect(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return EXIT_OK


def _inspect(args: argparse.Namespace) -> None:
    from domainbed_ext.routing_inspection import (
        INSPECTION_FILE,
        inspect_model,
        load_sparse_model,
        read_inspection,
    )
    from domainbed_ext.runs import choose_device

    for name in ("max_images", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)} is too small; choose 1 or more")
    others = [read_inspection(Path(run) / "inspect" / INSPECTION_FILE) for run in args.compare]
    device = choose_device(args.device)
    model = load_sparse_model(args.model, name=args.name, device=device)
    folder = Path(args.output_dir or Path(args.model) / "inspect")
    make_folder(folder)
    with _domain_progress() as progress:
        inspection = inspect_model(
            model,
            _run_args(args, model.info),
            folder=str(args.model),
            split=args.split,
            device=device,
            batch_size=args.batch_size,
            max_images=args.max_images,
            by_class=args.by_class,
            masks=args.masks,
            progress=progress,
        )
    show(inspection)
    written = [inspection.write(folder)]
    if args.format != "none":
        written += draw(inspection, folder, others=others, suffix=args.format)
    print(f"written to {folder}: {', '.join(path.name for path in written)}")


@contextlib.contextmanager
def _domain_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for the domain under way; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=None)

        def report(domain: str, done: int, total: int) -> None:
            bars.update(task, description=domain, completed=done, total=total)

        yield report


def _run_args(args: argparse.Namespace, info: dict[str, Any] | None) -> TrainArgs:
    """The arguments of the run, with what was given instead."""
    known = vars(TrainArgs())
    run = {} if info is None else {k: v for k, v in info["args"].items() if k in known}
    given = {
        name: getattr(args, name)
        for name in (
            *("dataset", "data_dir", "num_workers"),
            *("image_cache", "image_cache_dir", "image_cache_gb"),
        )
        if getattr(args, name) is not None
    }
    if info is None and args.dataset is None:
        raise UsageError("a model without its run does not say what it was trained on: --dataset")
    if args.dataset not in (None, run.get("dataset")):
        given["test_envs"] = ()  # numbers of another data set's domains
    return TrainArgs(**{**run, **given})


def show(inspection: Inspection) -> None:
    """Prints the table, and what is wrong."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from gmoe_ltdr.expert_distance import distances_between

    terminal = sys.stdout.isatty()
    console = Console(highlight=False, soft_wrap=True, width=None if terminal else 200)
    print(f"{inspection.model}: routers on {inspection.dataset}, split {inspection.split}")
    complaints = []
    for layer in inspection.total.layers:
        style = box.SIMPLE if terminal else None
        table = Table(box=style, pad_edge=False, title=f"\n{layer}", title_justify="left")
        table.add_column("domain", no_wrap=True)
        for column in ("images", "load", "even", "unsure", "RPV", "tail", "experts", "dead"):
            table.add_column(column, justify="right")
        for domain in inspection.domains:
            numbers = domain.stats.of(layer)
            name = f"{domain.name} (unseen)" if domain.trained is False else domain.name
            table.add_row(name, *_cells(numbers))
            complaint = numbers.complaint()
            if complaint:
                complaints.append(f"warning: {layer} has collapsed on {domain.name}: {complaint}")
        console.print(table)
    print()
    for layer, distances in inspection.distances.items():
        between = distances_between(distances)
        if len(between):
            print(
                f"experts of {layer}: mean distance {between.mean():.3f}, least "
                f"{between.min():.3f} (0: equal, 1.41: unrelated)"
            )
    for line in _tail_tokens(inspection) + complaints:
        print(line)


def _cells(numbers: TokenStats) -> list[str]:
    load = [f"{share:.2f}".removeprefix("0") for share in numbers.load_E[:MOST_SHOWN_EXPERTS]]
    if len(numbers.load_E) > MOST_SHOWN_EXPERTS:
        load.append("...")
    return [
        f"{numbers.num_images:,}",
        " ".join(load),
        f"{numbers.load_entropy:.2f}",
        f"{numbers.token_entropy:.2f}",
        f"{numbers.rpv:.4f}",
        f"{numbers.tail_share:.1%}",
        f"{numbers.experts_per_token:.2f}",
        " ".join(map(str, numbers.dead_experts)) or "-",
    ]


def _tail_tokens(inspection: Inspection) -> list[str]:
    """What sets tail tokens apart: their norms, and whether they are foreground."""
    lines = []
    for layer in inspection.total.layers:
        numbers = inspection.total.of(layer)
        if any(numbers.rank_norms or ()):
            norms = " / ".join(f"{norm:.3g}" for norm in numbers.rank_norms or ())
            lines.append(
                f"norms in {layer} of the 13 % of an image's tokens with the highest RPV, the "
                f"next, the next: {norms}"
            )
        if numbers.foreground_share:
            lines.append(
                f"foreground in {layer}: {numbers.foreground_share:.1%} of all tokens, "
                f"{numbers.tail_foreground_share:.1%} of the tail tokens"
            )
    return lines


def draw(
    inspection: Inspection, folder: Path, *, others: Sequence[Inspection], suffix: str
) -> list[Path]:
    """Writes the figures; without matplotlib a line says what is missing."""
    from domainbed_ext.routing_inspection import compare_names
    from gmoe_ltdr import plots

    total = inspection.total
    named = dict(zip(compare_names([inspection, *others]), [inspection, *others], strict=True))
    alike = {
        name: each.total
        for name, each in named.items()
        if each.total.num_experts(each.total.layers[0]) == total.num_experts(total.layers[0])
    }
    try:
        figures = {
            "load": plots.plot_expert_load(total),
            "rpv": plots.plot_rpv_histogram(alike, density=len(alike) > 1),
            "head_and_tail": plots.plot_head_and_tail(total),
            "domains": plots.plot_domains(
                {domain.name: domain.stats for domain in inspection.domains},
                unseen=[domain.name for domain in inspection.domains if domain.trained is False],
            ),
        }
        if len(total.groups) > 1:
            figures["classes"] = plots.plot_domains(total.by_group())
        for layer in total.layers:
            short = layer.replace("blocks.", "block").removesuffix(".mlp")
            figures[f"rpv_{short}"] = plots.plot_rpv_histogram({"": total}, layer=layer)
            figures[f"head_and_tail_{short}"] = plots.plot_head_and_tail(total, layer=layer)
    except ImportError as error:
        print(f"no figures: {error}")
        return []
    paths = []
    for name, figure in figures.items():
        path = folder / f"{name}.{suffix}"
        figure.savefig(path, dpi=150)
        paths.append(path)
    return paths


if __name__ == "__main__":
    sys.exit(main())
