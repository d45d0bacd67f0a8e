"""Slurm, through submitit: what is asked of it, and jobs that really run, are warned and go on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import stat
import time
from pathlib import Path

import pytest

from domainbed_ext.errors import UsageError
from domainbed_ext.jobs import JobState, job_state
from domainbed_ext.launchers import TRAIN_MODULE, slurm
from domainbed_ext.launchers.slurm import SlurmLauncher, TrainTask, parse_minutes
from domainbed_ext.records import read_records
from domainbed_ext.scripts.sweep import main

pytest.importorskip("submitit")
JOBS = (
    "--datasets Debug28 --algorithms ERM_ViT --n_hparams 1 --n_trials 1 --single_test_envs "
    "--skip_confirmation --device cpu --skip_model_save --command_launcher slurm"
).split()


@pytest.mark.parametrize(
    ("text", "minutes"),
    [  # the forms that sbatch --time lists
        ("90", 90),
        ("90:00", 90),
        ("90:30", 91),
        ("1:30:00", 90),
        ("12:00:00", 720),
        ("2-0", 2880),
        ("1-12:30", 1440 + 750),
        ("0-0:00:30", 1),
    ],
)
def test_times_are_slurms(text, minutes):
    assert parse_minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "abc", "-1", "1h", "1:2:3:4", "0", "1-"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(UsageError, match=f"--slurm_time {re.escape(text)} is"):
        parse_minutes(text)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"slurm_option": ["account"]}, "--slurm_option account is not KEY=VALUE"),
        ({"slurm_gpus": 1, "gpus_per_job": 2}, "--slurm_gpus 1 is less than --gpus_per_job 2"),
        ({"slurm_cpus": 0}, "--slurm_cpus 0 is too small"),
        ({"slurm_array_parallelism": 0}, "--slurm_array_parallelism 0 is too small"),
        ({"jobs": 0}, "--jobs 0 is too small"),
        ({}, "finds no `sbatch` here"),
    ],
)
def test_what_cannot_be_is_refused(monkeypatch, settings, said):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match=said):
        SlurmLauncher(output_dir="sweep", **settings).check()


def test_without_submitit_the_way_to_get_it_is_told(monkeypatch):
    monkeypatch.setattr(slurm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install submitit.*\[slurm\]"):
        SlurmLauncher(output_dir="sweep").check()


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """Slurm's commands, in which jobs only wait: a folder with what was submitted."""
    queue, programs = tmp_path / "queue", tmp_path / "bin"
    queue.mkdir()
    programs.mkdir()
    script = f'#!/bin/sh\nn=$(ls {queue} | wc -l)\ncp "$1" {queue}/$n\necho "Submitted job 4$n"\n'
    for name, text in {"sbatch": script, "srun": "#!/bin/sh\n"}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return queue


def test_one_array_with_a_task_for_each_job(tmp_path, sbatch, capsys):
    flags = (
        "--slurm_partition gpus --slurm_time 1-0 --slurm_memory_gb 20 --slurm_cpus 6 "
        "--slurm_option account=vision --slurm_option exclusive= --jobs 2"
    ).split()
    out = tmp_path / "sweep"
    assert main([*JOBS, *flags, "--output_dir", str(out)]) == 0
    (script,) = sbatch.iterdir()
    lines = script.read_text().splitlines()
    for line in (
        "--array=0-2%2",
        "--partition=gpus",
        "--time=1440",
        "--mem=20GB",
        "--cpus-per-task=6",
        "--account=vision",
        "--exclusive",
        "--requeue",
        "--signal=USR2@180",
    ):
        assert f"#SBATCH {line}" in lines
    said = capsys.readouterr().out
    assert f"Submitted 3 jobs, as 40; logs in {out / 'slurm'}." in said
    assert "`squeue -j 40` tells" in said
    assert "`ltdr sweep status` with the same flags" in said


def test_gpus_are_those_of_a_job(sbatch, tmp_path):
    for settings, expected in (
        ({}, "--gpus-per-node=1"),
        ({"gpus_per_job": 4}, "--gpus-per-node=4"),
        ({"slurm_gpus": 2}, "--gpus-per-node=2"),
        ({"device": "cpu"}, None),
    ):
        launcher = SlurmLauncher(output_dir=str(tmp_path), **settings)
        launcher.check()
        launcher.submit(print, ["x", "y"])
        script = max(sbatch.iterdir(), key=lambda path: int(path.name)).read_text()
        found = re.search(r"--gpus-per-node=\d+", script)
        assert (found and found.group()) == expected


def test_an_array_is_no_larger_than_slurm_takes(sbatch, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "MAX_ARRAY", 2)
    SlurmLauncher(output_dir=str(tmp_path), jobs=5).submit(print, list("abcd"))
    arrays = [re.search(r"--array=(\S+)", file.read_text())[1] for file in sbatch.iterdir()]
    assert arrays == ["0-1%2", "0-1%2"]


def test_what_sbatch_says_against_it_is_told(tmp_path, sbatch, capsys):
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 'invalid partition' >&2; exit 1\n")
    assert main([*JOBS, "--output_dir", str(tmp_path / "sweep")]) == 2
    error = capsys.readouterr().err
    assert error.endswith("error: the jobs could not be submitted: invalid partition\n")


class Ended:
    """A process of a job that ends at once; the first ones find the job in use."""

    outcomes: list = []  # noqa: RUF012

    def __init__(self, command, job):
        pass

    def has_ended(self):
        return True

    def outcome(self):
        return self.outcomes.pop(0)


@pytest.mark.parametrize(
    ("restarts", "outcomes", "expected"),
    [
        (None, ["done"], "done"),
        (None, ["in use by another process"], "in use by another process"),
        # started again after its machine died, whose lock outlives it
        ("1", ["in use by another process"] * 2 + ["done"], "done"),
        (None, ["diverged"], None),
    ],
)
def test_what_a_task_ends_with(monkeypatch, restarts, outcomes, expected):
    monkeypatch.setattr(slurm, "JobProcess", Ended)
    monkeypatch.setattr(Ended, "outcomes", outcomes)
    monkeypatch.setattr(slurm, "_LOCK_POLL_SECONDS", 0)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    if restarts:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    command = ["python", "-m", TRAIN_MODULE, "--output_dir", "here"]
    handler = signal.getsignal(signal.SIGTERM)
    if expected is None:
        with pytest.raises(RuntimeError, match="here: diverged"):
            TrainTask()(command)
    else:
        assert TrainTask()(command) == expected
    assert outcomes == []
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.slow
def test_jobs_really_run_are_warned_and_go_on(tmp_path, capsys):
    """Two jobs in submitit's processes. One is warned as by Slurm, saves, is started again."""
    flags = ["--output_dir", str(tmp_path), "--slurm_cluster", "local", "--test_envs", "0", "1"]
    assert main([*JOBS, *flags, "--steps", "400"]) == 0
    (first,) = re.findall(r"as (\d+); logs", capsys.readouterr().out)
    with contextlib.ExitStack() as controllers:
        pids = [int(path.name) for path in (tmp_path / "slurm").iterdir() if path.name.isdigit()]
        for pid in pids:
            controllers.callback(end_group, pid)
        assert int(first) in pids
        wait_for(lambda: len(list(tmp_path.glob("*/results.jsonl"))) == 2)
        (task,) = children(pids[0])
        os.kill(task, signal.SIGUSR2)
        wait_for(lambda: len(list(tmp_path.glob("*/done"))) == 2)
    outputs = [path.read_text() for path in tmp_path.glob("*/out.txt")]
    assert sorted(text.count("Going on after step") for text in outputs) == [0, 1]
    errors = [path.read_text() for path in tmp_path.glob("*/err.txt")]
    assert sorted(errors)[0] == ""
    assert re.fullmatch(
        r"stopped after step \d+; the same command goes on from there\n", max(errors)
    )
    for path in tmp_path.glob("*/results.jsonl"):
        assert read_records(path)[-1]["step"] == 399
        assert job_state(path.parent) is JobState.DONE


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def end_group(pid):
    with contextlib.suppress(OSError):
        for child in children(pid):
            os.kill(child, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
