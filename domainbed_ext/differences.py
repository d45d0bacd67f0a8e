"""Each algorithm against a baseline, trial by trial, with a confidence interval.

    from domainbed_ext.records import load_records
    from domainbed_ext.tables import differences_frame

    differences_frame(load_records("sweep"), baseline="ERM_ViT", selection="training-domain")

In one trial all algorithms see the same splits, so what makes a split easy or hard cancels in their
difference. The interval is Student's t over the differences; of two or three trials it is wide, as
it should be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from domainbed_ext.errors import UsageError
from domainbed_ext.hparams import order_algorithms
from domainbed_ext.records import Record
from domainbed_ext.selection import Selection, SelectionMethod, selection_methods
from domainbed_ext.table_checks import NEEDS_EVERY_DOMAIN, explain_missing, refuse_mixed
from domainbed_ext.table_names import AVERAGE, algorithm_names, dataset_names, environment_names
from domainbed_ext.trial_values import domain_means, values_per_env

DIFFERENCE_COLUMNS = (
    "selection",
    "dataset",
    "baseline",
    "algorithm",
    "environment",
    "metric",
    "mean",
    "ci_low",
    "ci_high",
    "pairs",
    "reason",
)
CONFIDENCE = 0.95
ONE_PAIR = "no interval: one pair of trials"


def differences_frame(
    records: Sequence[Record],
    *,
    baseline: str,
    selection: Selection = None,
    allow_mixed: bool = False,
) -> pd.DataFrame:
    """What each other algorithm is above the baseline, in percentage points, paired by trial seed.

    A row per selection method, data set, algorithm, domain and metric: the `mean` of the
    differences, its 95 % confidence interval from `ci_low` to `ci_high`, and the number of `pairs`.
    A pair of "Avg" are one trial's means over domains, of trials with every domain on both sides.
    The metrics are "accuracy" and, for EmojiDG, those of `emojidg_frame`. `reason` is empty, or
    says why there is no mean or no interval.

    Args:
        records: What `load_records` returned.
        baseline: The algorithm that is subtracted.
        selection: One or several selection methods, by class or name; None: all three.
        allow_mixed: Compare even records from different copies of the data or different weights.
    """
    if not allow_mixed:
        refuse_mixed(records)
    _check_baseline(records, baseline)
    rows: list[tuple[object, ...]] = []
    for method in selection_methods(selection):
        for dataset in dataset_names(records):
            names = environment_names(dataset, records)
            own = [record for record in records if record["args"]["dataset"] == dataset]
            subtracted = values_per_env(own, method, baseline, len(names))
            for algorithm in algorithm_names(records, dataset):
                if algorithm == baseline:
                    continue
                for metric, mine in values_per_env(own, method, algorithm, len(names)).items():
                    theirs = subtracted[metric]
                    where = (method, dataset, baseline, algorithm)
                    for env, name in enumerate(names):
                        pairs = _paired(mine[env], theirs[env])
                        reason = "" if pairs else _why_none(own, where, env, metric, mine, theirs)
                        rows.append(_row(where, name, metric, pairs, reason))
                    whole = _paired(domain_means(mine), domain_means(theirs))
                    every = all(_paired(*values) for values in zip(mine, theirs, strict=True))
                    reason = "no trial has every domain for both" if every else NEEDS_EVERY_DOMAIN
                    rows.append(_row(where, AVERAGE, metric, whole, "" if whole else reason))
    frame = pd.DataFrame(rows, columns=list(DIFFERENCE_COLUMNS))
    kinds = {"mean": float, "ci_low": float, "ci_high": float, "pairs": int, "reason": str}
    return frame.astype(kinds)


def backbone_notes(records: Sequence[Record], baseline: str) -> list[str]:
    """A sentence for each data set and backbone that is not the baseline's: what such an algorithm
    gains is not the method's alone. Records that do not say what they began with are passed over.
    """
    notes = []
    for dataset in dataset_names(records):
        tags: dict[str, str] = {}
        for record in records:
            tag = (record.get("provenance") or {}).get("backbone_weights")
            if record["args"]["dataset"] == dataset and tag is not None:
                tags.setdefault(record["args"]["algorithm"], str(tag))
        others: dict[str, list[str]] = {}
        for algorithm in order_algorithms(tags):
            if baseline in tags and tags[algorithm] != tags[baseline]:
                others.setdefault(tags[algorithm], []).append(algorithm)
        notes += [
            f"{dataset}: {', '.join(names)} began with the backbone {tag}, the baseline {baseline} "
            f"with {tags[baseline]}: the difference is not the method's alone"
            for tag, names in others.items()
        ]
    return notes


def confidence_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """The interval that covers the mean with probability `CONFIDENCE`, if differences are normal;
    None for fewer than two.
    """
    # Imported here: tables without a baseline do without it.
    from scipy.special import stdtrit

    num = len(differences)
    if num < 2:
        return None
    quantile = float(stdtrit(num - 1, (1 + CONFIDENCE) / 2))
    half = quantile * float(np.std(differences, ddof=1)) / num**0.5
    mean = float(np.mean(differences))
    return mean - half, mean + half


_Where = tuple[type[SelectionMethod], str, str, str]


def _check_baseline(records: Sequence[Record], baseline: str) -> None:
    there = order_algorithms(record["args"]["algorithm"] for record in records)
    if baseline not in there:
        raise UsageError(f"the baseline {baseline} has no records; there are {', '.join(there)}")
    if there == [baseline]:
        raise UsageError(f"nothing to compare with the baseline: only {baseline} has records")


def _paired(mine: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    return [100 * (mine[trial] - theirs[trial]) for trial in sorted(mine) if trial in theirs]


def _why_none(
    records: Sequence[Record],
    where: _Where,
    env: int,
    metric: str,
    mine: Sequence[Mapping[int, float]],
    theirs: Sequence[Mapping[int, float]],
) -> str:
    method, dataset, baseline, algorithm = where
    for name, values in [(baseline, theirs[env]), (algorithm, mine[env])]:
        if not values:
            if metric in ("ceiling", "gap"):
                return f"{name} has no {metric} (it needs runs that train on all domains)"
            return f"{name}: {explain_missing(records, method, dataset, name, env)}"
    has = [", ".join(map(str, sorted(values[env]))) for values in (mine, theirs)]
    return f"no trial in common ({algorithm}: {has[0]}; {baseline}: {has[1]})"


def _row(
    where: _Where, environment: str, metric: str, pairs: Sequence[float], reason: str
) -> tuple[object, ...]:
    method, dataset, baseline, algorithm = where
    mean = float(np.mean(pairs)) if pairs else None
    interval = confidence_interval(pairs)
    low, high = (None, None) if interval is None else interval
    reason = ONE_PAIR if len(pairs) == 1 else reason
    key = (method.name, dataset, baseline, algorithm, environment, metric)
    return (*key, mean, low, high, len(pairs), reason)
