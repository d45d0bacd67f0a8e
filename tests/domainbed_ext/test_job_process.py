"""Jobs in processes of their own: what became of them, and that they hear when they are to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from domainbed_ext.job_files import mark_failed, read_failure
from domainbed_ext.job_process import TORCHRUN_MODULE, JobProcess, launcher_is_gone
from domainbed_ext.train_args import TrainArgs

ROOT = Path(__file__).resolve().parents[2]


def run(folder, code, *arguments):
    process = JobProcess([sys.executable, "-c", code, *arguments], TrainArgs(output_dir=folder))
    process.wait()
    return process.outcome()


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (0, "done"),
        (3, "in use by another process"),
        (130, "interrupted"),
        (143, "stopped, to be gone on with"),
    ],
)
def test_exit_statuses_tell_what_became_of_a_job(tmp_path, status, expected):
    assert run(tmp_path, f"raise SystemExit({status})") == expected
    assert list(tmp_path.iterdir()) == []


def test_a_reason_that_is_there_is_kept(tmp_path):
    mark_failed(tmp_path, reason="error", message="an image is damaged")
    assert run(tmp_path, "raise SystemExit(1)") == "failed"
    assert read_failure(tmp_path)["message"] == "an image is damaged"
    mark_failed(tmp_path, reason="diverged", message="loss is nan")
    assert run(tmp_path, "raise SystemExit(1)") == "diverged"


def test_a_job_that_could_not_say_why_gets_what_its_process_said(tmp_path):
    folder = tmp_path / "new"
    assert run(folder, "import no_such_module") == "failed"
    assert read_failure(folder)["reason"] == "died"
    text = (folder / "err.txt").read_text()
    assert "No module named 'no_such_module'" in text
    assert text.endswith("error: a process of the job died (exit status 1)\n")


def test_torchrun_has_no_status_for_a_stop(tmp_path):
    progress = {"host": "a", "pid": 1, "started": 0.0, "updated": 0.0, "phase": "stopped"}
    (tmp_path / "progress.json").write_text(json.dumps(progress))
    assert run(tmp_path, "raise SystemExit(1)") == "stopped, to be gone on with"
    assert read_failure(tmp_path) is None


WAITS = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(143))
Path(sys.argv[1]).touch()
time.sleep(60)
"""


def test_a_job_is_told_to_stop_and_may_be_told_twice(tmp_path):
    ready = tmp_path / "ready"
    process = JobProcess(
        [sys.executable, "-c", WAITS, str(ready)], TrainArgs(output_dir=tmp_path / "job")
    )
    wait_for(ready.exists)
    assert not process.has_ended()
    process.ask_to_stop()
    process.wait()
    process.ask_to_stop()
    assert process.has_ended()
    assert process.outcome() == "stopped, to be gone on with"


JOB = """
import sys, time
from pathlib import Path
from domainbed_ext.job_process import launcher_is_gone
assert not launcher_is_gone()
Path(sys.argv[1]).touch()
while not launcher_is_gone():
    time.sleep(0.02)
Path(sys.argv[2]).touch()
"""
LAUNCHER = """
import sys, time
from domainbed_ext.job_process import JobProcess
from domainbed_ext.train_args import TrainArgs
job = JobProcess([sys.executable, "-c", *sys.argv[1:]], TrainArgs(output_dir="job"))
time.sleep(300)
"""


def test_a_job_notices_that_its_launcher_was_killed(tmp_path):
    assert not launcher_is_gone()  # of a process that nobody has launched
    begun, noticed = tmp_path / "begun", tmp_path / "noticed"
    command = [sys.executable, "-c", LAUNCHER, JOB, str(begun), str(noticed)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, cwd=tmp_path) as launcher:
        wait_for(begun.exists)
        assert not noticed.exists()
        launcher.kill()
    wait_for(noticed.exists)


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_torchrun_ignores_what_slurm_sends_to_all(tmp_path):
    out = tmp_path / "out"
    code = (
        "import signal, sys; names = [signal.getsignal(n).name for n in (15, 10, 12)];"
        "open(sys.argv[-1], 'w').write(' '.join(names))"
    )
    # a command that looks like torchrun's to the launcher, and is none
    command = [sys.executable, f"-c{code}", TORCHRUN_MODULE, str(out)]
    process = JobProcess(command, TrainArgs(output_dir=tmp_path / "job"))
    process.wait()
    assert process.outcome() == "done"
    assert out.read_text() == "SIG_DFL SIG_IGN SIG_IGN"
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
