"""Tables with their cells as text, made from the frames of `tables.py`; what is missing is said
below each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pandas as pd

from domainbed_ext.differences import ONE_PAIR
from domainbed_ext.published import NOT_STATED
from domainbed_ext.table_checks import NEEDS_EVERY_DOMAIN
from domainbed_ext.table_names import AVERAGE
from domainbed_ext.trial_values import EMOJIDG_METRICS

_EMOJIDG_COLUMNS = ("seen", "unseen", "unseen, per class", "ceiling", "gap")
# Of those, what the table of differences in accuracy does not hold already.
_APART = {"seen": "seen", "unseen_class": "unseen, per class", "ceiling": "ceiling", "gap": "gap"}
_LAST_NUMBER = r"\[\d+\]$"


@dataclass(frozen=True)
class TextTable:
    """One table, its cells as text, `+/-` for the standard error.

    Attributes:
        labels: How many columns, from the left, are words and not numbers.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    footnotes: list[str]
    labels: int = 1


def pivot_table(frame: pd.DataFrame, columns: str, title: str) -> TextTable:
    """A row per algorithm; the values of the column `columns` are the columns."""
    names = list(frame[columns].unique())
    rows = []
    for algorithm in frame["algorithm"].unique():
        cells = frame[frame["algorithm"] == algorithm].set_index(columns)
        rows.append(
            [algorithm, *(_cell(cells.loc[name]) for name in names), _counts(cells["trials"])]
        )
    return TextTable(title, ["Algorithm", *names, "trials"], rows, _footnotes(frame, columns))


def emojidg_table(frame: pd.DataFrame, title: str) -> TextTable:
    """A row per algorithm and held-out domain; the columns are the metrics of `emojidg_frame`."""
    frame, left_out = _held_out(frame)
    rows = []
    for (algorithm, environment), cells in frame.groupby(["algorithm", "environment"], sort=False):
        by_metric = cells.set_index("metric")
        texts = [_cell(by_metric.loc[metric]) for metric in EMOJIDG_METRICS]
        rows.append([str(algorithm), str(environment), *texts, _counts(by_metric["trials"])])
    notes = _footnotes(frame, "environment") + left_out
    notes.append("ceiling: the same model trained on the test style too; gap: ceiling minus unseen")
    header = ["Algorithm", "domain", *_EMOJIDG_COLUMNS, "trials"]
    return TextTable(title, header, rows, notes, labels=2)


def costs_table(frame: pd.DataFrame, dataset: str, relative_to: str) -> TextTable:
    """A row per algorithm of one data set; what `costs_frame` says."""
    rows = [
        [
            str(row.algorithm),
            "-" if pd.isna(row.experts_per_token) else f"{row.experts_per_token:.2f}",
            "-" if pd.isna(row.relative_step_time) else f"{row.relative_step_time:.2f}",
            str(row.jobs),
        ]
        for row in frame.itertuples()
    ]
    return TextTable(
        f"{dataset}: what a step costs",
        ["Algorithm", "experts per token", f"time / {relative_to}'s", "jobs"],
        rows,
        [
            "experts per token: routed ones, a mean over training; -: a dense model",
            "times of the jobs as they ran, not side by side",
        ],
    )


def difference_tables(frame: pd.DataFrame, dataset: str, method: str) -> list[TextTable]:
    """Of the rows of one data set and method: accuracy per domain and, where concepts are kept
    apart, the other metrics.
    """
    if frame.empty:  # only the baseline has records
        return []
    apart = frame[frame["metric"].isin(_APART)]
    accuracy = frame[frame["metric"] == "accuracy"]
    minus = f"minus that of {frame['baseline'].iloc[0]}, in points, selected by {method}"
    what = "test accuracy" if apart.empty else "accuracy on unseen concepts"
    names = list(accuracy["environment"].unique())
    tables = [_difference_table(accuracy, f"{dataset}: {what} {minus}", ["algorithm"], names)]
    if apart["mean"].notna().any():
        title = f"{dataset}: seen and unseen, each {minus}"
        keys = ["algorithm", "environment"]
        apart, left_out = _held_out(apart)
        table = _difference_table(apart, title, keys, list(_APART.values()))
        tables.append(replace(table, footnotes=[*left_out, *table.footnotes]))
    return tables


def published_table(frame: pd.DataFrame, names: list[str], title: str) -> TextTable:
    """A row per published result; a cell is empty where the source has no number.

    Args:
        frame: Rows of `published_frame`, of one data set.
        names: The environments, "Avg" among them: columns as in the table of our own results.
        title: Says that these are not ours.
    """
    words = ["algorithm", "source", "year", "table", "quoted_by", "backbone", "protocol"]
    words += ["selection", "note"]
    frame = frame.sort_values(["backbone", "year"], kind="stable")
    rows, notes = [], ["published numbers are as printed; none was measured here"]
    for _, cells in frame.groupby(words, sort=False, dropna=False):
        first = cells.iloc[0]
        numbers = {row["environment"]: _published(row) for _, row in cells.iterrows()}
        labels = [first["algorithm"], _origin(first), first["backbone"], _protocol(first)]
        rows.append([*labels, *(numbers.get(name, "") for name in names)])
    for note, cells in frame[frame["note"] != ""].groupby("note", sort=False):
        notes.append(f"{', '.join(cells['source'].unique())}: {note}")
    header = ["Published", "from", "backbone", "protocol", *names]
    return TextTable(title, header, rows, notes, labels=4)


def _difference_table(
    frame: pd.DataFrame, title: str, keys: list[str], columns: list[str]
) -> TextTable:
    rows = []
    for labels, cells in frame.groupby(keys, sort=False):
        texts = [_difference(row) for _, row in cells.iterrows()]
        rows.append([*map(str, labels), *texts, _counts(cells["pairs"])])
    found = frame["mean"].notna()
    notes = _reasons(frame[~found], "environment", "X", of=frame)
    what, _, why = ONE_PAIR.partition(": ")
    alone = frame[frame["reason"] == ONE_PAIR].assign(reason=why)
    notes += _reasons(alone, "environment", what, of=frame[found])
    notes.append(
        "mean of the differences of trials on the same splits [95 % confidence interval, "
        "Student's t]"
    )
    header = ["Algorithm", "domain"][: len(keys)]
    return TextTable(title, [*header, *columns, "pairs"], rows, notes, labels=len(keys))


def _held_out(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows of domains that some run holds out, and a note about the others: of those there is
    the ceiling at most, and no mean over all domains.
    """
    tested = frame[(frame["metric"] == "seen") & frame["mean"].notna()]["environment"].unique()
    every = frame["environment"].unique()
    others = [name for name in every if name not in tested and name != AVERAGE]
    if not others or not len(tested):
        return frame, []
    note = f"left out, since no run holds them out: {', '.join(others)}"
    return frame[frame["environment"].isin([name for name in tested if name != AVERAGE])], [note]


def _published(row: pd.Series) -> str:
    spread = "" if pd.isna(row["stderr"]) else f" +/- {row['stderr']:.1f}"
    return f"{row['mean']:.1f}{spread}"


def _origin(row: pd.Series) -> str:
    year = "" if pd.isna(row["year"]) else f" {row['year']}"
    table = f", {row['table']}" if row["table"] else ""
    quoted = f", quoted by {row['quoted_by']}" if row["quoted_by"] else ""
    return f"{row['source']}{year}{table}{quoted}"


def _protocol(row: pd.Series) -> str:
    stated = row["selection"] != NOT_STATED
    return str(row["protocol"]) + ("" if stated else f", selection {NOT_STATED}")


def _cell(row: pd.Series) -> str:
    if pd.isna(row["mean"]):
        return "X"
    # One trial has no spread to speak of; writing 0.0 would look like a measurement.
    spread = "" if pd.isna(row["stderr"]) or row["trials"] < 2 else f" +/- {row['stderr']:.1f}"
    return f"{row['mean']:.1f}{spread}"


def _difference(row: pd.Series) -> str:
    if pd.isna(row["mean"]):
        return "X"
    mean, low, high = (_signed(row[name]) for name in ("mean", "ci_low", "ci_high"))
    return mean if pd.isna(row["ci_low"]) else f"{mean} [{low}, {high}]"


def _signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}"  # + 0.0, or else what rounds to zero may be "-0.0"


def _counts(counts: pd.Series) -> str:
    """The number of trials or pairs, or its range."""
    found = sorted({int(count) for count in counts if count > 0})
    if not found:
        return "0"
    return f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _footnotes(frame: pd.DataFrame, columns: str) -> list[str]:
    averaged = (columns == "environment") & (frame["environment"] == AVERAGE)
    missing = frame[(frame["reason"] != "") & ~averaged]
    return _reasons(missing, columns, "X", of=frame[~averaged])


def _reasons(missing: pd.DataFrame, columns: str, what: str, *, of: pd.DataFrame) -> list[str]:
    """One line for each reason, saying where it applies unless that is everywhere in `of`. Reasons
    that differ in a number at their end, "no run with test_envs [0]" and "... [1]", share a line.
    """
    notes = []
    missing = missing[missing["reason"] != NEEDS_EVERY_DOMAIN]
    common = missing["reason"].str.replace(_LAST_NUMBER, "", regex=True)
    for shared, rows in missing.groupby(common, sort=False):
        numbers = [reason.removeprefix(str(shared)) for reason in rows["reason"].unique()]
        at = "" if len(rows) == len(of) else f" at {_where(rows, columns, of)}"
        notes.append(f"{what}{at}: {shared}{', '.join(numbers)}")
    return notes


def _where(rows: pd.DataFrame, columns: str, of: pd.DataFrame) -> str:
    """The columns of the rows, with their algorithms where they are not those of all."""
    algorithms: dict[str, list[str]] = {}
    for algorithm, own in rows.groupby("algorithm", sort=False):
        places = ", ".join(dict.fromkeys(own[columns]))
        algorithms.setdefault(places, []).append(str(algorithm))
    if [*algorithms.values()] == [[*of["algorithm"].unique()]]:
        return next(iter(algorithms))
    return "; ".join(f"{', '.join(names)} ({places})" for places, names in algorithms.items())
