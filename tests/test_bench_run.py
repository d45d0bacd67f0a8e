"""scripts/bench_run.py compares runs that did the same work, and says where its rows come from."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def bench_run(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_run

    yield bench_run
    for name in ("bench_run", "bench_photos", "benchmarking"):
        sys.modules.pop(name, None)


def lines(steps, splits):
    return [json.dumps({"step": step, **{f"{s}_acc": 0.5 for s in splits}}) for step in steps]


def of_upstream(command):
    return any("'domainbed.scripts.train'" in word for word in command)


EVERY = ["env0_in", "env0_out", "env1_in", "env1_out"]
SOME = ["env0_in", "env0_out", "env1_out"]


def test_only_equal_work_is_compared(bench_run):
    whole = lines([0, 4], EVERY)
    bench_run.check_same_work({"upstream": whole, "warm": whole, "needed": lines([0, 4], SOME)})
    for wrong in (
        {"upstream": whole, "warm": lines([0, 4], SOME)},
        {"upstream": whole, "warm": lines([0, 3], EVERY)},
        {"warm": whole, "needed": whole},
    ):
        with pytest.raises(SystemExit, match="has not done the same work"):
            bench_run.check_same_work(wrong)


def test_processor_time_is_that_of_a_process_and_its_children(bench_run):
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}], check=True)"
    seconds = bench_run.run([sys.executable, "-c", code], None)
    assert 0.3 <= seconds.cpu < 3
    with pytest.raises(SystemExit, match=r"status 1 of .*\nmy reason"):
        bench_run.run([sys.executable, "-c", "raise SystemExit('my reason')"], None)


@pytest.mark.parametrize("checkout", [None, "/checkout"])
def test_rows(bench_run, monkeypatch, tmp_path, capsys, checkout):
    """With runs that only pretend: DomainBed's take three seconds, ours one or less."""
    commands = []

    def pretend(command, cwd):
        commands.append(command)
        folder = Path(command[command.index("--output_dir") + 1])
        folder.mkdir()
        if "--n_trials" in command:  # a sweep of so many jobs
            jobs = int(command[command.index("--n_trials") + 1])
            return bench_run.Seconds(10 + 0.5 * jobs, 10 + 0.75 * jobs)
        splits = SOME if "needed" in command else EVERY
        (folder / "results.jsonl").write_text("\n".join(lines([0, 2], splits)))
        upstream = of_upstream(command)
        return bench_run.Seconds(3.0, 6.0) if upstream else bench_run.Seconds(1.0, 2.0)

    monkeypatch.setattr(bench_run, "run", pretend)
    if checkout is None:
        monkeypatch.delenv("DOMAINBED_DIR", raising=False)
    else:
        monkeypatch.setenv("DOMAINBED_DIR", checkout)
    path = tmp_path / "rows.csv"
    flags = ["--workloads", "photos", "--per-class", "1", "--rounds", "2", "--output", str(path)]
    assert bench_run.main(flags) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    photos = [row for row in rows if row["workload"] == "photos"]
    ours = ["cold", "warm", "needed"]
    assert [row["case"] for row in photos] == (["upstream", *ours] if checkout else ours)
    assert all(row["device"] and row["torch"] and row["commit"] for row in rows)
    out = capsys.readouterr().out
    assert "28 JPEG files in 4 domains of 7 classes" in out
    if checkout is None:
        assert "only our own runs are timed" in out
        assert "wall_ratio" not in rows[0]
    else:
        assert [row["wall_ratio"] for row in photos] == ["1.00", "3.00", "3.00", "3.00"]
        assert [row["cpu_ratio"] for row in photos] == ["1.00", "3.00", "3.00", "3.00"]
        job = next(row for row in rows if row["workload"] == "one more job")
        assert (job["wall_s"], job["cpu_s"]) == ("0.50", "0.75")
        assert (job["wall_ratio"], job["cpu_ratio"]) == ("6.00", "8.00")
        trained = [c for c in commands if "PACS" in c]
        # The cases take turns, with the same flags.
        assert [of_upstream(command) for command in trained] == [True, False, False, False] * 2
        common = {tuple(c[c.index("--algorithm") : c.index("--skip_model_save")]) for c in trained}
        assert len(common) == 1


def test_photos_are_the_same_every_time(bench_run, tmp_path):
    from bench_photos import write_photos

    for name in ("a", "b"):
        assert write_photos(tmp_path / name, ["x", "y"], 2, per_class=1) == 4
    contents = [
        {path.relative_to(tmp_path / name): path.read_bytes() for path in files}
        for name in ("a", "b")
        for files in [sorted((tmp_path / name).rglob("*.jpg"))]
    ]
    assert contents[0] == contents[1]
    assert len(set(contents[0].values())) == 4
