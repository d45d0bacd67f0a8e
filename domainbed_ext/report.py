"""What is printed about a sweep: the frames of `tables.py`, and the order of the tables made of
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pandas as pd

from domainbed_ext.costs import costs_frame
from domainbed_ext.differences import backbone_notes, differences_frame
from domainbed_ext.published import NOT_STATED, published_frame
from domainbed_ext.records import JobCount, Record
from domainbed_ext.selection import Selection, selection_methods
from domainbed_ext.table_checks import sweep_notes
from domainbed_ext.table_names import dataset_names
from domainbed_ext.tables import averages_frame, emojidg_frame, results_frame
from domainbed_ext.text_tables import (
    TextTable,
    costs_table,
    difference_tables,
    emojidg_table,
    pivot_table,
    published_table,
)


@dataclass(frozen=True)
class Report:
    """Everything that is printed about a sweep."""

    total_records: int
    results: pd.DataFrame
    averages: pd.DataFrame
    emojidg: pd.DataFrame
    differences: pd.DataFrame | None = None
    published: pd.DataFrame | None = None
    costs: pd.DataFrame | None = None
    costs_relative_to: str | None = None
    jobs: JobCount | None = None
    notes: list[str] = field(default_factory=list)


def make_report(
    records: Sequence[Record],
    *,
    jobs: JobCount | None = None,
    selection: Selection = None,
    baseline: str | None = None,
    published: Iterable[str] | None = None,
    costs_relative_to: str | None = None,
    allow_mixed: bool = False,
    notes: Iterable[str] = (),
) -> Report:
    """Selects and averages.

    Args:
        records: What `load_records` returned.
        jobs: What `count_jobs` returned, for the notes.
        selection: One or several selection methods, by class or name; None: all three.
        baseline: An algorithm that the others are compared with; see `differences_frame`.
        published: Sources of `published_frame` to print beside the results; none of them: all.
        costs_relative_to: An algorithm whose time per step is 1; see `costs_frame`.
        allow_mixed: Average even over records from different copies of the data or different
            weights.
        notes: What else to say below the tables.
    """
    methods = selection_methods(selection)
    notes = [*sweep_notes(records, jobs), *notes]
    differences = None
    if baseline is not None:
        differences = differences_frame(
            records, baseline=baseline, selection=methods, allow_mixed=allow_mixed
        )
        notes += backbone_notes(records, baseline)
    beside = None
    if published is not None:
        beside = published_frame(list(published) or None)
        datasets, stated = dataset_names(records), [method.name for method in methods]
        lacking = [name for name in datasets if name not in set(beside["dataset"])]
        notes += [f"no published numbers of {', '.join(lacking)}"] if lacking else []
        beside = beside[
            beside["dataset"].isin(datasets) & beside["selection"].isin([*stated, NOT_STATED])
        ]
    return Report(
        total_records=len(records),
        results=results_frame(records, selection=methods, allow_mixed=allow_mixed),
        averages=averages_frame(records, selection=methods, allow_mixed=allow_mixed),
        emojidg=emojidg_frame(records, selection=methods, allow_mixed=allow_mixed),
        differences=differences,
        published=beside,
        costs=None
        if costs_relative_to is None
        else costs_frame(records, relative_to=costs_relative_to),
        costs_relative_to=costs_relative_to,
        jobs=jobs,
        notes=notes,
    )


def report_tables(report: Report) -> list[TextTable]:
    """The tables in the order they are printed: per selection method the data sets, each with what
    belongs to it, then the averages.
    """
    tables = []
    for method in report.results["selection"].unique():
        results = report.results[report.results["selection"] == method]
        for dataset in results["dataset"].unique():
            own = results[results["dataset"] == dataset]
            apart = _part(report.emojidg, dataset, method)
            what = "test accuracy in %" if apart.empty else "accuracy on unseen concepts in %"
            tables.append(
                pivot_table(own, "environment", f"{dataset}: {what}, selected by {method}")
            )
            if apart.loc[apart["metric"] == "unseen", "mean"].notna().any():
                title = f"{dataset}: seen and unseen, selected by {method}"
                tables.append(emojidg_table(apart, title))
            if report.differences is not None:
                differences = _part(report.differences, dataset, method)
                tables += difference_tables(differences, dataset, method)
            if report.published is not None:
                tables += _published_tables(report.published, own, dataset, method)
        averages = report.averages[report.averages["selection"] == method]
        if averages["dataset"].nunique() > 1:
            title = f"Mean over domains in %, of trials with every domain, selected by {method}"
            tables.append(pivot_table(averages, "dataset", title))
    if report.costs is not None and report.costs_relative_to is not None:
        for dataset, costs in report.costs.groupby("dataset", sort=False):
            tables.append(costs_table(costs, str(dataset), report.costs_relative_to))
    return tables


def report_rows(report: Report) -> pd.DataFrame:
    """One number a row, for programs.

    Differences and published numbers have metrics of their own ("accuracy_difference" and so on,
    "published_accuracy") and, only where they were asked for, columns of their own.
    """
    frames = [report.results, report.averages, report.emojidg]
    if report.differences is not None:
        differences = report.differences.rename(columns={"pairs": "trials"})
        frames.append(differences.assign(metric=differences["metric"] + "_difference"))
    if report.published is not None:
        frames.append(report.published.assign(metric="published_accuracy", reason=""))
    if report.costs is not None:
        melted = report.costs.melt(
            ["dataset", "algorithm"],
            ["experts_per_token", "relative_step_time"],
            var_name="metric",
            value_name="mean",
        )
        frames.append(melted.assign(reason=""))
    rows = pd.concat([frame for frame in frames if not frame.empty], ignore_index=True)
    return rows.astype({"trials": "Int64"})


def report_summary(report: Report) -> str:
    """The first line: how much the tables rest on."""
    jobs = "" if report.jobs is None else f" of {report.jobs.total} jobs"
    unfinished = (
        f", {len(report.jobs.unfinished)} unfinished"
        if report.jobs and report.jobs.unfinished
        else ""
    )
    return f"{report.total_records} records{jobs}{unfinished}. Mean +/- standard error over trials."


def _published_tables(
    published: pd.DataFrame, results: pd.DataFrame, dataset: str, method: str
) -> list[TextTable]:
    own = published[
        (published["dataset"] == dataset) & published["selection"].isin([method, NOT_STATED])
    ]
    if own.empty:
        return []
    title = f"{dataset}: published test accuracy in %, not ours, selected by {method}"
    return [published_table(own, list(results["environment"].unique()), title)]


def _part(frame: pd.DataFrame, dataset: str, method: str) -> pd.DataFrame:
    return frame[(frame["dataset"] == dataset) & (frame["selection"] == method)]
