"""`scripts/compare_routers.sh`: what it refuses, and a tiny run of it from data to tables."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from emoji_fakes import write_cache

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "compare_routers.sh"


def compare(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True
    )


def test_the_script_is_bash_and_explains_itself():
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    done = compare("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Compares all routers")
    assert "TRIALS" in done.stdout
    assert "set -euo" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["--size"], {}, "--size takes cpu or gpu"),
        (["--fast"], {}, "unknown argument --fast"),
        ([], {"PYTHON": "no-such-python"}, "no-such-python cannot import the package"),
        (["--size=cpu"], {"ALGORITHMS": "GMOE DISTILL"}, "ALGORITHMS lacks LTDR"),
    ],
)
def test_bad_input_is_refused_before_anything_is_run(tmp_path, arguments, variables, message):
    done = compare(*arguments, **{"OUTPUT": str(tmp_path / "sweep"), **variables})
    assert done.returncode == 2
    assert f"error: {message}" in done.stderr
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_from_data_to_tables_and_again(tmp_path):
    """Half a minute: 2 steps of 2 images, openmoji held out and the ceiling, one trial."""
    write_cache(tmp_path / "data")
    variables = {
        "DATA_DIR": str(tmp_path / "data"),
        "OUTPUT": str(tmp_path / "sweep"),
        "RESULTS": str(tmp_path / "results"),
        "ALGORITHMS": "LTDR GROUPS DISTILL",
        "STEPS": "2",
        "BATCH_SIZE": "2",
        "TRIALS": "1",
    }
    done = compare("--size", "cpu", **variables)
    assert done.returncode == 0, done.stderr
    table = tmp_path / "results" / "tables" / "routers_emojidg.md"
    assert table.read_text() in done.stdout

    jobs = sorted((tmp_path / "results" / "records" / "routers_emojidg").iterdir())
    assert all({p.name for p in job.iterdir()} == {"done", "results.jsonl"} for job in jobs)
    records = [json.loads((j / "results.jsonl").read_text().splitlines()[-1]) for j in jobs]
    found = sorted((r["args"]["algorithm"], r["args"]["test_envs"]) for r in records)
    assert found == [(name, envs) for name in ("DISTILL", "GROUPS", "LTDR") for envs in ([], [1])]
    for record in records:
        is_groups = record["args"]["algorithm"] == "GROUPS"
        expected = "vit_dim128_stem16_reg1_64" if is_groups else "vit_dim128_stem16_64"
        assert record["hparams"]["backbone"] == expected
        assert (record["step"], record["hparams"]["batch_size"]) == (1, 2)

    with table.with_suffix(".csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["mean"]]
    openmoji = {(r["algorithm"], r["metric"]) for r in rows if r["environment"] == "openmoji"}
    everyone = ("LTDR", "GROUPS", "DISTILL")
    for metric in ("accuracy", "seen", "unseen", "ceiling", "gap"):
        assert {(name, metric) for name in everyone} <= openmoji
        assert {(name, f"{metric}_difference") for name in everyone[1:]} <= openmoji
    experts = {r["algorithm"]: float(r["mean"]) for r in rows if r["metric"] == "experts_per_token"}
    assert experts.keys() == {"LTDR", "GROUPS"}
    assert experts["GROUPS"] == 1

    before = {job: (job / "results.jsonl").read_bytes() for job in jobs}
    again = compare("--size", "cpu", **variables)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("Nothing to launch.") == 2
    assert {job: (job / "results.jsonl").read_bytes() for job in jobs} == before
