"""The hyper-parameter draws of a sweep, the best first: `ltdr top`.

    python -m domainbed_ext.scripts.list_top_hparams --input_dir SWEEP --dataset PACS \\
        --algorithm LTDR --test_env 0
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from domainbed_ext.errors import UsageError
from domainbed_ext.records import Record, RecordGroup, group_records
from domainbed_ext.scripts.collect_results import load_sweep
from domainbed_ext.selection import SELECTION_METHODS, Accuracy
from domainbed_ext.table_checks import explain_missing


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line's flags: DomainBed's, and two of ours."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Rank the hyper-parameter draws of a sweep, for each way to select a model.",
        epilog="example: ltdr top --input_dir sweeps/pacs --dataset PACS --algorithm LTDR "
        "--test_env 0 --top 3",
    )
    parser.add_argument("--input_dir", required=True, help="the folder that the sweep wrote to")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--algorithm", required=True)
    parser.add_argument("--test_env", type=int, required=True, help="index of the test environment")
    parser.add_argument("--top", type=int, help="show only the best so many draws of each trial")
    parser.add_argument(
        "--format", choices=["rich", "text"], help="default: rich on a terminal, else text"
    )
    return parser


def find_groups(
    records: Sequence[Record], *, dataset: str, algorithm: str, test_env: int
) -> list[RecordGroup]:
    """The groups of records asked for, one per trial; a UsageError that lists what is there when
    none matches.
    """
    groups = group_records(records)
    wanted = [
        g for g in groups if (g.dataset, g.algorithm, g.test_env) == (dataset, algorithm, test_env)
    ]
    if not wanted:
        there: dict[tuple[str, str], set[int]] = {}
        for group in groups:
            there.setdefault((group.algorithm, group.dataset), set()).add(group.test_env)
        known = "; ".join(
            f"{a} on {d} with test_env {sorted(envs)}" for (a, d), envs in there.items()
        )
        raise UsageError(
            f"no records of {algorithm} on {dataset} with test_env {test_env}; there are {known}"
        )
    return sorted(wanted, key=lambda group: group.trial_seed)


def list_top_hparams(args: argparse.Namespace) -> None:
    """Prints what the parsed flags ask for."""
    if args.top is not None and args.top < 1:
        raise UsageError(f"--top {args.top} shows nothing; give at least 1")
    records = load_sweep(args.input_dir, allow_mixed=True).records
    groups = find_groups(
        records, dataset=args.dataset, algorithm=args.algorithm, test_env=args.test_env
    )
    rich = args.format == "rich" or (args.format is None and sys.stdout.isatty())
    if not rich:
        print(f"Total records: {len(records)}")
    for method in SELECTION_METHODS:
        print(f"\nModel selection: {method.name}" if rich else f"Model selection: {method.name}")
        for group in groups:
            runs = method.ranked_runs(group.records)[: args.top]
            if not runs:
                reason = explain_missing(
                    records, method, args.dataset, args.algorithm, args.test_env
                )
                print(f"trial_seed {group.trial_seed}: nothing to rank, {reason}")
            elif rich:
                _print_rich(group.trial_seed, runs)
            else:
                _print_text(group.trial_seed, runs)


def _differing(runs: Sequence[tuple[Accuracy, list[Record]]]) -> list[str]:
    """Names of the hyper-parameters whose value is not the same in all draws."""
    draws = [records[0].get("hparams", {}) for _, records in runs]
    names = sorted(set().union(*draws))
    return [name for name in names if len({repr(draw.get(name)) for draw in draws}) > 1]


def _output_dirs(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(str(record["args"].get("output_dir", "?")) for record in records))


def _print_text(trial_seed: int, runs: Sequence[tuple[Accuracy, list[Record]]]) -> None:
    print(f"trial_seed: {trial_seed}")
    for accuracy, records in runs:
        print(
            f"\tval_acc: {accuracy.val:.6g}, test_acc: {accuracy.test:.6g}, "
            f"step: {accuracy.record['step']}"
        )
        print("\t\thparams:")
        for name, value in sorted(records[0].get("hparams", {}).items()):
            print(f"\t\t\t{name}: {value}")
        print("\t\toutput_dirs:")
        for output_dir in _output_dirs(records):
            print(f"\t\t\t{output_dir}")


def _print_rich(trial_seed: int, runs: Sequence[tuple[Accuracy, list[Record]]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def shown(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    def pairs(hparams: Mapping[str, Any], names: Sequence[str]) -> Text:
        return Text(", ".join(f"{name}={shown(hparams.get(name))}" for name in names))

    console = Console(highlight=False)
    differing = _differing(runs)
    table = Table(box=box.SIMPLE_HEAD)
    for column in ["val %", "test %", "step", "seed"]:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("differs in")
    for accuracy, records in runs:
        table.add_row(
            f"{100 * accuracy.val:.1f}",
            f"{100 * accuracy.test:.1f}",
            str(accuracy.record["step"]),
            str(records[0]["args"]["hparams_seed"]),
            pairs(records[0].get("hparams", {}), differing),
        )
    console.print(Text(f"Trial {trial_seed}", style="bold"))
    console.print(table)
    best, best_records = runs[0]
    hparams = best_records[0].get("hparams", {})
    same = [name for name in sorted(hparams) if name not in differing]
    console.print(Text("The same in all: ", style="dim"), pairs(hparams, same), sep="")
    folder = best.record["args"].get("output_dir", "?")
    console.print(Text(f"Best in: {folder}", style="dim"), soft_wrap=True)


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """The command line. Returns the exit status."""
    args = build_parser(prog).parse_args(argv)
    try:
        list_top_hparams(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
