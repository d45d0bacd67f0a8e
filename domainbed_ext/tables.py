"""Results of a sweep as pandas frames: who scored what where, and why a cell is empty.

    from domainbed_ext.records import load_records
    from domainbed_ext.tables import averages_frame, emojidg_frame, results_frame

    frame = results_frame(load_records("sweep"))
    frame.query("metric == 'accuracy' and environment == 'Avg'")

All frames are tidy, one number a row, accuracies in percent. The columns: `selection`, `dataset`,
`algorithm`, `environment` (a domain's name, or "Avg"), `metric` ("accuracy", in `averages_frame`
"domain_mean"), `mean`, `stderr` (over trials), `trials`, `reason` (empty, or why there is no mean).
`renderers.py` turns them into text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from domainbed_ext.errors import UsageError
from domainbed_ext.hparams import order_algorithms
from domainbed_ext.records import Record, group_records
from domainbed_ext.selection import (
    SELECTION_METHODS,
    SelectionMethod,
    get_selection_method,
    num_environments,
)
from domainbed_ext.table_checks import explain_missing, refuse_mixed

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
EMOJIDG_METRICS = ("seen", "unseen", "unseen_class", "ceiling", "gap")
AVERAGE = "Avg"

_SPAWRIOUS = ("Test", "SC_group_1", "SC_group_2")
# DomainBed's data sets in its order, with the short names its tables give the environments.
UPSTREAM_ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "Debug28": ("0", "1", "2"),
    "Debug224": ("0", "1", "2"),
    "ColoredMNIST": ("+90%", "+80%", "-90%"),
    "RotatedMNIST": ("0", "15", "30", "45", "60", "75"),
    "VLCS": ("C", "L", "S", "V"),
    "PACS": ("A", "C", "P", "S"),
    "OfficeHome": ("A", "C", "P", "R"),
    "TerraIncognita": ("L100", "L38", "L43", "L46"),
    "DomainNet": ("clip", "info", "paint", "quick", "real", "sketch"),
    "SVIRO": ("aclass", "escape", "hilux", "i3", "lexus", "tesla", "tiguan", "tucson", "x5", "zoe"),
    "WILDSCamelyon": tuple(f"hospital_{i}" for i in range(5)),
    "WILDSFMoW": tuple(f"region_{i}" for i in range(6)),
    **{
        f"Spawrious{kind}_{level}": _SPAWRIOUS
        for kind in ("O2O", "M2M")
        for level in ("easy", "medium", "hard")
    },
}
DATASET_ORDER: tuple[str, ...] = (
    *UPSTREAM_ENVIRONMENTS,
    "RotatedDigits",
    "ColoredDigits",
    "EmojiDG",
    "EmojiDG6",
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
    selection: str | type[SelectionMethod] | Iterable[str | type[SelectionMethod]] | None = None,
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
    selection: str | type[SelectionMethod] | Iterable[str | type[SelectionMethod]] | None = None,
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
                trials = sorted(set.intersection(*(set(env) for env in per_env))) if per_env else []
                means = [float(np.mean([env[trial] for env in per_env])) for trial in trials]
                reason = "no trial has every domain" if any(per_env) else "no number on any domain"
                cell = cell_of(means) if means else Cell(None, reason=reason)
                rows.append(_row(method, dataset, algorithm, AVERAGE, "domain_mean", cell))
    return _frame(rows)


def emojidg_frame(
    records: Sequence[Record],
    *,
    selection: str | type[SelectionMethod] | Iterable[str | type[SelectionMethod]] | None = None,
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
            if not any(key.endswith("_unseen_acc") for record in own for key in record):
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


def sweep_accs(
    records: Sequence[Record], method: type[SelectionMethod]
) -> dict[tuple[str, str, int], dict[int, float]]:
    """Test accuracy per trial seed, for each (data set, algorithm, test environment) that the
    method can judge.
    """
    accs: defaultdict[tuple[str, str, int], dict[int, float]] = defaultdict(dict)
    for group in group_records(records):
        acc = method.sweep_acc(group.records)
        if acc is not None:
            accs[group.dataset, group.algorithm, group.test_env][group.trial_seed] = acc
    return dict(accs)


def selection_methods(
    selection: str | type[SelectionMethod] | Iterable[str | type[SelectionMethod]] | None,
) -> list[type[SelectionMethod]]:
    """The selection methods meant by one or several classes or names, or all of them for None."""
    if selection is None:
        return list(SELECTION_METHODS)
    several = [selection] if isinstance(selection, (str, type)) else list(selection)
    return [
        get_selection_method(method) if isinstance(method, str) else method for method in several
    ]


def dataset_names(records: Sequence[Record]) -> list[str]:
    """The data sets of the records, DomainBed's first and in its order, then ours, then folders and
    manifests.
    """
    present = sorted({record["args"]["dataset"] for record in records})
    return [name for name in DATASET_ORDER if name in present] + [
        n for n in present if n not in DATASET_ORDER
    ]


def algorithm_names(records: Sequence[Record], dataset: str) -> list[str]:
    """The algorithms that have records on a data set, in the order of table rows."""
    return order_algorithms(
        r["args"]["algorithm"] for r in records if r["args"]["dataset"] == dataset
    )


def environment_names(dataset: str, records: Sequence[Record]) -> list[str]:
    """The names of a data set's environments: DomainBed's short ones, those in the records, or the
    data set's own.
    """
    if dataset in UPSTREAM_ENVIRONMENTS:
        return list(UPSTREAM_ENVIRONMENTS[dataset])
    own = [record for record in records if record["args"]["dataset"] == dataset]
    recorded = {
        tuple(names) for r in own if (names := (r.get("provenance") or {}).get("environments"))
    }
    if len(recorded) > 1:
        shown = " and ".join(str(list(names)) for names in sorted(recorded)[:2])
        raise UsageError(
            f"records of {dataset} disagree on its environments: {shown}; "
            "collect them from separate folders"
        )
    if recorded:
        return [str(name) for name in recorded.pop()]
    known = _registered_environments(dataset)
    return known or [
        f"env{env}" for env in range(max((num_environments([r]) for r in own), default=0))
    ]


def _emojidg_cells(
    records: Sequence[Record], method: type[SelectionMethod], algorithm: str, env: int
) -> dict[str, Cell]:
    own = [record for record in records if record["args"]["algorithm"] == algorithm]
    values: defaultdict[str, dict[int, float]] = defaultdict(dict)
    for trial in dict.fromkeys(record["args"]["trial_seed"] for record in own):
        runs = [record for record in own if record["args"]["trial_seed"] == trial]
        best = method.sweep_best([record for record in runs if env in record["args"]["test_envs"]])
        if best is not None:
            for metric, key in [
                ("seen", "in_acc"),
                ("unseen", "unseen_acc"),
                ("unseen_class", "unseen_class_acc"),
            ]:
                if (full := f"env{env}_{key}") in best.record:
                    values[metric][trial] = best.record[full]
        ceiling = method.ceiling_best(runs, env)
        if ceiling is not None:
            values["ceiling"][trial] = ceiling.test
            if trial in values["unseen"]:
                values["gap"][trial] = ceiling.test - values["unseen"][trial]
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
        return Cell(None, reason="an average needs every domain")
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


def _registered_environments(dataset: str) -> list[str]:
    # Imported here: it may bring torch along, which reading most tables does without.
    from domainbed_ext.datasets import environment_names as registered

    try:
        return [str(name) for name in registered(dataset)]
    except (ValueError, KeyError, OSError):
        # A folder that is not on this machine, or a data set registered elsewhere.
        return []
