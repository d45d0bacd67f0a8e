"""The launcher that a checkout's sweep can use: this interpreter, and an exit status."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from domainbed_ext import upstream_launcher
from domainbed_ext.launchers.slurm import SlurmLauncher
from domainbed_ext.upstream_launcher import ltdr_local


def job(code, folder="some/folder"):
    return f"python -c {shlex.quote(code)} --output_dir {shlex.quote(str(folder))}"


def test_jobs_run_with_this_interpreter(tmp_path, monkeypatch):
    monkeypatch.setattr(upstream_launcher, "cuda_devices", list)
    monkeypatch.setenv("PATH", "")
    for name in ("a", "b c"):
        code = f"import sys; open({str(tmp_path / name)!r}, 'w').write(sys.executable)"
        ltdr_local([job(code)])
        assert (tmp_path / name).read_text() == sys.executable


def test_failed_jobs_make_it_fail_after_all_have_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(upstream_launcher, "cuda_devices", list)
    jobs = [job("raise SystemExit(4)", "out/1"), job(f"open({str(tmp_path / 'ran')!r}, 'w')")]
    with pytest.raises(SystemExit) as stopped:
        ltdr_local(jobs)
    assert stopped.value.code == 1
    assert (tmp_path / "ran").exists()
    said = capsys.readouterr().err
    assert said.startswith("error: 1 of 2 jobs failed;")
    assert said.endswith("\n  out/1 (exit status 4)\n")


def test_each_device_gets_one_job_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(upstream_launcher, "cuda_devices", lambda: ["2", "5"])
    code = (
        "import os, time; d = os.environ['CUDA_VISIBLE_DEVICES'];"
        f"f = os.path.join({str(tmp_path)!r}, d); os.mkdir(f); time.sleep(0.2); os.rmdir(f);"
        f"open(f + '.log', 'a').write('x')"
    )
    ltdr_local([job(code)] * 4)
    logs = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert sorted(logs) == ["2.log", "5.log"]
    assert sum(map(len, logs.values())) == 4


def test_nothing_to_do_is_no_failure():
    ltdr_local([])


def test_slurm_gets_one_task_for_each_job(monkeypatch, tmp_path):
    submitted = []
    monkeypatch.setattr(SlurmLauncher, "check", lambda self: None)
    monkeypatch.setattr(
        SlurmLauncher,
        "submit",
        lambda self, task, jobs: submitted.append((self.output_dir, task, jobs)),
    )
    upstream_launcher.ltdr_slurm([job("pass", tmp_path / "a"), job("pass", tmp_path / "b")])
    ((folder, task, jobs),) = submitted
    assert (folder, task) == (str(tmp_path), upstream_launcher.run_task)
    assert [arguments[0] for arguments in jobs] == [sys.executable] * 2
    upstream_launcher.ltdr_slurm([])
    assert len(submitted) == 1


def test_without_slurm_the_sweep_ends_with_one_line(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as stopped:
        upstream_launcher.ltdr_slurm([job("pass")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: --command_launcher slurm ")


@pytest.mark.parametrize("restarts", [None, "1"])
def test_a_job_that_slurm_starts_again_begins_anew(monkeypatch, tmp_path, restarts):
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    if restarts:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    records = tmp_path / "results.jsonl"
    records.write_text("left\n")
    code = f"open({str(records)!r}, 'a').write('new\\n')"
    upstream_launcher.run_task([sys.executable, "-c", code, "--output_dir", str(tmp_path)])
    assert records.read_text() == ("new\n" if restarts else "left\nnew\n")
    with pytest.raises(subprocess.CalledProcessError):
        upstream_launcher.run_task([sys.executable, "-c", "raise SystemExit(1)"])
