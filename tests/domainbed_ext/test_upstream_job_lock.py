"""A checkout's train program holds its job as ours do, and gives it back however it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_checkout import write_checkout

from domainbed_ext import upstream_launcher
from domainbed_ext.exit_status import EXIT_BUSY
from domainbed_ext.job_locks import job_lock
from domainbed_ext.jobs import JobState, job_state
from domainbed_ext.upstream_launcher import ltdr_local

ROOT = Path(__file__).resolve().parents[2]
# In the order of DomainBed's: imports, flags, the folder and its log, hyper-parameters, `done`.
TRAIN = """
import multiprocessing, os, sys
from domainbed import hparams_registry

def workers_hold_nothing(queue):
    queue.put("a worker")

if __name__ == "__main__":
    if "--help" in sys.argv:
        raise SystemExit(0)
    folder = sys.argv[sys.argv.index("--output_dir") + 1]
    os.makedirs(folder, exist_ok=True)
    open(os.path.join(folder, "err.txt"), "a").write("begun\\n")
    hparams_registry.default_hparams("ERM", "PACS")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=workers_hold_nothing, args=(queue,))
    worker.start()
    print("held with", queue.get(timeout=60), flush=True)
    worker.join()
    if sys.stdin.read() == "finish":
        open(os.path.join(folder, "done"), "w").write("done")
"""


@pytest.fixture
def train(tmp_path):
    """Starts the stand-in's train program with some flags."""
    checkout = write_checkout(tmp_path / "checkout")
    (checkout / "domainbed" / "scripts" / "train.py").write_text(TRAIN)
    start = tmp_path / "start"
    start.mkdir()
    (start / "sitecustomize.py").write_text("import domainbed_ext._startup\n")
    env = {k: v for k, v in os.environ.items() if k != "DOMAINBED_EXT"}
    env["PYTHONPATH"] = os.pathsep.join([str(start), str(ROOT)])
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}

    def train(*flags, **variables):
        command = [sys.executable, "-m", "domainbed.scripts.train", *map(str, flags)]
        return subprocess.Popen(command, cwd=checkout, env=env | variables, text=True, **pipes)

    return train


def test_it_is_held_while_it_runs_and_free_when_killed(train, tmp_path):
    folder = tmp_path / "job"
    with train("--output_dir", folder) as holder:
        assert holder.stdout.readline() == "held with a worker\n", holder.stderr.read()
        assert job_state(folder) is JobState.RUNNING
        second = train("--output_dir", folder)
        _, said = second.communicate("finish")
        assert second.returncode == EXIT_BUSY
        assert said == f"error: {folder} is in use by another process\n"
        other_rank = train("--output_dir", folder, RANK="1")
        assert other_rank.communicate("")[0] == "held with a worker\n"
        holder.kill()
    assert job_state(folder) is JobState.INCOMPLETE
    # nothing of the one that was refused
    assert (folder / "err.txt").read_text() == "begun\nbegun\n"


def test_a_job_that_is_done_has_no_lock(train, tmp_path):
    finished = train("--output_dir", tmp_path / "job")
    assert finished.communicate("finish")[1] == ""
    assert sorted(path.name for path in (tmp_path / "job").iterdir()) == ["done", "err.txt"]
    with job_lock(tmp_path / "job"):  # nor does it lock what comes later
        pass


@pytest.mark.parametrize(("name", "runs"), [("0123456789abcdef" * 2, False), ("by hand", True)])
def test_a_sweeps_job_that_others_have_done_is_not_run_again(train, tmp_path, name, runs):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "done").touch()
    waited = train("--output_dir", folder)
    said, errors = waited.communicate("finish")
    assert waited.returncode == 0
    assert (folder / "err.txt").exists() == bool(said) == runs
    assert errors == ("" if runs else f"{folder} is done already\n")


def test_asking_for_help_makes_no_folder(train, tmp_path):
    asked = train("--output_dir", tmp_path / "job", "--help")
    asked.communicate()
    assert asked.returncode == 0
    assert not (tmp_path / "job").exists()


def test_our_launcher_passes_over_what_others_have(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(upstream_launcher, "cuda_devices", list)
    held, done, busy = (tmp_path / name for name in ("held", "done", "busy"))
    done.mkdir()
    (done / "done").touch()
    ran = tmp_path / "ran"
    with train("--output_dir", held) as holder:
        holder.stdout.readline()
        code = f"open({str(ran)!r}, 'a').write('x')"
        jobs = [f'python -c "{code}" --output_dir {folder}' for folder in (held, done)]
        jobs.append(f'python -c "raise SystemExit({EXIT_BUSY})" --output_dir {busy}')
        ltdr_local(jobs)
        holder.communicate("")
    assert not ran.exists()
    assert capsys.readouterr().err.splitlines() == [
        f"{held}: in use by another process",
        f"{done}: done by another process",
        f"{busy}: in use by another process",
    ]
