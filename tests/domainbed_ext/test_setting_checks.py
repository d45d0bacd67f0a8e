"""Runs of different settings are no trials of one; what trials may differ in is let through."""

from __future__ import annotations

import json

import pytest
from sweep_records import hand_made_records, make_record

from domainbed_ext.errors import UsageError
from domainbed_ext.tables import results_frame


def trial(number, *, hparams=None, changed=None, draw=0, test_envs=(0,), **args):
    """A record of trial `number`: its hparams, `--hparams` and further "args"."""
    record = make_record(
        list(test_envs),
        trial_seed=number,
        hparams_seed=draw,
        in_acc=[0.1, 0.2, 0.3],
        out_acc=[0.1, 0.2, 0.3],
    )
    record["hparams"] = {"lr": 0.1, "batch_size": 8} if hparams is None else hparams
    record["args"] |= {"steps": None, "hparams": changed, **args}
    return record


DIFFERENT = {
    "steps": ([trial(0, steps=21), trial(1, steps=11)], "steps 21 and 11, in "),
    # Debug28 has 301 steps unless told otherwise
    "default steps": ([trial(0), trial(1, steps=11)], "steps 301 and 11, in "),
    "defaults": (
        [trial(0), trial(1, hparams={"lr": 0.2, "batch_size": 16})],
        "lr 0.1 and 0.2, batch_size 8 and 16, in ",
    ),
    "what was changed in draws": (
        [trial(0, draw=1), trial(1, draw=1, hparams={"lr": 0.7}, changed='{"lr": 0.7}')],
        '--hparams {} and {"lr": 0.7}, in ',
    ),
    "draws that are shared": (
        [
            trial(number, draw=3, hparams={"lr": lr}, hparams_per_trial="shared")
            for number, lr in enumerate((0.1, 0.2))
        ],
        "lr of draw 3 0.1 and 0.2, in ",
    ),
    "domains": ([trial(0), trial(0, test_envs=[1], steps=11)], "steps 301 and 11, in "),
    "many": (
        [trial(0, hparams=dict.fromkeys("abcdef", 1)), trial(1, hparams=dict.fromkeys("abcdef"))],
        "c 1 and None, d 1 and None and 2 more, in ",
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_other_settings_are_named_and_refused(case):
    records, said = DIFFERENT[case]
    with pytest.raises(UsageError) as refused:
        results_frame(records)
    assert said in str(refused.value)
    folders = [record["args"]["output_dir"] for record in records]
    assert f" in {folders[0]} and {folders[1]}; collect them from" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(results_frame(records, allow_mixed=True)) == 12


def _without(record, *names):
    for name in names:
        del record["args"][name]
    return record


ALIKE = {
    "draws": [trial(0, draw=1, hparams={"lr": 0.3}), trial(1, draw=1, hparams={"lr": 0.7})],
    "a draw and the defaults": [trial(0), trial(1, draw=1, hparams={"lr": 0.7})],
    "two shared draws": [
        trial(0, draw=seed, hparams={"lr": seed}, hparams_per_trial="shared") for seed in (1, 2)
    ],
    "steps said or not": [trial(0), trial(1, steps=301)],
    "a changed value that is the default": [trial(0), trial(1, changed='{"lr": 0.1}')],
    "order of what was changed": [
        trial(number, draw=1, changed=json.dumps(changed))
        for number, changed in enumerate([{"a": 1, "b": 2}, {"b": 2, "a": 1}])
    ],
    "hparams that an older version had not": [
        trial(0, hparams={"lr": 0.1}),
        trial(1, hparams={"lr": 0.1, "new": 3}),
    ],
    "records without these args": [
        _without(trial(0, draw=1), "steps", "hparams"),
        trial(1, draw=1, steps=7, changed='{"lr": 0.1}'),
    ],
    "a ceiling of its own": [
        trial(0),
        trial(0, test_envs=[], hparams={"lr": 0.1, "batch_size": 9}),
    ],
    "a teacher for each trial": [
        trial(n, hparams={"lr": 0.1, "distill_teacher": f"runs/{n}"}) for n in range(2)
    ],
    "the length of the run as a hparam": [
        trial(n, hparams={"lr": 0.1, "schedule_steps": 5 + n}) for n in range(2)
    ],
}


@pytest.mark.parametrize("case", ALIKE)
def test_what_trials_may_differ_in(case):
    assert len(results_frame(ALIKE[case])) == 12


def test_algorithms_have_settings_of_their_own():
    others = hand_made_records(algorithm="LTDR")
    for record in others:
        record["hparams"] = {"lr": 7.0}
        record["args"]["steps"] = 3
    assert len(results_frame([*hand_made_records(), *others])) == 24


def test_a_run_that_averages_its_weights_stops_when_it_likes():
    """SWAD's records on the way say another weight than its last, and are in no table."""
    swad = {"lr": 0.1, "weight_averaging": "swad"}
    records = []
    for number, last in enumerate((100, 200)):
        on_the_way = trial(number, hparams=swad, steps=5000) | {"step": last - 50}
        ended = trial(number, hparams=swad, steps=5000) | {"step": last}
        records += [on_the_way | {"provenance": {"weights": "raw"}}]
        records += [ended | {"provenance": {"weights": "swad"}}]
    assert len(results_frame(records)) == 12
