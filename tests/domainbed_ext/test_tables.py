from __future__ import annotations

import math

import pandas as pd
import pytest
from sweep_records import hand_made_records, make_record

from domainbed_ext.errors import UsageError
from domainbed_ext.records import JobCount
from domainbed_ext.selection import LeaveOneDomainOut, Oracle, TrainingDomainValidation
from domainbed_ext.table_checks import sweep_notes
from domainbed_ext.table_names import (
    UPSTREAM_ENVIRONMENTS,
    dataset_names,
    environment_names,
)
from domainbed_ext.tables import COLUMNS, averages_frame, cell_of, emojidg_frame, results_frame


def _cells(frame, **where):
    for column, value in where.items():
        frame = frame[frame[column] == value]
    return {row.environment: row for row in frame.itertuples()}


def test_mean_and_standard_error():
    cell = cell_of([0.1, 0.2, 0.3])
    # Variance (0.01 + 0 + 0.01) / 3, its root 0.08165, divided by sqrt(3): 0.04714.
    assert (cell.mean, cell.stderr) == (pytest.approx(20.0), pytest.approx(4.714, abs=5e-4))
    assert cell.trials == 3


def test_training_domain_validation_by_hand():
    cells = _cells(results_frame(hand_made_records(), selection=TrainingDomainValidation))
    assert list(cells) == ["0", "1", "2", "Avg"]
    assert (cells["0"].mean, cells["0"].trials) == (pytest.approx(60), 2)
    assert cells["0"].stderr == pytest.approx(10 / math.sqrt(2))
    assert (cells["1"].mean, cells["1"].trials) == (pytest.approx(20), 1)
    assert math.isnan(cells["1"].stderr)  # one trial has no spread
    assert cells["2"].mean == pytest.approx(90)
    assert cells["Avg"].mean == pytest.approx(170 / 3)
    assert all(cell.reason == "" for cell in cells.values())


def test_the_oracle_by_hand():
    cells = _cells(results_frame(hand_made_records(), selection="oracle"))
    assert [cells[name].mean for name in "012"] == [pytest.approx(x) for x in (55, 25, 90)]
    assert cells["0"].stderr == pytest.approx(5 / math.sqrt(2))
    assert cells["Avg"].mean == pytest.approx(170 / 3)


def test_leave_one_domain_out_by_hand_says_what_is_missing():
    cells = _cells(results_frame(hand_made_records(), selection="loo"))
    assert (cells["0"].mean, cells["0"].trials) == (pytest.approx(40), 1)
    assert pd.isna(cells["1"].mean)
    assert cells["1"].reason == "leave-one-domain-out needs the runs with test_envs [1, 2] too"
    assert cells["2"].reason == "leave-one-domain-out needs the runs with test_envs [1, 2] too"
    assert cells["Avg"].reason == "an average needs every domain"


def test_all_methods_and_several_algorithms_share_one_frame():
    records = hand_made_records(algorithm="LTDR") + hand_made_records()
    frame = results_frame(records)
    assert tuple(frame.columns) == COLUMNS
    assert list(frame["algorithm"].unique()) == ["ERM", "LTDR"]
    assert len(frame) == 3 * 2 * 4
    numbers = frame.groupby("algorithm")["mean"].apply(lambda column: column.dropna().tolist())
    assert numbers["ERM"] == numbers["LTDR"]


def test_averages_take_whole_trials_only():
    records = hand_made_records()
    row = averages_frame(records, selection=[TrainingDomainValidation]).iloc[0]
    # Only trial 0 has all three domains: (50 + 20 + 90) / 3.
    assert (row["mean"], row["trials"]) == (pytest.approx(160 / 3), 1)
    row = averages_frame(records, selection=[LeaveOneDomainOut]).iloc[0]
    assert (row["reason"], row["trials"]) == ("no trial has every domain", 0)


@pytest.mark.parametrize(
    ("method", "drop", "reason"),
    [
        (TrainingDomainValidation, "test_envs", "no run with test_envs [2]"),
        (TrainingDomainValidation, "env2_in_acc", "the records lack env2_in_acc"),
        (Oracle, "env2_out_acc", "the records lack env2_out_acc"),
        (LeaveOneDomainOut, "pairs", "needs the runs with two test environments"),
    ],
)
def test_every_gap_has_its_reason(method, drop, reason):
    records = hand_made_records()
    if drop == "test_envs":
        records = [record for record in records if 2 not in record["args"]["test_envs"]]
    elif drop == "pairs":
        records = [record for record in records if len(record["args"]["test_envs"]) == 1]
    else:
        for record in records:
            if record["args"]["test_envs"] == [2]:
                del record[drop]
    assert reason in _cells(results_frame(records, selection=method))["2"].reason


def test_runs_done_twice_are_the_reason():
    frame = results_frame([*hand_made_records(), *hand_made_records()], selection=LeaveOneDomainOut)
    assert "run twice" in _cells(frame)["0"].reason


def test_data_sets_come_in_domainbeds_order_then_ours():
    names = ["folder:/b", "EmojiDG", "PACS", "folder:/a", "RotatedDigits", "VLCS"]
    records = [
        make_record([0], dataset=name, in_acc=[0.5, 0.5], out_acc=[0.5, 0.5]) for name in names
    ]
    expected = ["VLCS", "PACS", "RotatedDigits", "EmojiDG", "folder:/a", "folder:/b"]
    assert dataset_names(records) == expected


def test_names_of_environments_come_from_the_records_where_no_table_has_them():
    def record(provenance):
        return make_record(
            [0], dataset="folder:/x", in_acc=[0, 0], out_acc=[0, 0], provenance=provenance
        )

    assert environment_names("folder:/x", [record({"environments": ["art", "photo"]})]) == [
        "art",
        "photo",
    ]
    assert environment_names("folder:/x", [record(None)]) == ["env0", "env1"]
    with pytest.raises(UsageError, match="disagree"):
        environment_names(
            "folder:/x", [record({"environments": ["a", "b"]}), record({"environments": ["b"]})]
        )


def test_the_names_in_the_tables_are_as_many_as_the_data_sets_have():
    datasets = pytest.importorskip("domainbed_ext.datasets")
    shared = [name for name in datasets.DATASETS if name in UPSTREAM_ENVIRONMENTS]
    assert "PACS" in shared
    for name in shared:
        assert len(UPSTREAM_ENVIRONMENTS[name]) == datasets.num_environments(name)
    assert environment_names("EmojiDG", []) == list(datasets.environment_names("EmojiDG"))


def _with_provenance(records, **provenance):
    return [record | {"provenance": provenance} for record in records]


@pytest.mark.parametrize("key", ["data_fingerprint", "backbone_weights", "eval_tail_scope"])
def test_numbers_from_different_origins_are_not_averaged(key):
    first, second = hand_made_records()[:2], hand_made_records()[2:]
    mixed = _with_provenance(first, **{key: "a"}) + _with_provenance(second, **{key: "b"})
    with pytest.raises(UsageError, match=f"{key} 'a' and 'b'.*--allow-mixed"):
        results_frame(mixed)
    assert len(results_frame(mixed, allow_mixed=True)) == 12
    same = _with_provenance([*first, *second], **{key: "a"})
    assert len(results_frame(same)) == 12


def test_algorithms_may_differ_in_weights_but_not_in_data():
    erm, ltdr = hand_made_records(), hand_made_records(algorithm="LTDR")
    weights = {"backbone_weights": "resnet50"}, {"backbone_weights": "deit_small"}
    mixed = _with_provenance(erm, **weights[0]) + _with_provenance(ltdr, **weights[1])
    assert len(results_frame(mixed)) == 24
    copies = {"data_fingerprint": "a"}, {"data_fingerprint": "b"}
    with pytest.raises(UsageError, match="records of Debug28 are not comparable"):
        results_frame(_with_provenance(erm, **copies[0]) + _with_provenance(ltdr, **copies[1]))


def test_two_sets_of_hparams_for_one_job_are_not_mixed():
    records = hand_made_records()
    records[1] = records[1] | {"hparams": {"lr": 5.0}}
    with pytest.raises(UsageError, match=r"two sets of hparams for one job \(test_envs \[0\]"):
        results_frame(records)


def test_draws_that_trials_share_are_not_mixed_with_others():
    records = hand_made_records() + hand_made_records(algorithm="LTDR")
    drawn = [record for record in records if record["args"]["hparams_seed"] != 0]
    assert 0 < len(drawn) < len(records)
    for record in drawn:
        record["args"]["hparams_per_trial"] = "shared"
    assert len(results_frame(records)) == 24
    assert any("share their draws" in note for note in sweep_notes(records, None))
    # One algorithm's error bars beside another's of the other kind would mislead.
    for record in drawn[len(drawn) // 2 :]:
        del record["args"]["hparams_per_trial"]
    with pytest.raises(UsageError, match=r"'shared' and 'drawn'.*--allow-mixed"):
        results_frame(records)


def test_notes_tell_what_the_numbers_hide():
    records = hand_made_records() + hand_made_records(algorithm="LTDR")[4:5]
    records[0] = records[0] | {"provenance": {"code_version": "1"}}
    records[1] = records[1] | {"provenance": {"code_version": "2"}}
    notes = sweep_notes(records, JobCount(5, ["abc", "def"], ["abc"]))
    assert notes == [
        "2 of 5 jobs are unfinished, 1 of them failed; "
        "their records so far are included (abc, def)",
        "Debug28: the algorithms had unequal numbers of hyper-parameter draws (ERM 2, LTDR 1)",
        f"{len(records) - 2} of {len(records)} records do not say which data and weights they used",
        "the records come from different versions of the code: 1, 2",
    ]
    assert sweep_notes(hand_made_records(), JobCount(total=5, unfinished=[])) == []


def emojidg_records(*, ceiling=True):
    """Two domains, two trials. Unseen in domain 0: 40 and 42; its ceiling: 50 and 54."""
    records = []
    for trial, unseen, top in [(0, 0.40, 0.50), (1, 0.42, 0.54)]:
        for test_envs, acc in [([0], unseen), ([1], 0.30), *([([], top)] if ceiling else [])]:
            extra = {f"env{env}_unseen_acc": acc for env in range(2)}
            extra |= {f"env{env}_unseen_class_acc": acc - 0.05 for env in range(2)}
            records.append(
                make_record(
                    test_envs,
                    dataset="EmojiDG",
                    algorithm="LTDR",
                    trial_seed=trial,
                    in_acc=[0.6, 0.6],
                    out_acc=[0.5, 0.5],
                    provenance={"environments": ["twemoji", "openmoji"]},
                    **extra,
                )
            )
    return records


def test_emojidg_by_hand():
    frame = emojidg_frame(emojidg_records(), selection=TrainingDomainValidation)
    metrics = {name: _cells(frame, metric=name)["twemoji"] for name in frame["metric"].unique()}
    means = {name: row.mean for name, row in metrics.items()}
    assert means == pytest.approx(
        {"seen": 60, "unseen": 41, "unseen_class": 36, "ceiling": 52, "gap": 11}
    )
    # Gaps 10 and 12, paired by trial: 1 / sqrt(2).
    assert metrics["gap"].stderr == pytest.approx(1 / math.sqrt(2))
    assert _cells(frame, metric="gap")["Avg"].mean == pytest.approx((11 + 22) / 2)
    headline = results_frame(emojidg_records(), selection=TrainingDomainValidation)
    assert _cells(headline)["twemoji"].mean == pytest.approx(41)


def test_emojidg_without_ceiling_says_what_it_needs():
    frame = emojidg_frame(emojidg_records(ceiling=False), selection=TrainingDomainValidation)
    for metric in ("ceiling", "gap"):
        row = _cells(frame, metric=metric)["twemoji"]
        assert pd.isna(row.mean)
        assert row.reason.startswith("the ceiling needs runs that train on all domains")


def test_other_data_sets_have_no_emojidg_table():
    assert emojidg_frame(hand_made_records()).empty
