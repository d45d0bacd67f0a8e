"""What a step costs, from records made by hand."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from sweep_records import make_record, write_sweep

from domainbed_ext.costs import costs_frame
from domainbed_ext.errors import UsageError
from domainbed_ext.records import load_records
from domainbed_ext.scripts import collect_results

ACC = {"in_acc": [0.5, 0.5, 0.5], "out_acc": [0.5, 0.5, 0.5]}


def job(algorithm, times, experts=None, *, device="cpu", trial_seed=0):
    for step, seconds in enumerate(times):
        extra = {} if experts is None else {"experts_per_token": experts[step]}
        yield make_record(
            [0],
            algorithm=algorithm,
            trial_seed=trial_seed,
            step=100 * step,
            step_time=seconds,
            provenance={"device": device},
            **ACC,
            **extra,
        )


RECORDS = [
    *job("ERM_ViT", [9.0, 1.0, 1.2, 1.1]),  # the first record is left out: median 1.1
    *job("GMOE", [9.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]),
    *job("LTDR", [9.0, 3.0, 2.5, 9.0], [3.0, 3.5, 4.0, 3.5]),  # median 3
    *job("LTDR", [9.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0], trial_seed=1),
]


def rows(records, relative_to="GMOE"):
    frame = costs_frame(records, relative_to=relative_to).set_index("algorithm")
    return frame[["experts_per_token", "relative_step_time", "jobs"]]


def test_numbers():
    frame = rows(RECORDS)
    assert list(frame.index) == ["ERM_ViT", "GMOE", "LTDR"]
    assert math.isnan(frame.loc["ERM_ViT", "experts_per_token"])
    assert frame.loc["ERM_ViT", "relative_step_time"] == pytest.approx(0.55)
    assert frame.loc["GMOE"].tolist() == [1.0, 1.0, 1]
    # eight records: 3, 3.5, 4, 3.5 and four times 3; median of 3, 2.5, 9, 3, 3, 3 over 2
    assert frame.loc["LTDR"].tolist() == [26 / 8, 1.5, 2]


def test_times_of_different_devices_are_not_compared():
    records = [*job("GMOE", [9, 2.0]), *job("LTDR", [9, 0.1], [2, 2], device="a GPU")]
    frame = rows(records)
    assert pd.isna(frame.loc["LTDR", "relative_step_time"])
    both = rows([*records, *job("GMOE", [9, 0.05], device="a GPU", trial_seed=1)])
    assert both.loc["LTDR", "relative_step_time"] == pytest.approx(2.0)


def test_an_algorithm_that_did_not_run():
    with pytest.raises(UsageError, match=r"--costs STGC: no job of that algorithm.*GMOE, LTDR"):
        costs_frame(RECORDS, relative_to="STGC")


def test_command_line(tmp_path, capsys):
    folder = write_sweep(tmp_path / "sweep", RECORDS)
    command = ["--input_dir", str(folder), "--costs", "GMOE"]
    assert collect_results.main([*command, "--format", "markdown"]) == 0
    table = capsys.readouterr().out.split("### Debug28: what a step costs\n")[1]
    assert "| Algorithm | experts per token | time / GMOE's | jobs |" in table
    assert "| ERM_ViT | - | 0.55 | 1 |" in table
    assert "| LTDR | 3.25 | 1.50 | 2 |" in table
    assert collect_results.main([*command, "--format", "csv"]) == 0
    frame = pd.read_csv(folder / "results.csv")
    costs = frame[frame["metric"] == "experts_per_token"].set_index("algorithm")["mean"]
    assert costs["LTDR"] == pytest.approx(3.25)
    assert len(load_records(folder)) == len(RECORDS)
    assert collect_results.main([*command, "--format", "domainbed"]) == 2
    assert "--costs adds tables that DomainBed's text does not have" in capsys.readouterr().err
