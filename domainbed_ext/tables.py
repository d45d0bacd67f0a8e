"""Results of a sweep as pandas frames: who scored what where, and why a cell is empty.

    from domainbed_ext.records import load_records
    from domainbed_ext.tables import averages_frame, emojidg_frame, results_frame

    frame = results_frame(load_records("sweep"))
    frame.query("metric == 'accuracy' and environment == 'Avg'")

All frames are tidy, one number a row, accuracies in percent. The columns: `selection`, `dataset`,
`algorithm`, `environment` (a domain's name, or "Avg"), `metric` ("accuracy", in `averages_frame`
"domain_mean"), `mean`, `stderr` (over trials), `trials`, `reason` (empty, or why there is no mean).
`differences_frame`, which compares with a baseline, has a few others. `report.py` and
`renderers.py` turn them into text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from domainbed_ext.differences import differences_frame
from domainbed_ext.hparams import order_algorithms
from domainbed_ext.records import Record
from domainbed_ext.selection import Selection, SelectionMethod, selection_methods
from domainbed_ext.table_checks import NEEDS_EVERY_DOMAIN, explain_missing, refuse_mixed
from domainbed_ext.table_names import (
    AVERAGE,
    algorithm_names,
    dataset_names,
    environment_names,
)
from domainbed_ext.trial_values import (
    EMOJIDG_METRICS,
    domain_means,
    emojidg_values,
    has_unseen_concepts,
    sweep_accs,
)

__all__ = [
    "COLUMNS",
    "Cell",
    "averages_frame",
    "cell_of",
    "differences_frame",
    "emojidg_frame",
    "results_frame",
]

COLUMNS = (
    "selection",
    "dataset",
    "algorithm",
    "environment",
    "metric",
    "mean",
    "stderr",
    "trials",
    "reason",
)


@dataclass(frozen=True)
class Cell:
    """Mean and standard error over trials, in percent; or no mean and the reason."""

    mean: float | None
    stderr: float | None = None
    trials: int = 0
    reason: str = ""


def cell_of(values: Sequence[float]) -> Cell:
    """Mean and standard error of accuracies in [0, 1], summed in DomainBed's order so that the last
    digit agrees.
    """
    mean = 100 * float(np.mean(values))
    stderr = 100 * float(np.std(list(values) / np.sqrt(len(values))))
    return Cell(mean, stderr, len(values))


def results_frame(
    records: Sequence[Record],
    *,
    selection: Selection = None,
    allow_mixed: bool = False,
) -> pd.DataFrame:
    """Test accuracy per selection method, data set, algorithm and domain, and domain means.

    Args:
        records: What `load_records` returned.
        selection: One or several selection methods, by class or name; None: all three.
        allow_mixed: Average even over records from different copies of the data or different
            weights.
    """
    if not allow_mixed:
        refuse_mixed(records)
    rows: list[tuple[object, ...]] = []
    for method in selection_methods(selection):
        accs = sweep_accs(records, method)
        for dataset in dataset_names(records):
            names = environment_names(dataset, records)
            for algorithm in algorithm_names(records, dataset):
                cells = []
                for env in range(len(names)):
                    values = list(accs.get((dataset, algorithm, env), {}).values())
                    reason = (
                        "" if values else explain_missing(records, method, dataset, algorithm, env)
                    )
                    cells.append(cell_of(values) if values else Cell(None, reason=reason))
                cells.append(_average(cells))
                for name, cell in zip([*names, AVERAGE], cells, strict=True):
                    rows.append(_row(method, dataset, algorithm, name, "accuracy", cell))
    return _frame(rows)


def averages_frame(
    records: Sequence[Record],
    *,
    selection: Selection = None,
    allow_mixed: bool = False,
) -> pd.DataFrame:
    """Each algorithm's mean over a data set's domains, with its standard error over trials.

    Unlike DomainBed's "Averages" table, a trial in which a domain is missing has no mean: otherwise
    one algorithm's mean over the easy domains would stand beside another's over all of them.
    """
    if not allow_mixed:
        refuse_mixed(records)
    rows: list[tuple[object, ...]] = []
    for method in selection_methods(selection):
        accs = sweep_accs(records, method)
        datasets = dataset_names(records)
        for algorithm in order_algorithms(record["args"]["algorithm"] for record in records):
            for dataset in datasets:
                num_envs = len(environment_names(dataset, records))
                per_env = [accs.get((dataset, algorithm, env), {}) for env in range(num_envs)]
                means = list(domain_means(per_env).values())
                reason = "no trial has every domain" if any(per_env) else "no number on any domain"
                cell = cell_of(means) if means else Cell(None, reason=reason)
                rows.append(_row(method, dataset, algorithm, AVERAGE, "domain_mean", cell))
    return _frame(rows)


def emojidg_frame(
    records: Sequence[Record],
    *,
    selection: Selection = None,
    allow_mixed: bool = False,
) -> pd.DataFrame:
    """Seen, unseen, ceiling and gap per domain, for data sets with unseen concepts (EmojiDG).

    "unseen" is the headline: concepts held out of training, in the held-out style; "unseen_class"
    is its mean over classes. "seen" are trained concepts in that style. "ceiling" is the same model
    trained on all styles, on the same unseen images, and "gap" what the unknown style costs:
    ceiling minus unseen, trial by trial.
    """
    if not allow_mixed:
        refuse_mixed(records)
    rows: list[tuple[object, ...]] = []
    for method in selection_methods(selection):
        for dataset in dataset_names(records):
            own = [record for record in records if record["args"]["dataset"] == dataset]
            if not has_unseen_concepts(own):
                continue
            names = environment_names(dataset, records)
            for algorithm in algorithm_names(records, dataset):
                by_metric: defaultdict[str, list[Cell]] = defaultdict(list)
                for env, name in enumerate(names):
                    for metric, cell in _emojidg_cells(own, method, algorithm, env).items():
                        by_metric[metric].append(cell)
                        rows.append(_row(method, dataset, algorithm, name, metric, cell))
                for metric, cells in by_metric.items():
                    rows.append(_row(method, dataset, algorithm, AVERAGE, metric, _average(cells)))
    return _frame(rows)


def _emojidg_cells(
    records: Sequence[Record], method: type[SelectionMethod], algorithm: str, env: int
) -> dict[str, Cell]:
    values = emojidg_values(records, method, algorithm, env)
    missing = explain_missing(records, method, records[0]["args"]["dataset"], algorithm, env)
    reasons = dict.fromkeys(EMOJIDG_METRICS, missing)
    reasons["ceiling"] = (
        "the ceiling needs runs that train on all domains (no test environments; sweep --ceiling)"
    )
    reasons["gap"] = missing if not values["unseen"] else reasons["ceiling"]
    if values["unseen"]:
        reasons["unseen_class"] = f"the records lack env{env}_unseen_class_acc"
    return {
        metric: cell_of(list(values[metric].values()))
        if values[metric]
        else Cell(None, reason=reasons[metric])
        for metric in EMOJIDG_METRICS
    }


def _average(cells: Sequence[Cell]) -> Cell:
    means = [cell.mean for cell in cells if cell.mean is not None]
    if len(means) < len(cells) or not cells:
        return Cell(None, reason=NEEDS_EVERY_DOMAIN)
    return Cell(sum(means) / len(means), None, min(cell.trials for cell in cells))


def _row(
    method: type[SelectionMethod],
    dataset: str,
    algorithm: str,
    environment: str,
    metric: str,
    cell: Cell,
) -> tuple[object, ...]:
    return (
        method.name,
        dataset,
        algorithm,
        environment,
        metric,
        cell.mean,
        cell.stderr if cell.trials > 1 else None,  # one trial has no spread
        cell.trials,
        cell.reason,
    )


def _frame(rows: Sequence[tuple[object, ...]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return frame.astype({"mean": float, "stderr": float, "trials": int, "reason": str})
