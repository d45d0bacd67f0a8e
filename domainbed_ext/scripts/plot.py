"""Learning curves of runs and sweeps: `python -m domainbed_ext.scripts.plot`, `ltdr plot`."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from domainbed_ext.curve_figure import FIGURE_ENDINGS, curve_figure, save_figure
from domainbed_ext.errors import UsageError
from domainbed_ext.hparams import order_algorithms
from domainbed_ext.job_copies import drop_copies
from domainbed_ext.learning_curves import chosen_draws, curves_frame
from domainbed_ext.records import Record, load_jobs
from domainbed_ext.selection import SPLITS
from domainbed_ext.table_names import dataset_names, environment_names

DESCRIPTION = """\
Draw how runs learn: accuracies and losses over training steps, a row of panels per data set and
test domain, a colour per algorithm. A line is the mean over trials, a band goes from the lowest to
the highest. Of several hyper-parameter draws, each trial shows the one that training-domain
validation selects.
"""
EXAMPLES = """\
examples:
  ltdr plot sweeps/pacs                                        # sweeps/pacs/learning_curves.png
  ltdr plot runs/first runs/second --output curves.pdf         # the ending chooses the format
  ltdr plot sweeps/pacs --test_envs 3 --metric test loss --output sketch.svg
  ltdr plot sweeps/before sweeps/after --algorithms LTDR       # told apart by their folders

metrics: in and out (mean accuracy on the training domains: trained on, held out), test (on the
test domain, as in tables), and any number of a record: loss, balance_loss, lr, step_time, ...
"""
DEFAULT_METRICS = (*SPLITS, "loss")


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line's flags."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="RUN_OR_SWEEP",
        help="the --output_dir of a train run or of a sweep",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help=f"ends in {', '.join(FIGURE_ENDINGS)} (default: learning_curves.png in the first "
        "folder)",
    )
    parser.add_argument(
        "--metric",
        nargs="+",
        default=list(DEFAULT_METRICS),
        metavar="NAME",
        help=f"one panel each (default: {' '.join(DEFAULT_METRICS)})",
    )
    parser.add_argument(
        "--test_envs",
        type=int,
        nargs="+",
        metavar="ENV",
        help="only runs that test on these domains",
    )
    parser.add_argument("--datasets", nargs="+", metavar="DATASET", help="only these data sets")
    parser.add_argument("--algorithms", nargs="+", metavar="ALGORITHM", help="only these")
    parser.add_argument(
        "--hparams_seed", type=int, metavar="N", help="this draw instead of the selected one"
    )
    return parser


def plot(args: argparse.Namespace) -> Path:
    """Draws what the parsed flags ask for. Returns the file written."""
    path = Path(args.output or Path(args.folders[0]) / "learning_curves.png")
    if path.suffix not in FIGURE_ENDINGS:
        raise UsageError(
            f"--output {path} does not say which kind of file; end it in "
            f"{', '.join(FIGURE_ENDINGS)}"
        )
    records = load_runs(args.folders)
    curves = _filtered(curves_frame(records), args)
    _check_metrics(args.metric, curves)
    names = {name: environment_names(name, records) for name in dataset_names(records)}
    figure = curve_figure(
        curves,
        metrics=args.metric,
        domain_names=names,
        algorithms=order_algorithms(curves["algorithm"]),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_figure(figure, path)
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror or error}; give another --output"
        ) from None
    return path


def load_runs(folders: Sequence[str]) -> list[Record]:
    """The records of all folders, copies left out.

    Where two folders hold the same job of an algorithm, that algorithm is renamed in each, to
    "LTDR (folder)", so that both are shown.
    """
    by_folder: dict[str, list[Record]] = {}
    seen: set[Path] = set()
    for folder in dict.fromkeys(folders):
        jobs = {job: own for job, own in load_jobs(folder).items() if job.resolve() not in seen}
        seen |= {job.resolve() for job in jobs}
        by_folder[folder] = drop_copies(jobs)[0]
    holders: defaultdict[tuple[object, ...], set[str]] = defaultdict(set)
    for folder, records in by_folder.items():
        for record in records:
            args = record["args"]
            seeds = args["hparams_seed"], args["trial_seed"]
            job = (args["algorithm"], args["dataset"], tuple(args["test_envs"]), *seeds)
            holders[job].add(folder)
    shared = {job[0] for job, where in holders.items() if len(where) > 1}
    found = []
    for folder, records in by_folder.items():
        for record in records:
            name = record["args"]["algorithm"]
            label = f"{name} ({folder})" if name in shared else name
            found.append({**record, "args": {**record["args"], "algorithm": label}})
    if not found:
        raise UsageError(
            f"no record in {', '.join(folders)}; give the --output_dir of a sweep or of a train "
            "run that has evaluated once"
        )
    return found


def _filtered(curves: pd.DataFrame, args: argparse.Namespace) -> pd.DataFrame:
    """The curves that the flags ask for; a UsageError says what there is when none is left."""
    for flag, column in [("datasets", "dataset"), ("algorithms", "algorithm")]:
        wanted = getattr(args, flag)
        if wanted is not None:
            # "LTDR (folder)" is LTDR
            names = curves[column].map(lambda name: name.partition(" (")[0])
            kept = curves[names.isin(wanted) | curves[column].isin(wanted)]
            curves = _some_of(curves, kept, column, f"--{flag} {' '.join(wanted)}")
    if args.test_envs is not None:
        wanted = set(args.test_envs)
        kept = curves[curves["test_envs"].map(lambda envs: bool(envs) and wanted >= set(envs))]
        flag = f"--test_envs {' '.join(map(str, args.test_envs))}"
        curves = _some_of(curves, kept, "test_envs", flag)
    # Runs with two test domains are there for leave-one-domain-out; each says less about how an
    # algorithm learns than those with one.
    single = curves[curves["test_envs"].map(len) <= 1]
    curves = curves if single.empty else single
    if args.hparams_seed is None:
        return chosen_draws(curves)
    kept = curves[curves["hparams_seed"] == args.hparams_seed]
    return _some_of(curves, kept, "hparams_seed", f"--hparams_seed {args.hparams_seed}")


def _some_of(curves: pd.DataFrame, kept: pd.DataFrame, column: str, flag: str) -> pd.DataFrame:
    if kept.empty:
        there = ", ".join(
            " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
            for value in sorted(curves[column].unique())
        )
        raise UsageError(f"{flag} leaves no run to draw; there are {there}")
    return kept


def _check_metrics(metrics: Sequence[str], curves: pd.DataFrame) -> None:
    there = list(dict.fromkeys([*SPLITS, *sorted(curves["metric"].unique())]))
    for metric in metrics:
        if metric not in there:
            raise UsageError(f"--metric {metric} is in no record; choose among {', '.join(there)}")


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """The command line. Returns the exit status."""
    args = build_parser(prog).parse_args(argv)
    try:
        print(plot(args))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
