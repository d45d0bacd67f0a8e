"""A sweep's tables as terminal output, text, Markdown, LaTeX, HTML, and for programs CSV and JSON.

`Report` holds the frames of `tables.py`; each format is one function from a report to text.
DomainBed's own form is in `domainbed_tables.py`.
"""

from __future__ import annotations

import html
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO

import pandas as pd

from domainbed_ext.records import JobCount, Record
from domainbed_ext.selection import SelectionMethod
from domainbed_ext.table_checks import sweep_notes
from domainbed_ext.tables import (
    AVERAGE,
    EMOJIDG_METRICS,
    averages_frame,
    emojidg_frame,
    results_frame,
    selection_methods,
)

_EMOJIDG_COLUMNS = ("seen", "unseen", "unseen, per class", "ceiling", "gap")
_LATEX_ESCAPES = {c: "\\" + c for c in "%_&#{}$"} | {
    "\\": r"\textbackslash{}",
    "~": r"\~{}",
    "^": r"\^{}",
}


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


def render_text(report: Report) -> str:
    """Plain ASCII text."""
    stream = io.StringIO()
    print_rich(report, stream, plain=True)
    return stream.getvalue()


def print_rich(report: Report, stream: IO[str], *, plain: bool = False) -> None:
    """Prints to a terminal, with colours where the stream has them; `plain` means ASCII and no
    wrapping.
    """
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    console = Console(
        file=stream,
        width=1000 if plain else None,
        color_system=None if plain else "auto",
        highlight=False,
    )

    def show(text: str, style: str = "") -> None:
        line = Text(text if plain else text.replace("+/-", "±"), style=style)
        console.print(line, soft_wrap=True)

    show(_summary(report))
    for table in text_tables(report):
        show("")
        show(table.title, "bold")
        grid = Table(box=box.ASCII_DOUBLE_HEAD if plain else box.SIMPLE_HEAD)
        for index, name in enumerate(table.header):
            last = name == AVERAGE
            grid.add_column(
                Text(name if plain else name.replace(", ", ",\n")),
                justify="left" if index == 0 else "right",
                style="bold" if last else "",
                no_wrap=True,
            )
        for row in table.rows:
            grid.add_row(*(Text(cell if plain else cell.replace("+/-", "±")) for cell in row))
        # a table wider than the terminal wraps; it never loses the ends of its numbers
        wanted = Measurement.get(console, console.options.update(max_width=10_000), grid).maximum
        console.print(grid, width=max(console.width, wanted), crop=False)
        for note in table.footnotes:
            show(f"  {note}", "dim")
    if report.notes:
        show("")
    for note in report.notes:
        show(f"Note: {note}.", "yellow")


def render_markdown(report: Report) -> str:
    """GitHub's Markdown."""

    def escape(text: str) -> str:
        return text.replace("|", r"\|").replace("+/-", "±")

    lines = [_summary(report)]
    for table in text_tables(report):
        lines += ["", f"### {escape(table.title)}", ""]
        lines += ["| " + " | ".join(map(escape, table.header)) + " |"]
        lines += ["|" + "|".join([":---", *["---:"] * (len(table.header) - 1)]) + "|"]
        lines += ["| " + " | ".join(map(escape, row)) + " |" for row in table.rows]
        lines += ["", *(f"- {escape(note)}" for note in table.footnotes)]
    lines += ["", *(f"> {escape(note)}." for note in report.notes)] if report.notes else []
    return "\n".join(lines).rstrip() + "\n"


def render_latex(report: Report) -> str:
    """Tables to \\input into a paper that loads booktabs."""

    def escape(text: str) -> str:
        return "".join(_LATEX_ESCAPES.get(c, c) for c in text).replace("+/-", r"$\pm$")

    lines = [f"% {_summary(report)}", r"% needs \usepackage{booktabs}"]
    for table in text_tables(report):
        lines += [
            "",
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{escape('. '.join([table.title, *table.footnotes]))}.}}",
            rf"  \begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
            r"    \toprule",
            *(f"    {' & '.join(map(escape, row))} \\\\" for row in [table.header]),
            r"    \midrule",
            *(f"    {' & '.join(map(escape, row))} \\\\" for row in table.rows),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
        ]
    lines += [f"% Note: {note}." for note in report.notes]
    return "\n".join(lines) + "\n"


def render_html(report: Report) -> str:
    """One page that needs nothing else."""

    def escape(text: str) -> str:
        return html.escape(text.replace("+/-", "±"))

    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    style = (
        "body{font-family:sans-serif;margin:2em}table{border-collapse:collapse}"
        "th,td{padding:.3em .8em;text-align:right;border-bottom:1px solid #ccc}"
        "th:first-child,td:first-child{text-align:left}li{color:#555}"
    )
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><title>Results</title>',
    ]
    lines += [f"<style>{style}</style></head><body>", f"<p>{escape(_summary(report))}</p>"]
    for table in text_tables(report):
        lines += [
            f"<h3>{escape(table.title)}</h3>",
            "<table><thead>",
            row(table.header, "th"),
            "</thead><tbody>",
        ]
        lines += [row(cells, "td") for cells in table.rows]
        lines += [
            "</tbody></table>",
            "<ul>",
            *(f"<li>{escape(note)}</li>" for note in table.footnotes),
            "</ul>",
        ]
    lines += [f"<p>Note: {escape(note)}.</p>" for note in report.notes]
    return "\n".join([*lines, "</body></html>"]) + "\n"


def render_csv(report: Report) -> str:
    """One number a row; the columns are those of the frames."""
    return str(_all_rows(report).round(6).to_csv(index=False, lineterminator="\n"))


def render_json(report: Report) -> str:
    """One object: counts, notes, and the rows of the CSV, null where there is no number."""
    rows = json.loads(_all_rows(report).round(6).to_json(orient="records"))
    jobs = report.jobs and asdict(report.jobs)
    content = {
        "total_records": report.total_records,
        "jobs": jobs,
        "notes": report.notes,
        "rows": rows,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


RENDERERS: dict[str, tuple[Callable[[Report], str], str]] = {
    "rich": (render_text, "txt"),
    "markdown": (render_markdown, "md"),
    "latex": (render_latex, "tex"),
    "csv": (render_csv, "csv"),
    "json": (render_json, "json"),
    "html": (render_html, "html"),
}


def _all_rows(report: Report) -> pd.DataFrame:
    frames = [report.results, report.averages, report.emojidg]
    return pd.concat([frame for frame in frames if not frame.empty], ignore_index=True)


def _summary(report: Report) -> str:
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
