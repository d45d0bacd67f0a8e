"""Model selection: which checkpoint of which draw counts, decided by DomainBed's three rules.

A rule sees the records of one (trial seed, data set, algorithm, test environment), as
`group_records` gathers them, and never looks at the test accuracy it reports. Numbers are those of
DomainBed: the first of equal checkpoints wins, the highest hparams seed of equal draws wins, the
oracle takes the last step. A run with SWAD has one record to choose: that of its average.

Two things differ, and only where DomainBed has no answer. An accuracy that is NaN never wins
(there, a NaN at the first checkpoint does). And EmojiDG, which has a split "unseen", is tested on
that one and validated on "out": its "in" split of a held-out domain holds drawings of concepts that
were trained on in other domains.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from domainbed_ext.errors import UsageError
from domainbed_ext.records import Record, of_deployed_weights, weights_of

SPLITS = ("in", "out", "test")

_OUT_ACC = re.compile(r"env(\d+)_out_acc")
_SPLIT = re.compile(r"env(\d+)_(\w+)")
_SPLIT_ACC = re.compile(r"env(\d+)_(in|out)_acc")


@dataclass(frozen=True)
class Accuracy:
    """What a rule found for one run: the accuracy it chose by, the test accuracy, and the record
    chosen.
    """

    val: float
    test: float
    record: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


class SelectionMethod:
    """A rule. Subclasses say how one run is judged; choosing between hyper-parameter draws is the
    same for all.
    """

    name: ClassVar[str]
    short_name: ClassVar[str]
    needs_pairs: ClassVar[bool] = False  # of test environments, besides each alone

    @classmethod
    def run_acc(cls, records: Sequence[Record]) -> Accuracy | None:
        """The best checkpoint of one run: of one test environment, trial and hparams seed.

        Returns:
            None when the records this rule needs are not there.
        """
        raise NotImplementedError

    @classmethod
    def ranked_runs(cls, records: Sequence[Record]) -> list[tuple[Accuracy, list[Record]]]:
        """All judged hyper-parameter draws with their records, the best first."""
        runs = _by(of_deployed_weights(records), lambda record: record["args"]["hparams_seed"])
        judged = [(cls.run_acc(run), run) for _, run in sorted(runs.items())]
        found = [(accuracy, run) for accuracy, run in judged if accuracy is not None]
        # Ascending and reversed, not descending: of equal draws the one with the highest hparams
        # seed comes first.
        return sorted(found, key=lambda pair: pair[0].val)[::-1]

    @classmethod
    def sweep_best(cls, records: Sequence[Record]) -> Accuracy | None:
        """The choice among all hyper-parameter draws and checkpoints."""
        ranked = cls.ranked_runs(records)
        return ranked[0][0] if ranked else None

    @classmethod
    def sweep_acc(cls, records: Sequence[Record]) -> float | None:
        """The test accuracy of that choice."""
        best = cls.sweep_best(records)
        return None if best is None else best.test

    @classmethod
    def ceiling_best(cls, records: Sequence[Record], test_env: int) -> Accuracy | None:
        """The same rule for runs that trained on every domain, read off at `test_env`.

        Leave-one-domain-out has nothing to leave out there, so it takes the validation split of all
        domains.
        """
        return _ceiling_best(records, test_env, lambda run: _first_best(run, _mean_out_acc))


class TrainingDomainValidation(SelectionMethod):
    """The checkpoint with the best mean accuracy on the held-out splits of the training domains."""

    name = "training-domain validation set"
    short_name = "training-domain"

    @classmethod
    def run_acc(cls, records: Sequence[Record]) -> Accuracy | None:
        single = [record for record in records if len(record["args"]["test_envs"]) == 1]
        return _accuracy(_first_best(single, _mean_out_acc))


class LeaveOneDomainOut(SelectionMethod):
    """The checkpoint whose step is best when each training domain in turn is held out as well.

    Needs, for test environment t and every other environment v, the run with test_envs [t, v].
    """

    name = "leave-one-domain-out cross-validation"
    short_name = "leave-one-out"
    needs_pairs = True

    @classmethod
    def run_acc(cls, records: Sequence[Record]) -> Accuracy | None:
        steps = _by(records, _comparable_step)
        judged = [cls._step_acc(step_records) for _, step_records in sorted(steps.items())]
        found = [accuracy for accuracy in judged if accuracy is not None]
        return max(found, key=lambda accuracy: accuracy.val) if found else None

    @staticmethod
    def _step_acc(records: Sequence[Record]) -> Accuracy | None:
        single = [record for record in records if len(record["args"]["test_envs"]) == 1]
        if len(single) != 1:
            return None
        test_env = single[0]["args"]["test_envs"][0]
        accs: dict[int, float] = {}
        for record in records:
            test_envs = record["args"]["test_envs"]
            if len(test_envs) == 2:
                for val_env in set(test_envs) - {test_env}:
                    accs[val_env] = record.get(_left_out_key(record, val_env), math.nan)
        needed = [env for env in range(num_environments(records)) if env != test_env]
        if not needed or any(env not in accs for env in needed):
            return None
        val = float(np.sum([accs[env] for env in needed]) / len(needed))
        return _accuracy((val, single[0])) if not math.isnan(val) else None


class Oracle(SelectionMethod):
    """The last checkpoint, and the draw with the best accuracy on the test domain's held-out split.

    It looks at the test domain, so its numbers are an upper bound and no fair comparison with the
    other rules.
    """

    name = "test-domain validation set (oracle)"
    short_name = "oracle"

    @classmethod
    def run_acc(cls, records: Sequence[Record]) -> Accuracy | None:
        single = [record for record in records if len(record["args"]["test_envs"]) == 1]
        return _accuracy(_last_step(single, single[0]["args"]["test_envs"][0])) if single else None

    @classmethod
    def ceiling_best(cls, records: Sequence[Record], test_env: int) -> Accuracy | None:
        return _ceiling_best(records, test_env, lambda run: _last_step(run, test_env))


SELECTION_METHODS: tuple[type[SelectionMethod], ...] = (
    TrainingDomainValidation,
    LeaveOneDomainOut,
    Oracle,
)

# How functions take rules: one or several, by class or name; None for all.
Selection = str | type[SelectionMethod] | Iterable[str | type[SelectionMethod]] | None

_ALIASES = {
    "iid": TrainingDomainValidation,
    "loo": LeaveOneDomainOut,
    "leave-one-domain-out": LeaveOneDomainOut,
}


def get_selection_method(name: str) -> type[SelectionMethod]:
    """The rule called `name`: its full name, its short name, or "iid" and "loo" as people say."""
    for method in SELECTION_METHODS:
        if name in (method.name, method.short_name):
            return method
    if name in _ALIASES:
        return _ALIASES[name]
    known = ", ".join(method.short_name for method in SELECTION_METHODS)
    raise UsageError(f"unknown selection method {name!r}; choose from {known}")


def selection_methods(selection: Selection) -> list[type[SelectionMethod]]:
    """The rules meant by one or several classes or names, or all of them for None."""
    if selection is None:
        return list(SELECTION_METHODS)
    several = [selection] if isinstance(selection, (str, type)) else list(selection)
    return [
        get_selection_method(method) if isinstance(method, str) else method for method in several
    ]


def needed_splits(names: Iterable[str], test_envs: Sequence[int]) -> list[str]:
    """Those of a run's splits whose accuracies any rule reads, DomainBed's own code included.

    These are the held-out part of every domain and all that a tested domain has: the images that
    were trained on, most of the data, are not among them. A run that trained on every domain is
    tested on each.

    Args:
        names: Such as "env0_in".
        test_envs: Of the run.
    """
    matches = {name: _SPLIT.fullmatch(name) for name in names}
    parts = {name: (int(match[1]), match[2]) for name, match in matches.items() if match}
    has_unseen = any(kind == "unseen" for _, kind in parts.values())
    if test_envs:
        tested = {(env, kind) for env in test_envs for kind in ("in", "unseen")}
    else:
        tested = {(env, "unseen" if has_unseen else "in") for env, _ in parts.values()}
    return [name for name, part in parts.items() if part[1] == "out" or part in tested]


def num_environments(records: Sequence[Record]) -> int:
    """How many environments the first record was evaluated on."""
    return 1 + max(
        (int(match[1]) for match in map(_OUT_ACC.fullmatch, records[0]) if match), default=-1
    )


def test_acc_key(record: Mapping[str, Any], test_env: int) -> str:
    """The key of a record's test accuracy: on unseen concepts where the data set has them."""
    unseen = f"env{test_env}_unseen_acc"
    return unseen if unseen in record else f"env{test_env}_in_acc"


def _comparable_step(record: Mapping[str, Any]) -> int:
    """SWAD ends each run where that run's window ends, which is one point to compare."""
    return -1 if weights_of(record) == "swad" else record["step"]


def split_accs(record: Mapping[str, Any]) -> dict[str, float]:
    """Mean accuracies, in [0, 1], of one record.

    Returns:
        "in" and "out", over the training domains: images that were trained on, and the held-out
        part, by which training-domain validation selects. "test", over the test domains: the
        accuracy that tables report. What a record lacks is left out.
    """
    test_envs = record["args"]["test_envs"]
    accs: dict[str, list[float]] = {split: [] for split in SPLITS}
    for match in filter(None, map(_SPLIT_ACC.fullmatch, record)):
        if int(match[1]) not in test_envs:
            accs[match[2]].append(record[match[0]])
    for env in test_envs:
        key = test_acc_key(record, env)
        accs["test"] += [record[key]] if key in record else []
    return {split: float(np.mean(values)) for split, values in accs.items() if values}


def _left_out_key(record: Mapping[str, Any], env: int) -> str:
    return f"env{env}_out_acc" if f"env{env}_unseen_acc" in record else f"env{env}_in_acc"


def _mean_out_acc(record: Record) -> float:
    held_out = record["args"]["test_envs"]
    envs = sorted(int(match[1]) for match in map(_OUT_ACC.fullmatch, record) if match)
    accs = [record[f"env{env}_out_acc"] for env in envs if env not in held_out]
    return float(np.mean(accs)) if accs else math.nan


def _first_best(
    run: Iterable[Record], val_acc: Callable[[Record], float]
) -> tuple[float, Record] | None:
    judged = [(val_acc(record), record) for record in run]
    found = [pair for pair in judged if not math.isnan(pair[0])]
    return max(found, key=lambda pair: pair[0]) if found else None


def _last_step(run: Sequence[Record], test_env: int) -> tuple[float, Record] | None:
    last = sorted(run, key=lambda record: record["step"])[-1]
    val = last.get(f"env{test_env}_out_acc", math.nan)
    return None if math.isnan(val) else (val, last)


def _accuracy(choice: tuple[float, Record] | None, test_env: int | None = None) -> Accuracy | None:
    if choice is None:
        return None
    val, record = choice
    env = record["args"]["test_envs"][0] if test_env is None else test_env
    key = test_acc_key(record, env)
    return Accuracy(val=val, test=record[key], record=record) if key in record else None


def _ceiling_best(
    records: Sequence[Record],
    test_env: int,
    choose: Callable[[list[Record]], tuple[float, Record] | None],
) -> Accuracy | None:
    runs = _by(
        (r for r in of_deployed_weights(records) if not r["args"]["test_envs"]),
        lambda record: record["args"]["hparams_seed"],
    )
    found = [_accuracy(choose(run), test_env) for _, run in sorted(runs.items())]
    ranked = sorted(
        (accuracy for accuracy in found if accuracy is not None), key=lambda accuracy: accuracy.val
    )
    return ranked[-1] if ranked else None


def _by(records: Iterable[Record], key: Callable[[Record], int]) -> dict[int, list[Record]]:
    groups: defaultdict[int, list[Record]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return dict(groups)
