"""Jobs: folder names, states, locks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from domainbed_ext import job_locks, jobs
from domainbed_ext.errors import UsageError
from domainbed_ext.job_files import make_folder, mark_done, mark_failed
from domainbed_ext.job_locks import JobBusyError, job_lock
from domainbed_ext.jobs import Job, JobState, delete_job, taken_by_others
from domainbed_ext.scripts.train import parse_args
from domainbed_ext.sweep_flags import build_parser
from domainbed_ext.train_args import TrainArgs, run_identity

ROOT = Path(__file__).resolve().parents[2]

# The keys of "args" in a record that DomainBed b93c22a writes.
UPSTREAM_ARGS = (
    "algorithm checkpoint_freq data_dir dataset holdout_fraction hparams hparams_seed output_dir "
    "save_model_every_checkpoint seed skip_model_save steps task test_envs trial_seed "
    "uda_holdout_fraction"
).split()


def test_record_args_are_domainbeds():
    args = TrainArgs(test_envs=(1, 2), hparams={"lr": 0.1}, device="cpu")
    assert sorted(args.record_args()) == UPSTREAM_ARGS
    assert args.record_args()["test_envs"] == [1, 2]
    assert args.record_args()["hparams"] == '{"lr": 0.1}'


@pytest.mark.parametrize(
    ("algorithm", "seed", "name"),
    [  # made by DomainBed b93c22a
        ("ERM", 94828300, "7358bc3c867a56585b37a848f2aaa0c1"),
        ("LTDR", 1809246421, "d44d1ce4cdaf1e00e407b550a3c82a39"),
    ],
)
def test_folder_names_are_domainbeds(algorithm, seed, name):
    train_args = {
        "algorithm": algorithm,
        "data_dir": "/data",
        "dataset": "PACS",
        "holdout_fraction": 0.2,
        "hparams_seed": 0,
        "seed": seed,
        "task": "domain_generalization",
        "test_envs": [0],
        "trial_seed": 0,
    }
    # How a job is run is not part of its name.
    assert Job.in_sweep(train_args, "sweep", device="cpu").output_dir == Path("sweep") / name


@pytest.mark.parametrize(
    "args",
    [
        TrainArgs(),
        TrainArgs(test_envs=()),
        TrainArgs(
            algorithm="LTDR",
            dataset="folder:/my images/x",
            test_envs=(0, 3),
            hparams='{"lr": 1e-4, "backbone": "it\'s"}',
            steps=3,
            checkpoint_freq=2,
            trial_seed=1,
            hparams_seed=2,
            seed=5,
            holdout_fraction=0.3,
            uda_holdout_fraction=0.5,
            task="domain_adaptation",
            skip_model_save=True,
            device="cpu",
            num_workers=0,
            image_cache="320",
            image_cache_dir="/local disk",
            image_cache_gb=2.5,
            no_tensorboard=True,
            wandb="a project",
            checkpoint_minutes=0.5,
            eval_splits="needed",
            hparams_per_trial="shared",
            output_dir="some where",
        ),
    ],
)
def test_command_lines_say_the_same(args):
    assert parse_args(args.command_line()) == args


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("folder:imgs/cc", "folder:imgs/cc"),
        ("folder:imgs/cc/", "folder:imgs/cc"),
        ("folder:./imgs/cc//", "folder:imgs/cc"),
        ("folder:.//./imgs/cc", "folder:imgs/cc"),
        ("manifest:./a.csv", "manifest:a.csv"),
        # these are left as they are: other spellings are other jobs
        ("folder:../imgs/cc", "folder:../imgs/cc"),
        ("folder:/abs/imgs/./cc", "folder:/abs/imgs/./cc"),
        ("folder:.hidden", "folder:.hidden"),
        ("folder:./", "folder:."),
        ("folder:./..", "folder:./.."),
        ("folder:/", "folder:/"),
        ("folder:", "folder:"),
        ("PACS", "PACS"),
    ],
)
def test_what_completion_adds_to_a_path_makes_no_other_job(typed, name):
    assert TrainArgs(dataset=typed).dataset == name
    sweep = build_parser().parse_args(["--datasets", typed, "PACS"])
    assert sweep.datasets == [name, "PACS"]


def test_a_run_from_before_goes_on_under_the_shorter_name():
    found = run_identity({"dataset": "folder:imgs/cc/", "seed": 1}, {})
    assert found == run_identity({"dataset": "folder:imgs/cc", "seed": 1}, {})


def test_states(tmp_path):
    job = Job({"dataset": "Debug28"}, tmp_path / "job")
    assert job.state is JobState.NOT_LAUNCHED
    make_folder(job.output_dir)
    assert job.state is JobState.INCOMPLETE
    mark_failed(job.output_dir, reason="error", message="broken")
    assert job.state is JobState.FAILED
    assert job.last_error_line() == "broken"
    (job.output_dir / "err.txt").write_text("Traceback\n\nValueError: x\n\n")
    assert job.last_error_line() == "ValueError: x"
    mark_failed(job.output_dir, reason="diverged", message="nan", step=3)
    assert job.state is JobState.DIVERGED
    assert json.loads((job.output_dir / "failed").read_text())["step"] == 3
    (job.output_dir / "failed").write_text("not JSON")
    assert job.state is JobState.FAILED
    mark_done(job.output_dir)
    assert job.state is JobState.DONE
    assert not (job.output_dir / "failed").exists()


def test_a_job_is_held_by_one_process(tmp_path):
    code = (
        "import sys; from pathlib import Path; from domainbed_ext.jobs import job_lock\n"
        f"with job_lock(Path({str(tmp_path)!r})): print('held', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        assert Job({}, tmp_path).state is JobState.RUNNING
        with pytest.raises(JobBusyError, match="in use by another process"), job_lock(tmp_path):
            pass
        with pytest.raises(JobBusyError):
            delete_job(tmp_path)
        holder.kill()  # no chance to clean up
    assert Job({}, tmp_path).state is JobState.INCOMPLETE
    with job_lock(tmp_path):
        mark_done(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done"]


def test_a_deleted_job_leaves_nothing(tmp_path):
    folder = tmp_path / "job"
    (folder / "tensorboard").mkdir(parents=True)
    (folder / "tensorboard" / "events").touch()
    (folder / "results.jsonl").touch()
    delete_job(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_its_holder_deleted_is_made_anew(tmp_path, monkeypatch):
    """Between opening the file and locking it, the process that had the job has deleted it."""
    real, folder, calls = job_locks._lock, tmp_path / "job", []

    def lock(file, place):
        calls.append(file)
        if len(calls) == 1:
            shutil.rmtree(folder)
        real(file, place)

    monkeypatch.setattr(job_locks, "_lock", lock)
    with job_lock(folder):
        assert os.path.samestat(os.fstat(calls[-1].fileno()), os.stat(folder / "lock"))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("reason", "expected"),
    [("error", "failed in another process"), ("diverged", "failed in another process")],
)
def test_what_others_have_made_of_a_job(tmp_path, monkeypatch, reason, expected):
    assert taken_by_others(tmp_path / "new") is None
    assert taken_by_others(tmp_path) is None
    mark_failed(tmp_path, reason="died", message="killed")
    assert taken_by_others(tmp_path) is None  # its process was killed: it can be gone on with
    mark_failed(tmp_path, reason=reason, message="broken")
    assert taken_by_others(tmp_path) == expected
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "is_locked", lambda folder: True)
        assert taken_by_others(tmp_path) == "in use by another process"
    mark_done(tmp_path)
    assert taken_by_others(tmp_path) == "done by another process"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write .*file/job: Not a directory"):
        make_folder(tmp_path / "file" / "job")
