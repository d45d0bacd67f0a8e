"""Tables of a sweep: `python -m domainbed_ext.scripts.collect_results`, `ltdr collect`.

Prints the tables and writes the same to `SWEEP/results.<txt|tex|md|csv|json|html>`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from domainbed_ext.domainbed_tables import render_domainbed
from domainbed_ext.errors import UsageError
from domainbed_ext.job_copies import drop_copies
from domainbed_ext.published import published_sources
from domainbed_ext.records import RECORDS_FILE, JobCount, Record, count_jobs, load_jobs
from domainbed_ext.renderers import RENDERERS, print_rich
from domainbed_ext.report import make_report
from domainbed_ext.selection import SELECTION_METHODS, selection_methods
from domainbed_ext.table_checks import refuse_mixed, sweep_notes

DESCRIPTION = """\
Print the tables of a sweep: accuracy per test domain and on average, mean and standard error over
trials, for each of DomainBed's three ways to select a model. What is missing is explained below
each table. The same goes to SWEEP/results.<txt|tex|md|csv|json|html>.
"""
EXAMPLES = """\
examples:
  ltdr collect --input_dir sweeps/pacs
  ltdr collect --input_dir sweeps/pacs --format markdown --selection training-domain
  ltdr collect --input_dir sweeps/pacs --baseline ERM_ViT      # what each gains, trial by trial
  ltdr collect --input_dir sweeps/pacs --published gmoe ltdr   # with what these papers report
  ltdr collect --input_dir sweeps/pacs --format domainbed      # DomainBed's own text
"""


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line's flags."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input_dir", required=True, help="the folder that the sweep wrote to")
    parser.add_argument(
        "--latex", action="store_true", help="DomainBed's LaTeX document, byte for byte"
    )
    parser.add_argument(
        "--format",
        choices=["rich", "domainbed", *(name for name in RENDERERS if name != "rich")],
        help="default: rich on a terminal, else the same as plain text; "
        "domainbed: DomainBed's text, byte for byte",
    )
    parser.add_argument(
        "--selection",
        nargs="+",
        metavar="METHOD",
        help="which selection methods to show, of "
        + ", ".join(method.short_name for method in SELECTION_METHODS)
        + " (default: all)",
    )
    parser.add_argument(
        "--baseline",
        metavar="ALGORITHM",
        help="add tables of each other algorithm's difference to this one, paired by trial seed, "
        "with 95 %% confidence intervals",
    )
    parser.add_argument(
        "--published",
        nargs="*",
        metavar="SOURCE",
        help="add what papers have published on the same data sets, below our results and never "
        f"among them (default: all of {', '.join(published_sources())})",
    )
    parser.add_argument(
        "--costs",
        metavar="ALGORITHM",
        help="add a table of what a step costs: experts per token, and time over that of this "
        "algorithm",
    )
    parser.add_argument(
        "--allow-mixed",
        "--allow_mixed",
        action="store_true",
        help="average even over records of different data copies, weights or settings",
    )
    return parser


@dataclass(frozen=True)
class Sweep:
    """What a sweep's folder holds.

    Attributes:
        records: All of them, as DomainBed would take them.
        once: Without those of folders that are copies of another.
        jobs: How many jobs there are.
        copies: A sentence for each of those.
    """

    records: list[Record]
    once: list[Record]
    jobs: JobCount
    copies: list[str] = field(default_factory=list)


def load_sweep(folder: str, *, allow_mixed: bool = False) -> Sweep:
    """The records of a sweep's folder; a UsageError when there is nothing to show, or when it
    holds different runs of one job and `allow_mixed` does not say that this is meant.
    """
    by_job, jobs = load_jobs(folder), count_jobs(folder)
    records = [record for own in by_job.values() for record in own]
    if not jobs.total:
        deeper = next(Path(folder).glob(f"*/*/{RECORDS_FILE}"), None)
        hint = "" if deeper is None else f"; {deeper.parent.parent} does"
        raise UsageError(
            f"{folder} holds no jobs (no <job>/results.jsonl){hint}; "
            "give the --output_dir of a sweep or of a train run"
        )
    if not records:
        raise UsageError(
            f"{folder} holds {jobs.total} jobs but no record yet, "
            f"{len(jobs.unfinished)} of them unfinished; "
            "if none is running, look into their err.txt"
        )
    if allow_mixed:
        return Sweep(records, records, jobs)
    refuse_mixed(records)
    once, copies = drop_copies(by_job)
    return Sweep(records, once, jobs, copies)


def collect(args: argparse.Namespace) -> None:
    """Prints and writes what the parsed flags ask for."""
    if args.latex and args.format not in (None, "domainbed"):
        raise UsageError(
            f"--latex is DomainBed's document and excludes --format {args.format}; "
            "drop one of them (--format latex prints tables to include in a paper)"
        )
    as_domainbed = args.latex or args.format == "domainbed"
    for name in ("baseline", "published", "costs"):
        if as_domainbed and getattr(args, name) is not None:
            raise UsageError(
                f"--{name} adds tables that DomainBed's text does not have; choose another --format"
            )
    methods = selection_methods(args.selection)
    sweep = load_sweep(args.input_dir, allow_mixed=args.allow_mixed)
    if as_domainbed:
        text = render_domainbed(sweep.records, methods=methods, latex=args.latex)
        extension = "tex" if args.latex else "txt"
        sys.stdout.write(text)
        # Kept off stdout, which has to be DomainBed's to the byte.
        copies = [f"{note}; DomainBed's text takes both" for note in sweep.copies]
        for note in [*sweep_notes(sweep.records, sweep.jobs), *copies]:
            print(f"note: {note}", file=sys.stderr)
    else:
        report = make_report(
            sweep.once,
            jobs=sweep.jobs,
            selection=methods,
            baseline=args.baseline,
            published=args.published,
            costs_relative_to=args.costs,
            allow_mixed=args.allow_mixed,
            notes=[f"{note} and was left out" for note in sweep.copies],
        )
        render, extension = RENDERERS[args.format or "rich"]
        text = render(report)
        if args.format in (None, "rich") and sys.stdout.isatty():
            print_rich(report, sys.stdout)
        else:
            sys.stdout.write(text)
    _write(Path(args.input_dir) / f"results.{extension}", text)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        print(f"warning: could not write {path} ({error.strerror or error})", file=sys.stderr)


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """The command line. Returns the exit status."""
    args = build_parser(prog).parse_args(argv)
    try:
        collect(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
