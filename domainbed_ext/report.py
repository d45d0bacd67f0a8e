"""Which tables are printed about a sweep, and their cells as text.

`Report` holds the frames of `tables.py`; `text_tables` is what every format for reading shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pandas as pd

from domainbed_ext.records import JobCount, Record
from domainbed_ext.selection import SelectionMethod, selection_methods
from domainbed_ext.table_checks import sweep_notes
from domainbed_ext.table_names import AVERAGE
from domainbed_ext.tables import averages_frame, emojidg_frame, results_frame
from domainbed_ext.trial_values import EMOJIDG_METRICS

_EMOJIDG_COLUMNS = ("seen", "unseen", "unseen, per class", "ceiling", "gap")


@dataclass(frozen=True)
class Report:
    """Everything that is printed about a sweep."""

    total_records: int
    results: pd.DataFrame
    averages: pd.DataFrame
    emojidg: pd.DataFrame
    jobs: JobCount | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TextTable:
    """One table, its cells as text, `+/-` for the standard error."""

    title: str
    header: list[str]
    rows: list[list[str]]
    footnotes: list[str]


def make_report(
    records: Sequence[Record],
    *,
    jobs: JobCount | None = None,
    selection: Iterable[str | type[SelectionMethod]] | None = None,
    allow_mixed: bool = False,
) -> Report:
    """Selects and averages; see `tables.results_frame` for the arguments."""
    methods = selection_methods(selection)
    return Report(
        total_records=len(records),
        results=results_frame(records, selection=methods, allow_mixed=allow_mixed),
        averages=averages_frame(records, selection=methods, allow_mixed=allow_mixed),
        emojidg=emojidg_frame(records, selection=methods, allow_mixed=allow_mixed),
        jobs=jobs,
        notes=sweep_notes(records, jobs),
    )


def text_tables(report: Report) -> list[TextTable]:
    """The tables in the order they are printed: per selection method the data sets, then the
    averages.
    """
    tables = []
    for method in report.results["selection"].unique():
        results = report.results[report.results["selection"] == method]
        emojidg = report.emojidg[report.emojidg["selection"] == method]
        for dataset in results["dataset"].unique():
            own = results[results["dataset"] == dataset]
            kept_apart = emojidg[emojidg["dataset"] == dataset]
            what = "test accuracy in %" if kept_apart.empty else "accuracy on unseen concepts in %"
            tables.append(_pivot(own, "environment", f"{dataset}: {what}, selected by {method}"))
            if kept_apart.loc[kept_apart["metric"] == "unseen", "mean"].notna().any():
                tables.append(
                    _emojidg_table(kept_apart, f"{dataset}: seen and unseen, selected by {method}")
                )
        averages = report.averages[report.averages["selection"] == method]
        if averages["dataset"].nunique() > 1:
            tables.append(
                _pivot(
                    averages,
                    "dataset",
                    f"Mean over domains in %, of trials with every domain, selected by {method}",
                )
            )
    return tables


def summary(report: Report) -> str:
    """The first line: how much the tables rest on."""
    jobs = "" if report.jobs is None else f" of {report.jobs.total} jobs"
    unfinished = (
        f", {len(report.jobs.unfinished)} unfinished"
        if report.jobs and report.jobs.unfinished
        else ""
    )
    return f"{report.total_records} records{jobs}{unfinished}. Mean +/- standard error over trials."


def _pivot(frame: pd.DataFrame, columns: str, title: str) -> TextTable:
    names = list(frame[columns].unique())
    rows = []
    for algorithm in frame["algorithm"].unique():
        cells = frame[frame["algorithm"] == algorithm].set_index(columns)
        rows.append(
            [algorithm, *(_cell(cells.loc[name]) for name in names), _trials(cells["trials"])]
        )
    return TextTable(title, ["Algorithm", *names, "trials"], rows, _footnotes(frame, columns))


def _emojidg_table(frame: pd.DataFrame, title: str) -> TextTable:
    rows = []
    for (algorithm, environment), cells in frame.groupby(["algorithm", "environment"], sort=False):
        by_metric = cells.set_index("metric")
        texts = [_cell(by_metric.loc[metric]) for metric in EMOJIDG_METRICS]
        rows.append([str(algorithm), str(environment), *texts, _trials(by_metric["trials"])])
    notes = _footnotes(frame, "environment")
    notes.append("ceiling: the same model trained on the test style too; gap: ceiling minus unseen")
    return TextTable(title, ["Algorithm", "domain", *_EMOJIDG_COLUMNS, "trials"], rows, notes)


def _cell(row: pd.Series) -> str:
    if pd.isna(row["mean"]):
        return "X"
    # One trial has no spread to speak of; writing 0.0 would look like a measurement.
    spread = "" if pd.isna(row["stderr"]) or row["trials"] < 2 else f" +/- {row['stderr']:.1f}"
    return f"{row['mean']:.1f}{spread}"


def _trials(trials: pd.Series) -> str:
    counts = sorted({int(count) for count in trials if count > 0})
    return (
        "0"
        if not counts
        else f"{counts[0]}"
        if len(counts) == 1
        else f"{counts[0]} to {counts[-1]}"
    )


def _footnotes(frame: pd.DataFrame, columns: str) -> list[str]:
    """One line for each reason for an X, saying where it applies unless it applies to the whole
    table.
    """
    missing = frame[
        (frame["reason"] != "") & ~((columns == "environment") & (frame["environment"] == AVERAGE))
    ]
    places = len(frame[frame["environment"] != AVERAGE]) if columns == "environment" else len(frame)
    notes = []
    for reason, rows in missing.groupby("reason", sort=False):
        where = [
            f"{algorithm} ({', '.join(dict.fromkeys(own[columns]))})"
            for algorithm, own in rows.groupby("algorithm", sort=False)
        ]
        notes.append(
            f"X: {reason}" if len(rows) == places else f"X at {'; '.join(where)}: {reason}"
        )
    return notes
