"""What each trial scored, before anything is averaged over trials: accuracies in [0, 1] by trial
seed. Tables average them, differences pair them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from domainbed_ext.records import Record, group_records
from domainbed_ext.selection import SelectionMethod

EMOJIDG_METRICS = ("seen", "unseen", "unseen_class", "ceiling", "gap")


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


def domain_means(per_env: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """The mean over domains of each trial that has a value on every one of them."""
    trials = sorted(set.intersection(*(set(env) for env in per_env))) if per_env else []
    return {trial: float(np.mean([env[trial] for env in per_env])) for trial in trials}


def has_unseen_concepts(records: Sequence[Record]) -> bool:
    """Whether the records are of a data set that keeps concepts apart, as EmojiDG does."""
    return any(key.endswith("_unseen_acc") for record in records for key in record)


def emojidg_values(
    records: Sequence[Record], method: type[SelectionMethod], algorithm: str, env: int
) -> dict[str, dict[int, float]]:
    """Each of `EMOJIDG_METRICS` per trial seed, on one domain; `records` are of one data set."""
    own = [record for record in records if record["args"]["algorithm"] == algorithm]
    values: dict[str, dict[int, float]] = {metric: {} for metric in EMOJIDG_METRICS}
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
    return values


def values_per_env(
    records: Sequence[Record], method: type[SelectionMethod], algorithm: str, num_envs: int
) -> dict[str, list[dict[int, float]]]:
    """By metric, the values on each domain: "accuracy" and, where concepts are kept apart,
    `EMOJIDG_METRICS`; `records` are of one data set.
    """
    accs = sweep_accs([r for r in records if r["args"]["algorithm"] == algorithm], method)
    by_env = {env: values for (_, _, env), values in accs.items()}
    metrics = {"accuracy": [by_env.get(env, {}) for env in range(num_envs)]}
    if has_unseen_concepts(records):
        apart = [emojidg_values(records, method, algorithm, env) for env in range(num_envs)]
        metrics |= {metric: [values[metric] for values in apart] for metric in EMOJIDG_METRICS}
    return metrics
