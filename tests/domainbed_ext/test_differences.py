"""Differences to a baseline, paired by trial seed, with their confidence intervals."""

from __future__ import annotations

import pytest
from sweep_records import make_record, write_sweep

from domainbed_ext.differences import DIFFERENCE_COLUMNS, backbone_notes, confidence_interval
from domainbed_ext.errors import UsageError
from domainbed_ext.scripts import collect_results
from domainbed_ext.tables import differences_frame

# Test accuracy in percent of three trials on the domains 0, 1 and 2 of Debug28.
#   ERM_ViT  0: 50 60 70   1: 20 20 20   2: 80 80 80
#   LTDR     0: 51 62 73   1: 20 22 24   2: 86 80 83
# The differences:
#   0:  1  2  3   mean 2, sd 1. With t_{.975, 2} = 4.302653: 4.302653 * 1 / sqrt(3) = 2.484138.
#   1:  0  2  4   mean 2, sd 2, half of the interval 4.968276.
#   2:  6  0  3   mean 3, sd 3, half of the interval 7.452414.
#   Means over domains: (1 + 0 + 6) / 3 = 7/3, 4/3, 10/3. Mean 7/3, deviations 0, -1, 1, sd 1, half
#   2.484138. Taking the domains' intervals for independent would give another one.
_ACCURACIES = {
    "ERM_ViT": [(50, 20, 80), (60, 20, 80), (70, 20, 80)],
    "LTDR": [(51, 20, 86), (62, 22, 80), (73, 24, 83)],
}


def paired_records(*, dataset="Debug28", leave_out=()):
    """`leave_out`: (algorithm, trial, domain) that were not run."""
    records = []
    for algorithm, trials in _ACCURACIES.items():
        for trial, accuracies in enumerate(trials):
            for env, accuracy in enumerate(accuracies):
                if (algorithm, trial, env) not in leave_out:
                    in_acc = [accuracy / 100 if env == domain else 0.9 for domain in range(3)]
                    runs = {"algorithm": algorithm, "dataset": dataset, "trial_seed": trial}
                    records.append(make_record([env], in_acc=in_acc, out_acc=[0.5] * 3, **runs))
    return records


def difference_rows(records, **options):
    options = {"baseline": "ERM_ViT", "selection": "training-domain", **options}
    frame = differences_frame(records, **options)
    assert tuple(frame.columns) == DIFFERENCE_COLUMNS
    return {row.environment: row for row in frame.itertuples() if row.metric == "accuracy"}


def test_students_interval_by_hand():
    # Mean 2, sample standard deviation 1, t_{.975, 2} = 4.302653, half: 4.302653 / sqrt(3).
    assert confidence_interval([1, 2, 3]) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-6)
    # Deviations -3 -1 1 3: sd sqrt(20 / 3) = 2.581989, t_{.975, 3} = 3.182446, / sqrt(4): 4.108520.
    assert confidence_interval([0, 2, 4, 6]) == pytest.approx(
        (3 - 4.108520, 3 + 4.108520), abs=1e-6
    )
    assert confidence_interval([5.0, 5.0]) == (5.0, 5.0)
    assert confidence_interval([5.0]) is None
    assert confidence_interval([]) is None


def test_differences_by_hand():
    rows = difference_rows(paired_records())
    expected = {
        "0": (2, 2.484138),
        "1": (2, 4.968276),
        "2": (3, 7.452414),
        "Avg": (7 / 3, 2.484138),
    }
    assert list(rows) == list(expected)
    for name, (mean, half) in expected.items():
        row = rows[name]
        assert (row.algorithm, row.baseline, row.pairs, row.reason) == ("LTDR", "ERM_ViT", 3, "")
        assert row.mean == pytest.approx(mean, abs=1e-9)
        assert (row.ci_low, row.ci_high) == pytest.approx((mean - half, mean + half), abs=1e-6)


def test_only_trials_of_both_are_paired():
    rows = difference_rows(paired_records(leave_out=[("LTDR", 0, 0), ("ERM_ViT", 1, 1)]))
    # Domain 0: trials 1 and 2, differences 2 and 3. Domain 1: trials 0 and 2, differences 0 and 4.
    assert (rows["0"].mean, rows["0"].pairs) == (pytest.approx(2.5), 2)
    assert (rows["1"].mean, rows["1"].pairs) == (pytest.approx(2), 2)
    assert rows["2"].pairs == 3
    # Trial 2 alone has every domain on both sides: (3 + 4 + 3) / 3.
    assert (rows["Avg"].mean, rows["Avg"].pairs) == (pytest.approx(10 / 3), 1)


def test_one_pair_has_no_interval_and_says_so():
    records = [record for record in paired_records() if record["args"]["trial_seed"] == 1]
    for row in difference_rows(records).values():
        assert row.pairs == 1
        assert row.ci_low != row.ci_low
        assert row.ci_high != row.ci_high
        assert row.reason == "no interval: one pair of trials"


@pytest.mark.parametrize(
    ("leave_out", "reason"),
    [
        ([("LTDR", t, 1) for t in range(3)], "LTDR: no run with test_envs [1]"),
        ([("ERM_ViT", t, 1) for t in range(3)], "ERM_ViT: no run with test_envs [1]"),
        (
            [("ERM_ViT", 0, 1), ("LTDR", 1, 1), ("LTDR", 2, 1)],
            "no trial in common (LTDR: 0; ERM_ViT: 1, 2)",
        ),
    ],
)
def test_a_domain_without_pairs_says_why(leave_out, reason):
    rows = difference_rows(paired_records(leave_out=leave_out))
    assert (rows["1"].pairs, rows["1"].reason) == (0, reason)
    assert rows["1"].mean != rows["1"].mean
    assert rows["Avg"].reason == "an average needs every domain"
    assert rows["0"].pairs == 3


def test_an_average_needs_whole_trials_on_both_sides():
    rows = difference_rows(
        paired_records(leave_out=[("LTDR", 0, 0), ("LTDR", 1, 1), ("ERM_ViT", 2, 2)])
    )
    assert [rows[name].pairs for name in ("0", "1", "2", "Avg")] == [2, 2, 2, 0]
    assert rows["Avg"].reason == "no trial has every domain for both"


def test_every_selection_method_and_data_set_has_its_rows():
    records = paired_records() + paired_records(dataset="PACS", leave_out=_without("ERM_ViT"))
    frame = differences_frame(records, baseline="ERM_ViT")
    assert frame.groupby("selection").size().tolist() == [4 + 5] * 3
    pacs = frame[frame["dataset"] == "PACS"]
    assert set(pacs["environment"]) == {"A", "C", "P", "S", "Avg"}
    assert pacs["mean"].isna().all()
    assert pacs["reason"].iloc[0] == "ERM_ViT: no run with test_envs [0]"


def test_a_baseline_must_have_records_and_company():
    with pytest.raises(UsageError, match="GMOE has no records; there are ERM_ViT, LTDR"):
        differences_frame(paired_records(), baseline="GMOE")
    with pytest.raises(UsageError, match="only ERM_ViT has records"):
        differences_frame(paired_records(leave_out=_without("LTDR")), baseline="ERM_ViT")


def test_other_splits_are_not_paired():
    records = paired_records()
    for record in records:
        ltdr = record["args"]["algorithm"] == "LTDR"
        record["args"]["holdout_fraction"] = 0.5 if ltdr else 0.2
    with pytest.raises(UsageError, match=r"holdout_fraction '0.2' and '0.5'.*--allow-mixed"):
        difference_rows(records)
    assert len(difference_rows(records, allow_mixed=True)) == 4


def test_other_backbones_are_named_below_the_tables(tmp_path, capsys):
    records = paired_records()
    for record in records:
        ltdr = record["args"]["algorithm"] == "LTDR"
        record["provenance"] = {"backbone_weights": "vit:in21k" if ltdr else "vit:random"}
    said = (
        "Debug28: LTDR began with the backbone vit:in21k, the baseline ERM_ViT with vit:random: "
        "the difference is not the method's alone"
    )
    assert backbone_notes(records, "ERM_ViT") == [said]
    flags = ["--input_dir", str(write_sweep(tmp_path / "sweep", records)), "--format", "markdown"]
    assert collect_results.main([*flags, "--baseline", "ERM_ViT"]) == 0
    assert said in " ".join(capsys.readouterr().out.split())
    assert collect_results.main(flags) == 0
    assert "began with" not in capsys.readouterr().out
    for record in records:
        if record["args"]["algorithm"] == "LTDR":
            record["provenance"] = None
    assert backbone_notes(records, "ERM_ViT") == backbone_notes(paired_records(), "ERM_ViT") == []


def test_emojidg_is_compared_on_unseen_seen_ceiling_and_gap():
    # Unseen: 40, 42 for LTDR and 38, 42 for ERM_ViT, differences 2 and 0. Seen: 60 and 55. Trained
    # on all styles both reach 50, so the gaps differ by -2 and 0.
    records = []
    for algorithm, unseen, seen in [("LTDR", (0.40, 0.42), 0.60), ("ERM_ViT", (0.38, 0.42), 0.55)]:
        for trial in range(2):
            for test_envs, accuracy in [([0], unseen[trial]), ([1], 0.3), ([], 0.5)]:
                extra = {f"env{env}_unseen_acc": accuracy for env in range(2)}
                extra |= {f"env{env}_unseen_class_acc": accuracy for env in range(2)}
                extra["provenance"] = {"environments": ["twemoji", "openmoji"]}
                runs = {"algorithm": algorithm, "dataset": "EmojiDG", "trial_seed": trial}
                accs = {"in_acc": [seen] * 2, "out_acc": [0.5] * 2}
                records.append(make_record(test_envs, **accs, **runs, **extra))
    frame = differences_frame(records, baseline="ERM_ViT", selection="training-domain")
    first = frame[frame["environment"] == "twemoji"].set_index("metric")
    expected = {"accuracy": 1, "seen": 5, "unseen": 1, "unseen_class": 1, "ceiling": 0, "gap": -1}
    assert first["mean"].to_dict() == pytest.approx(expected)
    # Differences 2 and 0: sd sqrt(2), t_{.975, 1} = 12.706205, half 12.706205 * sqrt(2) / sqrt(2).
    assert first.loc["unseen", "ci_high"] == pytest.approx(1 + 12.706205, abs=1e-5)
    average = frame[(frame["environment"] == "Avg") & (frame["metric"] == "unseen")].iloc[0]
    assert (average["mean"], average["pairs"]) == (pytest.approx(0.5), 2)


FORMATS = {
    "rich": "| LTDR      | +2.0 [-0.5, +4.5] | +2.0 [-3.0, +7.0] | +3.0 [-4.5, +10.5] |",
    "markdown": "| LTDR | +2.0 [-0.5, +4.5] | +2.0 [-3.0, +7.0] | +3.0 [-4.5, +10.5] |",
    "latex": "LTDR & +2.0 [-0.5, +4.5] & +2.0 [-3.0, +7.0] & +3.0 [-4.5, +10.5] &",
    "html": "<td>+2.0 [-0.5, +4.5]</td><td>+2.0 [-3.0, +7.0]</td><td>+3.0 [-4.5, +10.5]</td>",
    "csv": "Debug28,LTDR,0,accuracy_difference,2.0,,3,,ERM_ViT,-0.484138,4.484138\n",
    "json": '"metric": "accuracy_difference",\n   "mean": 2.0,\n   "stderr": null,\n',
}


@pytest.mark.parametrize(("name", "expected"), FORMATS.items())
def test_every_format_shows_them(tmp_path, capsys, name, expected):
    write_sweep(tmp_path, paired_records())
    flags = ["--input_dir", str(tmp_path), "--format", name, "--selection", "training-domain"]
    assert collect_results.main([*flags, "--baseline", "ERM_ViT"]) == 0
    printed = capsys.readouterr().out
    assert expected in printed
    assert collect_results.main(flags) == 0
    assert "difference" not in capsys.readouterr().out


def test_the_table_says_how_and_what_is_missing(tmp_path, capsys):
    leave_out = [("LTDR", 1, 0), ("LTDR", 2, 0), *(("LTDR", t, 1) for t in range(3))]
    write_sweep(tmp_path, paired_records(leave_out=leave_out))
    flags = ["--input_dir", str(tmp_path), "--selection", "oracle", "--baseline", "ERM_ViT"]
    assert collect_results.main(flags) == 0
    printed = capsys.readouterr().out
    assert "Debug28: test accuracy minus that of ERM_ViT, in points, selected by test-" in printed
    assert "| LTDR      | +1.0 | X | +3.0 [-4.5, +10.5] |   X | 1 to 3 |" in printed
    assert "X at 1: LTDR: no run with test_envs [1]" in printed
    assert "no interval at 0: one pair of trials\n" in printed
    assert "[95 % confidence interval, Student's t]" in printed


@pytest.mark.parametrize("flags", [["--latex"], ["--format", "domainbed"]])
def test_domainbeds_text_has_none(tmp_path, capsys, flags):
    write_sweep(tmp_path, paired_records())
    arguments = ["--input_dir", str(tmp_path), *flags, "--baseline", "ERM_ViT"]
    assert collect_results.main(arguments) == 2
    assert capsys.readouterr().err == (
        "error: --baseline adds tables that DomainBed's text does not have; choose another "
        "--format\n"
    )


def _without(algorithm):
    return [(algorithm, trial, env) for trial in range(3) for env in range(3)]
