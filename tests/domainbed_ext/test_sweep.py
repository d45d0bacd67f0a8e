"""Sweeps: launching their jobs, again too, and what becomes of failures."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import sys
import time
from pathlib import Path

import pytest

from domainbed_ext import jobs, launchers
from domainbed_ext.errors import UsageError
from domainbed_ext.job_files import mark_done, mark_failed
from domainbed_ext.job_locks import JobBusyError
from domainbed_ext.records import load_records, read_records
from domainbed_ext.scripts.collect_results import main as collect
from domainbed_ext.scripts.sweep import main
from domainbed_ext.scripts.train import parse_args
from domainbed_ext.sweep_flags import build_parser
from domainbed_ext.training_job import train as run_train
from tests.short_sweeps import DEBUG, job_folders, plan, run_sweep


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


def test_resume_launches_what_was_interrupted_and_nothing_new(tmp_path, capsys, in_process):
    flags = [*DEBUG, "--algorithms", "ERM_ViT", "LTDR", "--output_dir", str(tmp_path)]
    folders = job_folders(tmp_path, flags)
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


def test_those_with_a_checkpoint_are_said_to_go_on_from_it(tmp_path, capsys):
    flags = [*DEBUG, "--algorithms", "ERM_ViT", "LTDR", "--output_dir", str(tmp_path)]
    flags += ["--command_launcher", "dummy"]
    folders = job_folders(tmp_path, flags)
    for folder in folders[:4]:
        folder.mkdir()
        (folder / "lock").touch()
    (folders[0] / "results.jsonl").touch()  # of DomainBed's own training: no checkpoint
    (folders[1] / "checkpoint.safetensors").touch()
    (folders[2] / "checkpoint.previous.safetensors").touch()
    mark_failed(folders[2], reason="error", message="broken")
    mark_failed(folders[3], reason="diverged", message="nan")
    (folders[3] / "checkpoint.safetensors").touch()
    main(flags)
    expected = f"About to run 5 jobs in {tmp_path}, 2 of them from their last checkpoint."
    assert expected in capsys.readouterr().out
    main(["retry_failed", "--diverged", *flags])
    expected = f"About to run 2 jobs in {tmp_path}, 1 of them from their last checkpoint."
    assert expected in capsys.readouterr().out


def test_retry_failed_goes_on_with_failed_jobs_and_starts_diverged_ones_afresh(
    tmp_path, capsys, in_process
):
    flags = [*DEBUG, "--algorithms", "ERM_ViT", "LTDR", "--output_dir", str(tmp_path)]
    folders = job_folders(tmp_path, flags)
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
    folders = job_folders(tmp_path, flags)
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
    folders = job_folders(tmp_path, flags)
    for folder in folders[:2]:
        folder.mkdir()
    real = jobs.job_lock

    def begun_by_another(folder):
        if folder == folders[0]:
            raise JobBusyError("in use")
        return real(folder)

    monkeypatch.setattr(jobs, "job_lock", begun_by_another)
    assert main(["delete_incomplete", "--even_if_alive", *flags]) == 0
    captured = capsys.readouterr()
    assert "Deleted 1 job folders." in captured.out
    assert f"kept, as a process has begun to work on it: {folders[0]}" in captured.err
    assert [folder.exists() for folder in folders] == [True, False, False]


def test_what_looks_alive_is_kept_and_named(tmp_path, capsys):
    """A program that takes no lock wrote to it a moment ago; not so where a lock was left."""
    flags = [*DEBUG, "--algorithms", "ERM_ViT", "--output_dir", str(tmp_path)]
    alive, silent, left = job_folders(tmp_path, flags)
    for folder in (alive, silent, left):
        folder.mkdir()
    hour_ago = time.time() - 3600
    for folder, when in ((alive, time.time()), (silent, hour_ago)):
        (folder / "out.txt").touch()
        os.utime(folder / "out.txt", (when, when))
        os.utime(folder, (hour_ago, hour_ago))
    (left / "lock").touch()
    assert main(["status", *flags]) == 0
    said = capsys.readouterr().err
    assert said.startswith("1 job folders look alive: written to in the last 30 minutes")
    assert said.endswith(f"launching would run these a second time:\n    {alive}\n")
    assert main(["delete_incomplete", *flags]) == 0
    captured = capsys.readouterr()
    assert "Deleted 2 job folders." in captured.out
    assert "they are kept; wait, or pass --even_if_alive to delete them:" in captured.err
    assert [folder.exists() for folder in (alive, silent, left)] == [True, False, False]
    assert main(["delete_incomplete", "--even_if_alive", *flags]) == 0
    assert not alive.exists()
    assert main(["--even_if_alive", *flags]) == 2


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
        "even_if_alive "
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
