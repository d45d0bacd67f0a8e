"""Sweeps: which jobs they consist of, launching them again, what becomes of failures."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from domainbed_ext import jobs, launchers
from domainbed_ext.checkpoint import load_checkpoint
from domainbed_ext.errors import UsageError
from domainbed_ext.job_files import mark_done, mark_failed
from domainbed_ext.job_locks import JobBusyError
from domainbed_ext.jobs import JobState, job_state
from domainbed_ext.plan import make_jobs, pruning_words
from domainbed_ext.records import load_records, read_records
from domainbed_ext.scripts.collect_results import main as collect
from domainbed_ext.scripts.sweep import build_parser, main
from domainbed_ext.scripts.train import parse_args
from domainbed_ext.training_job import train as run_train
from tests.upstream_checkout import ask_upstream, needs_upstream

ROOT = Path(__file__).resolve().parents[2]
ONE_EACH = "--n_hparams 1 --n_trials 1 --single_test_envs --skip_confirmation".split()
DEBUG = [*"--datasets Debug28 --steps 3 --device cpu".split(), *ONE_EACH]


def plan(*flags):
    return make_jobs(build_parser().parse_args([*flags, "--output_dir", "sweep"]))


def run_sweep(*flags):
    """A sweep in a process of its own, as users run it."""
    # passive: threads that spin while others have the cores take minutes for tiny models
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "domainbed_ext.scripts.sweep", *flags]
    return subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a shell makes what it runs in the background, these tests perhaps, ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.fixture
def in_process(monkeypatch):
    """The local launcher without worker processes: the same jobs, one after the other."""
    launched = []

    class InProcess(launchers.Launcher):
        def launch(self, commands):
            launched.extend(commands)
            for command in commands:
                with contextlib.suppress(UsageError):
                    run_train(parse_args(command[3:]))
            return []

    monkeypatch.setitem(launchers.REGISTRY, "local", InProcess)
    return launched


def test_jobs_are_domainbeds():
    jobs = plan("--algorithms", "LTDR", "--datasets", "Debug28", "--n_hparams", "2")
    assert len(jobs) == 3 * 2 * 6  # trials, draws, three domains alone and three pairs
    envs = [list(job.args.test_envs) for job in jobs[:12:2]]
    assert envs == [[0], [0, 1], [0, 2], [1], [1, 2], [2]]
    assert jobs[0].args.seed == 1254117012  # as DomainBed b93c22a has it
    assert len({job.output_dir for job in jobs}) == len(jobs)


@needs_upstream
@pytest.mark.upstream
@pytest.mark.parametrize(
    "flags",
    [
        ["--datasets", "Debug28", "PACS", "--algorithms", "ERM", "--n_hparams", "2"],
        ["--datasets", "VLCS", "--algorithms", "ERM", "LTDR", "--single_test_envs", "--steps", "5"],
        ["--datasets", "PACS", "--n_hparams_from", "1", "--hparams", '{"lr": 1}', *ONE_EACH[2:]],
    ],
)
def test_jobs_are_those_of_a_real_domainbed(flags):
    args = build_parser().parse_args([*flags, "--data_dir", "/data"])
    code = (
        "import hashlib\n"
        "from domainbed.scripts.sweep import Job, make_args_list\n"
        "jobs = [Job(a, 'sweep') for a in make_args_list(**question)]\n"
        "print(json.dumps([job.output_dir for job in jobs]))"
    )
    names = (
        "n_trials algorithms n_hparams_from n_hparams steps data_dir task holdout_fraction "
        "single_test_envs hparams"
    ).split()
    question = {name: getattr(args, name) for name in names}
    expected = ask_upstream(code, {**question, "dataset_names": args.datasets})
    args.output_dir = "sweep"
    assert [str(job.output_dir) for job in make_jobs(args)] == expected


def test_only_jobs_on_given_test_environments():
    flags = ["--algorithms", "LTDR", "--datasets", "Debug28", *ONE_EACH[:4]]
    assert _envs(plan(*flags, "--test_envs", "1")) == [[0, 1], [1], [1, 2]]
    assert _envs(plan(*flags, "--test_envs", "0", "2", "--single_test_envs")) == [[0], [2]]
    with pytest.raises(UsageError, match="out of range for Debug28; it has domains 0 to 2"):
        plan(*flags, "--test_envs", "3")


TWO_DRAWS = "--algorithms LTDR --n_hparams 2 --n_trials 3".split()


@pytest.mark.parametrize(
    ("selection", "pairs"),
    [
        (["training-domain"], False),
        (["oracle"], False),
        (["iid", "oracle"], False),
        (["leave-one-out"], True),
        (["leave-one-domain-out"], True),
        (["training-domain", "loo"], True),
        (["training-domain validation set"], False),
    ],
)
def test_a_sweep_for_some_selection_methods_has_the_jobs_they_need(selection, pairs):
    flags = [*TWO_DRAWS, "--datasets", "PACS"]
    every, alone = plan(*flags), plan(*flags, "--single_test_envs")
    jobs = plan(*flags, "--selection", *selection)
    # The same names, so that a sweep can be widened later.
    expected = every if pairs else alone
    assert [job.output_dir for job in jobs] == [job.output_dir for job in expected]
    assert {job.args.eval_splits for job in jobs} == {"needed"}
    assert {job.args.eval_splits for job in every} == {"all"}
    widened = plan(*flags, "--selection", *selection, "--eval_splits", "all")
    assert {job.args.eval_splits for job in widened} == {"all"}
    assert [job.output_dir for job in widened] == [job.output_dir for job in jobs]


def test_trials_that_share_their_draws_are_other_jobs():
    flags = [*TWO_DRAWS, "--datasets", "Debug28", "--test_envs", "0", "--single_test_envs"]
    drawn, shared = plan(*flags), plan(*flags, "--hparams_per_trial", "shared")
    for one, other in zip(drawn, shared, strict=True):
        assert one.args.seed == other.args.seed
        # Draw 0 is the defaults, in either case the same.
        assert (one.output_dir == other.output_dir) is (one.args.hparams_seed == 0)
    assert {job.args.hparams_per_trial for job in shared} == {"drawn", "shared"}
    assert {job.args.hparams_per_trial for job in drawn} == {"drawn"}


def test_a_selection_method_on_some_domains_has_the_jobs_it_needs():
    flags = ["--algorithms", "LTDR", "--datasets", "PACS", *ONE_EACH[:4], "--test_envs", "2"]
    assert _envs(plan(*flags, "--selection", "oracle")) == [[2]]
    envs = _envs(plan(*flags, "--selection", "leave-one-out"))
    assert envs == [[0, 2], [1, 2], [2], [2, 3]]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--selection", "training-domain"],
            [
                "pairs of test domains are not needed for training-domain validation set: 24 jobs "
                "instead of 60",
                "images that are trained on are not evaluated, no selection method needs them "
                "(--eval_splits all does)",
            ],
        ),
        (["--selection", "loo"], ["images that are trained on are not evaluated"]),
        (["--selection", "loo", "--eval_splits", "all"], []),
        (["--selection", "oracle", "--single_test_envs", "--eval_splits", "all"], []),
        (["--eval_splits", "needed"], []),
        ([], []),
    ],
)
def test_the_plan_says_what_a_selection_method_saves(flags, expected):
    args = build_parser().parse_args([*TWO_DRAWS, "--datasets", "PACS", *flags])
    lines = pruning_words(args, len(make_jobs(args)))
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)


def test_a_sweep_for_one_selection_method_is_tabulated(tmp_path, capsys, in_process):
    base = "--datasets Debug28 --algorithms ERM_ViT --n_hparams 1 --n_trials 1 --steps 3".split()
    flags = [*base, "--device", "cpu", "--skip_confirmation", "--output_dir", str(tmp_path)]
    assert main([*flags, "--selection", "training-domain"]) == 0
    assert "3 jobs instead of 6" in capsys.readouterr().out
    assert collect(["--input_dir", str(tmp_path), "--format", "csv"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    means = {row["selection"]: row["mean"] for row in rows if row["environment"] == "Avg"}
    assert means["training-domain validation set"]
    assert means["test-domain validation set (oracle)"]
    reasons = {row["reason"] for row in rows if row["selection"].startswith("leave-one")}
    assert any("a sweep with --selection leave-one-out" in reason for reason in reasons)
    # Widened later, it runs the pairs and nothing else.
    in_process.clear()
    assert main([*flags, "--selection", "leave-one-out"]) == 0
    envs = [parse_args(command[3:]).test_envs for command in in_process]
    assert envs == [(0, 1), (0, 2), (1, 2)]


@pytest.mark.parametrize(
    ("dataset", "flags", "expected"),
    [
        ("EmojiDG", [], True),
        ("EmojiDG6", [], True),
        ("EmojiDG", ["--no-ceiling"], False),
        ("Debug28", [], False),
        ("Debug28", ["--ceiling"], True),
    ],
)
def test_ceiling_jobs_hold_out_nothing(dataset, flags, expected):
    envs = _envs(plan("--datasets", dataset, "--algorithms", "LTDR", *ONE_EACH, *flags))
    assert ([] in envs) is expected


def test_dummy_launcher_prints_commands_and_writes_nothing(tmp_path, capsys):
    flags = [*DEBUG, "--algorithms", "LTDR", "--output_dir", str(tmp_path / "s")]
    outputs = []
    for _ in range(2):
        assert main(["launch", *flags, "--command_launcher", "dummy"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[0].count("Dummy launcher: ") == 3
    assert not (tmp_path / "s").exists()


def test_a_sweep_in_worker_processes_then_again(tmp_path, capsys):
    flags = [*DEBUG, "--algorithms", "ERM_ViT", "LTDR", "--output_dir", str(tmp_path)]
    with run_sweep(*flags, "--jobs", "2") as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "6 jobs: 6 done." in out
    assert len(load_records(tmp_path)) == 6 * 2
    assert err.count("] done: ") == 6
    # The output of a job is in its folder, and only there.
    job = next(tmp_path.iterdir())
    assert "Environment:" in (job / "out.txt").read_text()
    assert "Environment:" not in out
    assert (job / "err.txt").read_text() == ""

    assert main(flags) == 0  # finds nothing to launch, so needs no process
    out = capsys.readouterr().out
    assert "Nothing to launch." in out
    assert "6 jobs: 6 done." in out


def test_unfinished_jobs_are_gone_on_with_and_failed_ones_reported(tmp_path, capsys, in_process):
    flags = [*DEBUG, "--algorithms", "ERM_ViT", "--output_dir", str(tmp_path)]
    jobs = plan(*flags)
    folders = [tmp_path / job.output_dir.name for job in jobs]
    for folder in folders:
        folder.mkdir()
    mark_done(folders[0])
    mark_failed(folders[1], reason="error", message="broken")
    mark_failed(folders[2], reason="diverged", message="loss is nan at step 1")
    (folders[2] / "err.txt").write_text("error: diverged: loss is nan at step 1\n")
    assert main(flags) == 1
    # The failed job was tried again and succeeded; the diverged one was not tried.
    assert [parse_args(command[3:]).output_dir for command in in_process] == [str(folders[1])]
    assert (folders[1] / "done").exists()
    captured = capsys.readouterr()
    assert "3 jobs: 2 done, 1 diverged." in captured.out
    assert str(folders[2]) in captured.err
    assert "error: diverged: loss is nan at step 1" in captured.err
    assert "delete_incomplete" in captured.err

    assert main(["delete_incomplete", *flags]) == 0
    assert not folders[2].exists()
    assert folders[1].exists()
    assert main(flags) == 0
    assert read_records(folders[2] / "results.jsonl")


def test_a_job_that_cannot_run_fails_alone(tmp_path, capsys, in_process):
    # ERM's default batch of 64 is larger than Debug28's domains.
    flags = [*DEBUG, "--algorithms", "ERM", "ERM_ViT", "--output_dir", str(tmp_path)]
    assert main(flags) == 1
    captured = capsys.readouterr()
    assert "6 jobs: 3 done, 3 failed." in captured.out
    assert captured.err.count("fewer than batch_size=64") == 3


def test_a_job_that_could_not_say_why_it_ended_is_reported(tmp_path, capsys, monkeypatch):
    class OnAFullDisk(launchers.Launcher):
        def launch(self, commands):
            (command,) = commands
            folder = Path(parse_args(command[3:]).output_dir)
            folder.mkdir()
            (folder / "err.txt").write_text("error: cannot write the checkpoint\n")
            return []

    monkeypatch.setitem(launchers.REGISTRY, "local", OnAFullDisk)
    flags = [*DEBUG, "--algorithms", "LTDR", "--test_envs", "0", "--output_dir", str(tmp_path)]
    assert main(flags) == 1
    captured = capsys.readouterr()
    assert "1 jobs: 1 incomplete." in captured.out
    assert "not finished: " in captured.err
    assert "error: cannot write the checkpoint" in captured.err


def test_status_runs_nothing(tmp_path, capsys, in_process):
    assert main(["status", *DEBUG, "--algorithms", "LTDR", "--output_dir", str(tmp_path)]) == 0
    assert "not launched" in capsys.readouterr().out
    assert in_process == []
    assert list(tmp_path.iterdir()) == []


def _folders(tmp_path, flags):
    return [tmp_path / job.output_dir.name for job in plan(*flags)]


def test_resume_launches_what_was_interrupted_and_nothing_new(tmp_path, capsys, in_process):
    flags = [*DEBUG, "--algorithms", "ERM_ViT", "LTDR", "--output_dir", str(tmp_path)]
    folders = _folders(tmp_path, flags)
    assert len(folders) == 6
    for folder in folders[:4]:
        folder.mkdir()
    mark_failed(folders[1], reason="died", message="killed")
    mark_failed(folders[2], reason="error", message="broken")
    mark_failed(folders[3], reason="diverged", message="nan")
    assert main(["resume", *flags]) == 1
    launched = [parse_args(command[3:]).output_dir for command in in_process]
    assert launched == [str(folders[0]), str(folders[1])]
    assert "6 jobs: 2 not launched, 2 done, 1 failed, 1 diverged." in capsys.readouterr().out

    in_process.clear()
    assert main(["resume", *flags]) == 1  # the failures are still reported
    assert in_process == []
    assert "Nothing to launch." in capsys.readouterr().out


def test_retry_failed_goes_on_with_failed_jobs_and_starts_diverged_ones_afresh(
    tmp_path, capsys, in_process
):
    flags = [*DEBUG, "--algorithms", "ERM_ViT", "LTDR", "--output_dir", str(tmp_path)]
    folders = _folders(tmp_path, flags)
    for folder in folders[:3]:
        folder.mkdir()
    mark_failed(folders[1], reason="error", message="broken")
    mark_failed(folders[2], reason="diverged", message="nan")
    (folders[1] / "err.txt").write_text("kept\n")
    (folders[2] / "err.txt").write_text("gone\n")
    assert main(["retry_failed", *flags]) == 1
    assert [parse_args(command[3:]).output_dir for command in in_process] == [str(folders[1])]
    assert (folders[1] / "err.txt").read_text() == "kept\n"
    assert (folders[2] / "failed").exists()
    assert "`retry_failed --diverged` starts them afresh" in capsys.readouterr().err

    in_process.clear()
    assert main(["retry_failed", "--diverged", *flags]) == 0
    assert [parse_args(command[3:]).output_dir for command in in_process] == [str(folders[2])]
    assert sorted(path.name for path in folders[2].iterdir())[0] == "done"
    assert not (
        folders[2] / "err.txt"
    ).exists()  # written by processes, not by these in-process runs
    assert main(["launch", "--diverged", *flags]) == 2
    assert "--diverged goes with retry_failed, not with launch" in capsys.readouterr().err


def test_status_tells_how_far_running_jobs_are(tmp_path, capsys, monkeypatch):
    flags = [*DEBUG, "--algorithms", "ERM_ViT", "--output_dir", str(tmp_path)]
    folders = _folders(tmp_path, flags)
    for folder in folders:
        folder.mkdir()
    mark_failed(folders[1], reason="error", message="broken")
    now = time.time()
    told = {"host": "node7", "pid": 1234, "started": now - 5000, "phase": "training"}
    monkeypatch.setattr(jobs, "is_locked", lambda folder: folder in (folders[0], folders[2]))
    for folder, updated in ((folders[0], now - 20), (folders[2], now - 3000)):
        progress = {**told, "updated": updated, "step": 30, "num_steps": 300, "seconds_left": 900}
        (folder / "progress.json").write_text(json.dumps(progress))
    assert main(["status", *flags]) == 0
    captured = capsys.readouterr()
    first, second = (
        next(line for line in captured.out.splitlines() if folder.name[:8] in line)
        for folder in (folders[0], folders[2])
    )
    assert "ERM_ViT on Debug28, test 0, hparams 0, trial 0" in first
    for words in ("30 of 300", "15 min", "node7", "1234", "20 s ago"):
        assert words in first
    assert "50 min ago: stuck, or its machine is gone?" in second
    assert "broken" in captured.err


def test_a_job_in_use_is_not_deleted(tmp_path, capsys, monkeypatch):
    flags = [*DEBUG, "--algorithms", "ERM_ViT", "--output_dir", str(tmp_path)]
    folders = _folders(tmp_path, flags)
    for folder in folders[:2]:
        folder.mkdir()
    real = jobs.job_lock

    def begun_by_another(folder):
        if folder == folders[0]:
            raise JobBusyError("in use")
        return real(folder)

    monkeypatch.setattr(jobs, "job_lock", begun_by_another)
    assert main(["delete_incomplete", *flags]) == 0
    captured = capsys.readouterr()
    assert "Deleted 1 job folders." in captured.out
    assert f"kept, as a process has begun to work on it: {folders[0]}" in captured.err
    assert [folder.exists() for folder in folders] == [True, False, False]


def test_two_sweeps_share_the_jobs_and_one_takes_over_what_the_other_leaves(tmp_path):
    flags = [*DEBUG, "--algorithms", "ERM_ViT", "--output_dir", str(tmp_path), "--jobs", "2"]
    flags[flags.index("--steps") + 1] = "100"  # enough for jobs to be caught at work
    folders = _folders(tmp_path, flags)
    with contextlib.ExitStack() as processes:
        first = processes.enter_context(run_sweep(*flags))
        wait_for(lambda: all((folder / "lock").exists() for folder in folders[:2]))
        group = [first.pid, *workers_of(first.pid)]
        for pid in group:
            processes.callback(kill, pid)
            os.kill(pid, signal.SIGSTOP)
        second = processes.enter_context(run_sweep(*flags))
        processes.callback(second.kill)
        wait_for(lambda: (folders[2] / "done").exists())
        assert [job_state(folder) for folder in folders[:2]] == [JobState.RUNNING] * 2
        for pid in group:
            kill(pid)
        out, err = second.communicate(timeout=300)
    assert second.returncode == 0, err
    assert "3 jobs: 3 done." in out
    assert (folders[2] / "out.txt").read_text().count("Environment:") == 1
    for folder in folders:
        steps = [record["step"] for record in read_records(folder / "results.jsonl")]
        assert steps == sorted(set(steps))
        assert steps[-1] == 99


def test_without_a_terminal_nobody_can_confirm(tmp_path, capsys, monkeypatch):
    flags = [*DEBUG[:-1], "--algorithms", "LTDR", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    assert main(flags) == 2
    assert "pass --skip_confirmation" in capsys.readouterr().err


@pytest.mark.parametrize(("answer", "launched"), [("n", 0), ("", 0), ("y", 3), ("Yes", 3)])
def test_the_answer_decides(tmp_path, monkeypatch, in_process, answer, launched):
    flags = [*DEBUG[:-1], "--algorithms", "ERM", "--output_dir", str(tmp_path)]
    monkeypatch.setattr("builtins.input", lambda prompt: answer)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    if launched:
        main(flags)
    else:
        with pytest.raises(SystemExit) as stop:
            main(flags)
        assert stop.value.code == 0
    assert len(in_process) == launched


def test_defaults_make_a_whole_sweep_of_one_flag(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["status", "--algorithms", "LTDR"]) == 0
    out = capsys.readouterr().out
    assert "RotatedDigits: 1797 images, embedded" in out
    assert "not found in data, so not used: EmojiDG" in out
    assert "Debug28" not in out.partition("not found")[0]
    # Six angles: six domains alone and fifteen pairs, twenty draws, three trials.
    assert str(21 * 20 * 3) in out


BAD_INPUT = {
    "launcher": (["--command_launcher", "nope"], "choose among local, multi_gpu, slurm, ray"),
    "data set": (["--datasets", "Debug29"], "unknown data set 'Debug29' (did you mean Debug28?)"),
    "algorithm": (["--algorithms", "LTDRR"], "unknown algorithm 'LTDRR'"),
    "hparam": (["--hparams", '{"nope": 1}'], "unknown hparam 'nope'"),
    "JSON": (["--hparams", "{"], "JSON"),
    "missing data": (["--datasets", "PACS", "--data_dir", "/nowhere"], "ltdr download PACS"),
    "no jobs": (["--n_hparams_from", "3"], "make no job"),
    "selection": (["--selection", "best"], "unknown selection method 'best'"),
    "pairs": (["--selection", "leave-one-out"], "--single_test_envs leaves out the pairs"),
    "workers": (["--jobs", "0"], "--jobs 0 is too small"),
    "GPUs": (["--command_launcher", "multi_gpu"], "multi_gpu needs GPUs"),
    "diverged": (["--diverged"], "--diverged goes with retry_failed, not with launch"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_line_and_status_2(tmp_path, capsys, case):
    flags, expected = BAD_INPUT[case]
    base = [*DEBUG, "--algorithms", "LTDR", "--output_dir", str(tmp_path / "s")]
    assert main([*base, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected in error
    assert error.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_a_killed_worker_is_replaced_and_ctrl_c_stops_cleanly(tmp_path):
    long = [*DEBUG, "--steps", "100000", "--algorithms", "ERM_ViT", "--output_dir", str(tmp_path)]
    with run_sweep(*long, "--jobs", "1") as process:
        first = wait_for(lambda: next(tmp_path.glob("*/results.jsonl"), None))
        os.kill(workers_of(process.pid)[0], signal.SIGKILL)
        # The job is marked and the next one runs, in a new worker.
        wait_for(lambda: (first.parent / "failed").exists())
        wait_for(lambda: len(list(tmp_path.glob("*/results.jsonl"))) == 2)
        (worker,) = workers_of(process.pid)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on with what is not done" in err
    assert "Traceback" not in err
    assert "worker died (SIGKILL, out of memory?)" in err
    wait_for(lambda: not Path(f"/proc/{worker}").exists())
    assert json.loads((first.parent / "failed").read_text())["reason"] == "died"
    assert "the worker process died" in (first.parent / "err.txt").read_text()
    states = {job.state for job in plan(*long) for job in [_moved(job, tmp_path)]}
    assert states == {JobState.FAILED, JobState.INCOMPLETE, JobState.NOT_LAUNCHED}


def test_sigterm_makes_a_worker_save_and_leave(tmp_path):
    long = [*DEBUG, "--steps", "100000", "--algorithms", "LTDR", "--output_dir", str(tmp_path)]
    with run_sweep(*long, "--jobs", "1") as process:
        wait_for(lambda: len(list(tmp_path.glob("*/results.jsonl"))) == 1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err.endswith("\nstopped; the same command goes on with what is not done\n")
    assert "Traceback" not in err
    states = [_moved(job, tmp_path).state for job in plan(*long)]
    assert states == [JobState.INCOMPLETE, JobState.NOT_LAUNCHED, JobState.NOT_LAUNCHED]
    (errors,) = tmp_path.glob("*/err.txt")
    step = load_checkpoint(errors.parent / "checkpoint.safetensors").step
    assert step > 0
    expected = f"stopped after step {step}; the same command goes on from there\n"
    assert errors.read_text() == expected


def test_flags_are_frozen():
    """Removing or renaming one breaks scripts: it takes a forwarding shim."""
    upstream = (
        "command datasets algorithms task n_hparams_from n_hparams output_dir data_dir seed "
        "n_trials command_launcher steps hparams holdout_fraction single_test_envs "
        "skip_confirmation"
    ).split()
    ours = (
        "test_envs ceiling jobs gpus_per_job device num_workers skip_model_save image_cache "
        "no_tensorboard wandb image_cache_dir image_cache_gb checkpoint_minutes diverged wait "
        "selection eval_splits hparams_per_trial "
        "dry_run jobs_per_gpu slurm_partition slurm_time slurm_gpus slurm_cpus slurm_memory_gb "
        "slurm_array_parallelism slurm_option slurm_cluster ray_address ray_gpus ray_cpus"
    ).split()
    flags = {action.dest for action in build_parser()._actions if action.dest != "help"}
    assert flags == {*upstream, *ours}
    assert set(build_parser().get_default("algorithms")) <= set(_registered_algorithms())


def _registered_algorithms():
    from domainbed_ext.algorithms import ALGORITHMS

    return ALGORITHMS


def _envs(jobs):
    return [list(job.args.test_envs) for job in jobs]


def _moved(job, folder):
    return type(job)(job.train_args, folder / job.output_dir.name)


def workers_of(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    return [pid for pid, command in commands.items() if b"spawn_main" in command]


def kill(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return result
