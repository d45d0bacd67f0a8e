from __future__ import annotations

import math
import random

import pytest
from sweep_records import hand_made_records, make_record
from upstream_checkout import ask_upstream, needs_upstream

from domainbed_ext.errors import UsageError
from domainbed_ext.records import group_records
from domainbed_ext.selection import (
    SELECTION_METHODS,
    Accuracy,
    LeaveOneDomainOut,
    Oracle,
    TrainingDomainValidation,
    get_selection_method,
    needed_splits,
)

NAN = math.nan


def _group(trial_seed, test_env):
    for group in group_records(hand_made_records()):
        if (group.trial_seed, group.test_env) == (trial_seed, test_env):
            return group.records
    raise AssertionError


def _run(trial_seed, test_env, hparams_seed):
    group = _group(trial_seed, test_env)
    return [record for record in group if record["args"]["hparams_seed"] == hparams_seed]


def test_the_names_are_domainbeds():
    assert [method.name for method in SELECTION_METHODS] == [
        "training-domain validation set",
        "leave-one-domain-out cross-validation",
        "test-domain validation set (oracle)",
    ]


def test_training_domain_validation_takes_the_first_of_equal_checkpoints():
    found = TrainingDomainValidation.run_acc(_run(0, 0, 0))
    assert found == Accuracy(val=pytest.approx(0.6), test=0.30)
    assert found.record["step"] == 0


def test_training_domain_validation_takes_the_best_draw():
    assert TrainingDomainValidation.sweep_acc(_group(0, 0)) == 0.50


def test_of_equal_draws_the_one_with_the_highest_seed_counts():
    ranked = TrainingDomainValidation.ranked_runs(_group(1, 0))
    assert [accuracy.val for accuracy, _ in ranked] == [pytest.approx(0.8)] * 2
    assert [records[0]["args"]["hparams_seed"] for _, records in ranked] == [1, 0]
    assert TrainingDomainValidation.sweep_acc(_group(1, 0)) == 0.70


def test_the_oracle_takes_the_last_step_whatever_the_order_of_records():
    run = _run(0, 0, 1)
    assert Oracle.run_acc(run) == Accuracy(val=0.20, test=0.50)
    assert Oracle.run_acc(run[::-1]) == Accuracy(val=0.20, test=0.50)
    assert Oracle.sweep_acc(_group(1, 0)) == 0.60


def test_leave_one_domain_out_averages_over_the_left_out_domains():
    assert LeaveOneDomainOut.run_acc(_run(0, 0, 0)) == Accuracy(val=pytest.approx(0.4), test=0.40)
    assert LeaveOneDomainOut.sweep_acc(_group(0, 0)) == 0.40


def test_leave_one_domain_out_needs_every_pair_and_each_once():
    run = _run(0, 0, 0)
    pairs = [record for record in run if len(record["args"]["test_envs"]) == 2]
    single = [record for record in run if record["args"]["test_envs"] == [0]]
    assert LeaveOneDomainOut.run_acc(single + pairs[:1]) is None
    assert LeaveOneDomainOut.run_acc(pairs) is None
    assert LeaveOneDomainOut.run_acc([*single, single[1], *pairs]) is None


@pytest.mark.parametrize("method", SELECTION_METHODS)
def test_no_records_give_no_answer(method):
    assert method.run_acc([]) is None
    assert method.sweep_acc([]) is None
    assert method.ranked_runs([]) == []


@pytest.mark.parametrize("position", [0, 1])
def test_nan_never_wins(position):
    values = [[0.0, 0.5, 0.5]]
    values.insert(position, [0.0, NAN, 0.9])
    run = [
        make_record([0], step=step, in_acc=[0.1 * step, 0, 0], out_acc=out)
        for step, out in enumerate(values)
    ]
    assert TrainingDomainValidation.run_acc(run).val == 0.5


def test_runs_that_have_only_nan_are_left_out():
    run = [make_record([0], in_acc=[0.5, 0, 0], out_acc=[NAN, NAN, NAN])]
    assert TrainingDomainValidation.run_acc(run) is None
    assert Oracle.run_acc(run) is None


def test_records_without_the_test_accuracy_give_no_answer():
    record = make_record([0], in_acc=[0.5, 0, 0], out_acc=[0.5, 0.5, 0.5])
    del record["env0_in_acc"]
    assert TrainingDomainValidation.run_acc([record]) is None


def _emojidg_record(test_envs, **extra):
    return make_record(
        test_envs,
        dataset="EmojiDG",
        in_acc=[0.9, 0.9, 0.8],
        out_acc=[0.1, 0.5, 0.3],
        **{f"env{env}_unseen_acc": 0.4 + 0.01 * env for env in range(3)},
        **extra,
    )


def test_unseen_concepts_are_what_counts_where_there_are_any():
    record = _emojidg_record([0])
    assert TrainingDomainValidation.run_acc([record]) == Accuracy(val=pytest.approx(0.4), test=0.4)
    assert Oracle.run_acc([record]) == Accuracy(val=0.1, test=0.4)
    run = [record, _emojidg_record([0, 1]), _emojidg_record([0, 2])]
    # Left-out domains are judged on "out": 0.5 and 0.3.
    assert LeaveOneDomainOut.run_acc(run) == Accuracy(val=pytest.approx(0.4), test=0.4)


def test_the_ceiling_comes_from_runs_that_train_on_every_domain():
    early, late = _emojidg_record([], step=0), _emojidg_record([], step=10)
    early["env1_out_acc"], late["env0_out_acc"] = 0.2, 0.05
    late["env2_unseen_acc"] = 0.77
    runs = [_emojidg_record([0], step=20), early, late]
    # Mean of out: (0.1 + 0.2 + 0.3) / 3 = 0.2 early, (0.05 + 0.5 + 0.3) / 3 = 0.283 late.
    assert TrainingDomainValidation.ceiling_best(runs, 2).test == 0.77
    assert LeaveOneDomainOut.ceiling_best(runs, 2).test == 0.77
    assert Oracle.ceiling_best(runs, 0) == Accuracy(val=0.05, test=0.4)
    assert Oracle.ceiling_best(runs[:1], 0) is None


def test_methods_are_found_by_name():
    for method in SELECTION_METHODS:
        assert get_selection_method(method.name) is method
        assert get_selection_method(method.short_name) is method
    assert get_selection_method("iid") is TrainingDomainValidation
    with pytest.raises(UsageError, match="choose from training-domain, leave-one-out, oracle"):
        get_selection_method("best")


def _random_sweep(seed):
    """Records with few distinct accuracies (so ties), missing runs, duplicates, shuffled."""
    rng = random.Random(seed)
    num_envs, lost = rng.choice([3, 4]), rng.choice([0.04, 0.4])
    records = []
    for trial_seed in range(2):
        for hparams_seed in range(rng.choice([1, 2, 4])):
            for first in range(num_envs):
                for test_envs in [[first], *([first, second] for second in range(first))]:
                    for step in (0, 5, 10):
                        if rng.random() < lost:
                            continue
                        accs = [rng.choice([0.1, 0.25, 0.5, 0.75]) for _ in range(2 * num_envs)]
                        record = make_record(
                            test_envs,
                            step=step,
                            in_acc=accs[:num_envs],
                            out_acc=accs[num_envs:],
                            trial_seed=trial_seed,
                            hparams_seed=hparams_seed,
                        )
                        records += [record] * (2 if rng.random() < 0.02 else 1)
    rng.shuffle(records)
    return records


def _pruned(record):
    """A record of a run that evaluated the needed splits only."""
    accs = [key for key in record if key.startswith("env")]
    names = [key.removesuffix("_acc") for key in accs]
    kept = {f"{name}_acc" for name in needed_splits(names, record["args"]["test_envs"])}
    return {key: value for key, value in record.items() if key not in accs or key in kept}


def test_the_needed_splits_are_validation_and_test():
    names = [f"env{env}_{kind}" for kind in ("in", "out") for env in range(3)] + ["env1_uda"]
    outs = ["env0_out", "env1_out", "env2_out"]
    assert needed_splits(names, [1]) == ["env1_in", *outs]
    assert needed_splits(names, [0, 2]) == ["env0_in", "env2_in", *outs]
    # Trained on all domains, tested on each: the ceiling.
    assert needed_splits(names, []) == ["env0_in", "env1_in", "env2_in", *outs]
    emoji = [f"env{env}_{kind}" for kind in ("in", "out", "unseen") for env in range(2)]
    assert needed_splits(emoji, [1]) == ["env1_in", "env0_out", "env1_out", "env1_unseen"]
    assert needed_splits(emoji, []) == ["env0_out", "env1_out", "env0_unseen", "env1_unseen"]


def test_what_is_not_needed_changes_no_choice():
    found = []
    for records in [hand_made_records(), *map(_random_sweep, range(20))]:
        pruned = [_pruned(record) for record in records]
        assert len(pruned[0]) < len(records[0])
        for whole, part in zip(group_records(records), group_records(pruned), strict=True):
            for method in SELECTION_METHODS:
                found.append(method.sweep_acc(whole.records))
                assert method.sweep_acc(part.records) == found[-1]
    assert sum(acc is not None for acc in found) > 100


@pytest.mark.upstream
@needs_upstream
@pytest.mark.parametrize("prune", [False, True])
def test_random_sweeps_are_judged_as_upstream_does(prune):
    sweeps = [_random_sweep(seed) for seed in range(40)]
    if prune:
        sweeps = [[_pruned(record) for record in records] for records in sweeps]
    code = """
from domainbed import model_selection
from domainbed.lib import reporting
from domainbed.lib.query import Q
methods = [model_selection.IIDAccuracySelectionMethod, model_selection.LeaveOneOutSelectionMethod,
           model_selection.OracleSelectionMethod]
answer = []
for records in question:
    for group in reporting.get_grouped_records(Q(records)):
        for method in methods:
            runs = [[run["val_acc"], run["test_acc"], records[0]["args"]["hparams_seed"]]
                    for run, records in method.hparams_accs(group["records"])]
            answer.append([method.name, group["trial_seed"], group["test_env"],
                           method.sweep_acc(group["records"]), runs])
print(json.dumps(answer))
"""
    ours = []
    for records in sweeps:
        for group in group_records(records):
            for method in SELECTION_METHODS:
                runs = [
                    [found.val, found.test, run[0]["args"]["hparams_seed"]]
                    for found, run in method.ranked_runs(group.records)
                ]
                acc = method.sweep_acc(group.records)
                ours.append([method.name, group.trial_seed, group.test_env, acc, runs])
    theirs = ask_upstream(code, sweeps)
    assert ours == theirs
    found = [row for row in theirs if row[0] == LeaveOneDomainOut.name]
    assert any(row[3] is None for row in found)
    assert any(row[3] is not None for row in found)
