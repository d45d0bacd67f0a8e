"""The launcher that a checkout's sweep can use: this interpreter, and an exit status."""

from __future__ import annotations

import shlex
import sys

import pytest

from domainbed_ext import upstream_launcher
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
    jobs = [job("raise SystemExit(3)", "out/1"), job(f"open({str(tmp_path / 'ran')!r}, 'w')")]
    with pytest.raises(SystemExit) as stopped:
        ltdr_local(jobs)
    assert stopped.value.code == 1
    assert (tmp_path / "ran").exists()
    said = capsys.readouterr().err
    assert said.startswith("error: 1 of 2 jobs failed;")
    assert said.endswith("\n  out/1 (exit status 3)\n")


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
