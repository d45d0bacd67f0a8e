"""The benchmark scripts run, check before they time, and write rows that name their origin."""

import csv
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def bench_dispatch(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_dispatch

    yield bench_dispatch
    for name in ("bench_dispatch", "bench_train", "bench_routers", "benchmarking"):
        sys.modules.pop(name, None)


SMALL = ["--images", "2", "--tokens", "5", "--dim", "8", "--hidden-dim", "16", "--rounds", "2"]


def test_rows_say_what_and_where(bench_dispatch, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    arguments = [*SMALL, "--plans", "ltdr", "--backends", "blocked", "dense", "--output", str(path)]
    assert bench_dispatch.main(arguments) == 0
    assert bench_dispatch.main(arguments) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    # the dense network, and each back end with and without router, twice
    assert len(rows) == 2 * (1 + 2 * 2)
    assert rows[0]["backend"] == "ffn"
    assert float(rows[0]["ratio"]) == 1
    assert all(float(row["ms_forward"]) > 0 for row in rows)
    assert all(row["device"] and row["torch"] and row["commit"] for row in rows)
    assert "blocked" in capsys.readouterr().out


def test_a_wrong_back_end_gets_no_time(bench_dispatch, monkeypatch, capsys):
    from gmoe_ltdr import expert_backends

    right = expert_backends.EXPERT_BACKENDS["loop"]
    monkeypatch.setitem(
        expert_backends.EXPERT_BACKENDS, "loop", lambda *arguments: right(*arguments) * 1.01
    )
    arguments = [*SMALL, "--plans", "top2", "--backends", "loop", "--no-csv"]
    assert bench_dispatch.main(arguments) == 1
    out = capsys.readouterr().out
    assert "loop, top2: WRONG" in out
    assert "top2" not in out.split("not timed")[1]


def test_whole_steps(bench_dispatch, tmp_path):
    import bench_train

    path = tmp_path / "rows.csv"
    arguments = ["--backbone", "vit_dim64_patch4_16", "--batch-size", "2", "--rounds", "1"]
    arguments += ["--models", "ltdr-4top2", "--warmup", "0", "--output", str(path)]
    assert bench_train.main(arguments) == 0
    with path.open(newline="") as file:
        dense, sparse = csv.DictReader(file)
    assert dense["model"] == "dense"
    assert 1 < float(sparse["flop_ratio"]) < 4
    assert 2 <= float(sparse["experts_per_token"]) <= 4


def test_routers_are_compared_with_gmoe(bench_dispatch, tmp_path, capsys):
    import bench_routers

    path = tmp_path / "rows.csv"
    small = ["--dataset", "Debug28", "--image_size", "28", "--batch_size", "2", "--rounds", "1"]
    names = ["ERM_ViT", "TASK"]
    assert bench_routers.main(["--algorithms", *names, *small, "--output", str(path)]) == 0
    with path.open(newline="") as file:
        rows = {row["algorithm"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["GMOE", *names]
    assert float(rows["GMOE"]["time"]) == 1
    assert rows["ERM_ViT"]["experts"] == ""
    assert float(rows["TASK"]["experts"]) == 2
    # two sparse layers: five further experts of 64 x 256 each, and what routes to them
    dense = int(rows["ERM_ViT"]["parameters"])
    assert int(rows["ERM_ViT"]["extra"]) == 0
    experts = 2 * 5 * (2 * 64 * 256 + 64 + 256)
    gate = 2 * (64 * 256 + 256 + 256 * 6 + 1)
    assert int(rows["GMOE"]["parameters"]) == dense + experts + gate
