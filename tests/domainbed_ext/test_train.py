"""One run: its records, its folder, its model, how it ends, bad input."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time

import pytest
import torch

from domainbed_ext import algorithms, runs, training
from domainbed_ext.errors import DivergedError, UsageError
from domainbed_ext.job_locks import job_lock
from domainbed_ext.records import read_records
from domainbed_ext.runs import evaluation_splits, prepare_run
from domainbed_ext.saved_models import load_algorithm
from domainbed_ext.scripts.train import build_parser, main
from domainbed_ext.train_checks import run_hparams
from domainbed_ext.training_job import train
from tests.short_runs import ROOT, comparable, run, run_args, run_flags


def test_records_have_domainbeds_keys_and_ours(tmp_path):
    records = run(tmp_path, test_envs=(1,))
    assert [record["step"] for record in records] == [0, 2, 4]
    assert records == read_records(tmp_path / "results.jsonl")
    upstream = {f"env{env}_{split}_acc" for env in range(3) for split in ("in", "out")}
    upstream |= {"args", "epoch", "hparams", "loss", "mem_gb", "step", "step_time"}
    ours = {f"env{env}_{split}_class_acc" for env in range(3) for split in ("in", "out")}
    ours |= {"provenance", "lr"}
    assert set(records[0]) == upstream | ours
    # 16 images per domain, int(16 * 0.2) = 3 of them held out; batches of 8.
    assert records[-1]["epoch"] == 4 / (13 / 8)
    assert records[-1]["env0_out_acc"] in {0.0, 1 / 3, 2 / 3, 1.0}
    provenance = records[0]["provenance"]
    assert provenance["environments"] == ["0", "1", "2"]
    assert provenance["num_classes"] == 2
    assert provenance["device"] == "cpu"
    assert provenance["torch"] == torch.__version__


def test_folder_of_a_finished_run(tmp_path, capsys):
    assert main(run_flags(tmp_path)) == 0
    expected = "done err.txt model.json model.safetensors out.txt results.jsonl".split()
    names = sorted(path.name for path in tmp_path.iterdir())
    events = [name for name in names if name.startswith("events.out.tfevents.")]
    assert len(events) == 1
    assert [name for name in names if name not in events] == expected
    assert (tmp_path / "done").read_text() == "done"
    printed = (tmp_path / "out.txt").read_text()
    assert printed == capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith(("env0_in_acc", "0.", "1.0"))]
    assert len(rows) == 4  # a head and three records
    assert "\talgorithm: ERM_ViT" in printed.splitlines()


def test_the_look_at_the_training_images_shows_how_far_it_is(tmp_path, monkeypatch):
    def prepare(self, environments):
        for batches in environments:  # two domains of 13 images, in batches of 5
            assert [len(y) for _, y in batches] == [5, 5, 3]
        assert sum(len(y) for _, y in environments[1]) == 13  # again, if wanted

    monkeypatch.setattr(algorithms.ERM_ViT, "prepare", prepare)
    states = []
    args = run_args(tmp_path, test_envs=(1,), hparams={"eval_batch_size": 5})
    train(args, progress=states.append)
    looks = [state for state in states if state.phase == "preparing"]
    second = [13, 18, 23, 26]
    assert [state.step for state in looks] == [0, 5, 10, 13, *second, *second]
    assert {state.num_steps for state in looks} == {26}
    assert states[: len(looks)] == looks


def test_same_seed_same_records_other_seed_others(tmp_path):
    first, again = run(tmp_path / "a"), run(tmp_path / "b")
    other = run(tmp_path / "c", seed=1)
    assert comparable(first) == comparable(again)
    assert first[-1]["loss"] != other[-1]["loss"]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch, capsys):
    real, steps = algorithms.ERM_ViT.update, []

    def update(self, minibatches, unlabeled=None):
        steps.append(1)
        values = real(self, minibatches, unlabeled)
        return {**values, "loss": math.nan} if len(steps) == 5 else {**values, "loss": 0.5}

    monkeypatch.setattr(algorithms.ERM_ViT, "update", update)
    assert main(run_flags(tmp_path)) == 1
    message = "diverged: loss is nan at step 4; last finite metrics: loss 0.5, lr 0.001"
    assert (tmp_path / "err.txt").read_text() == f"error: {message}\n"
    assert capsys.readouterr().err == f"error: {message}\n"
    failure = json.loads((tmp_path / "failed").read_text())
    assert (failure["reason"], failure["step"]) == ("diverged", 4)
    assert not (tmp_path / "done").exists()
    assert len(read_records(tmp_path / "results.jsonl")) == 2


def test_parameters_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    def update(self, minibatches, unlabeled=None):
        self.network.head.bias.data[0] = math.inf
        return {"loss": 1.0}

    monkeypatch.setattr(algorithms.ERM_ViT, "update", update)
    with pytest.raises(DivergedError, match=r"network\.head\.bias is not finite after step 0"):
        run(tmp_path)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_an_unexpected_error_keeps_its_traceback(tmp_path, monkeypatch):
    def update(self, minibatches, unlabeled=None):
        raise RuntimeError("a bug")

    monkeypatch.setattr(algorithms.ERM_ViT, "update", update)
    assert main(run_flags(tmp_path)) == 1
    text = (tmp_path / "err.txt").read_text()
    assert text.startswith("Traceback")
    assert text.endswith("RuntimeError: a bug\n")


def test_without_test_environments_all_are_trained_on(tmp_path, monkeypatch):
    seen = []
    real = algorithms.ERM_ViT.update

    def update(self, minibatches, unlabeled=None):
        seen.append(len(minibatches))
        return real(self, minibatches, unlabeled)

    monkeypatch.setattr(algorithms.ERM_ViT, "update", update)
    assert main([*run_flags(tmp_path), "--test_envs"]) == 0
    assert set(seen) == {3}
    assert read_records(tmp_path / "results.jsonl")[0]["args"]["test_envs"] == []


def test_domain_adaptation_gets_unlabelled_images(tmp_path, monkeypatch):
    seen = []
    real = algorithms.ERM_ViT.update

    def update(self, minibatches, unlabeled=None):
        seen.append([tuple(x.shape) for x in unlabeled])
        return real(self, minibatches, unlabeled)

    monkeypatch.setattr(algorithms.ERM_ViT, "update", update)
    changes = {"hparams": {"batch_size": 4}, "test_envs": (2,), "task": "domain_adaptation"}
    records = run(tmp_path / "a", uda_holdout_fraction=0.5, **changes)
    assert seen == [[(4, 3, 28, 28)]] * 5
    assert "env2_uda_acc" in records[0]
    with pytest.raises(UsageError, match="pass --uda_holdout_fraction"):
        run(tmp_path / "b", **changes)


def test_the_saved_model_predicts_what_the_records_say(tmp_path):
    args = run_args(tmp_path, algorithm="LTDR", save_model_every_checkpoint=True)
    records = train(args)
    prepared = prepare_run(args, run_hparams(args))
    split = evaluation_splits(prepared.dataset, args)["env1_in"]
    x, y = zip(*(split[index] for index in range(len(split))), strict=True)
    for name, record in (("model", records[-1]), ("model_step2", records[1])):
        algorithm = load_algorithm(tmp_path, name=name)
        with torch.no_grad():
            right = algorithm.predict(torch.stack(x)).argmax(1) == torch.tensor(y)
        assert right.double().mean().item() == record["env1_in_acc"]
    info = json.loads((tmp_path / "model.json").read_text())
    assert info["args"]["algorithm"] == "LTDR"
    assert info["model_hparams"] == records[-1]["hparams"]


def test_only_the_needed_splits_are_evaluated_when_told_so(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", test_envs=(1,))
    seen = []
    real = training.evaluate

    def evaluate(algorithm, loaders, **rest):
        seen.append(list(loaders))
        return real(algorithm, loaders, **rest)

    monkeypatch.setattr(training, "evaluate", evaluate)
    part = run(tmp_path / "part", test_envs=(1,), eval_splits="needed")
    assert seen == [["env1_in", "env0_out", "env1_out", "env2_out"]] * 3
    left_out = {f"env{env}_in_{kind}" for env in (0, 2) for kind in ("acc", "class_acc")}
    assert {*whole[0]} - {*part[0]} == left_out
    # Which evaluations are made is no part of the run, and changes nothing else.
    for record in whole:
        for key in left_out:
            del record[key]
    assert comparable(part) == comparable(whole)


def test_no_model_when_told_so(tmp_path):
    run(tmp_path, skip_model_save=True, save_model_every_checkpoint=True)
    assert not list(tmp_path.glob("*.safetensors"))


def test_hparams_are_the_defaults_or_a_draw_with_changes_on_top(tmp_path):
    record = run(tmp_path, hparams_seed=3, trial_seed=2)[0]
    from domainbed_ext.hparams import random_hparams
    from domainbed_ext.seeds import seed_hash

    drawn = random_hparams("ERM_ViT", "Debug28", seed_hash(3, 2))
    assert record["hparams"] == {**drawn, "schedule_steps": 5}


def test_trials_may_share_their_draw(tmp_path):
    def hparams(trial, mode, draw=3):
        args = run_args(tmp_path, trial_seed=trial, hparams_seed=draw, hparams_per_trial=mode)
        return run_hparams(args)

    # Trial 0 draws the same in both, the others what trial 0 drew, or what DomainBed has them draw.
    assert hparams(0, "shared") == hparams(0, "drawn")
    assert hparams(2, "shared") == hparams(0, "drawn") != hparams(2, "drawn")
    assert hparams(2, "shared", draw=4) != hparams(2, "shared")
    assert hparams(2, "shared", draw=0) == hparams(1, "drawn", draw=0)

    record = run(tmp_path / "a", trial_seed=2, hparams_seed=3, hparams_per_trial="shared")[0]
    assert record["args"]["hparams_per_trial"] == "shared"
    assert record["hparams"]["lr"] == hparams(0, "drawn")["lr"]
    with pytest.raises(UsageError, match="holds another run"):
        run(tmp_path / "a", trial_seed=2, hparams_seed=3)
    # The defaults are no draw: such a record is DomainBed's.
    record = run(tmp_path / "b", trial_seed=2, hparams_per_trial="shared")[0]
    assert "hparams_per_trial" not in record["args"]


def test_a_job_in_use_is_not_run_twice(tmp_path, capsys):
    tmp_path.mkdir(exist_ok=True)
    with start_process(tmp_path, "--steps", "100000", "--checkpoint_freq", "50000") as process:
        wait_for(lambda: (tmp_path / "results.jsonl").exists())
        assert main(run_flags(tmp_path)) == 3
        assert "in use by another process" in capsys.readouterr().err
        process.kill()
    with job_lock(tmp_path):
        pass


BAD_INPUT = {
    "algorithm": (["--algorithm", "LTDRR"], "unknown algorithm 'LTDRR'"),
    "data set": (["--dataset", "Debug29"], "unknown data set 'Debug29'"),
    "hparam": (["--hparams", '{"moe_topk": 1}', "--algorithm", "LTDR"], "unknown hparam"),
    "hparam of another algorithm": (["--hparams", '{"moe_top_k": 1}'], "unknown hparam"),
    "hparam value": (["--hparams", '{"batch_size": -1}'], "batch_size"),
    "hparam without effect": (
        ["--algorithm", "LTDR", "--hparams", '{"ltdr_selection_fraction": 0.2}'],
        "0.2 has no meaning with ltdr_selection='vtt'",
    ),
    "hparam of a universal expert": (
        [
            *("--algorithm", "CLUSTER"),
            *("--hparams", '{"cluster_universal": true, "moe_capacity_factor": 1.5}'),
        ],
        "moe_capacity_factor=1.5 would keep images from the universal expert",
    ),
    "engine that STGC cannot use": (
        ["--algorithm", "STGC", "--hparams", '{"moe_backend": "dense"}'],
        "STGC compares the gradients of each expert's own tokens",
    ),
    "JSON": (["--hparams", "{lr: 1}"], "JSON"),
    "test environment": (["--test_envs", "3"], "out of range for Debug28; choose among 0 0, 1 1"),
    "negative test environment": (["--test_envs", "-1"], "out of range"),
    "same environment twice": (["--test_envs", "1", "1"], "twice"),
    "nothing to train on": (["--test_envs", "0", "1", "2"], "no domain of Debug28 to train on"),
    "batch": (["--algorithm", "ERM"], "has 13 images, fewer than batch_size=64"),
    "holdout fraction": (["--holdout_fraction", "1"], "--holdout_fraction"),
    "empty split": (["--holdout_fraction", "0.01"], "is empty with --holdout_fraction 0.01"),
    "uda fraction": (["--uda_holdout_fraction", "-0.5"], "--uda_holdout_fraction"),
    "steps": (["--steps", "0"], "--steps 0 is too small"),
    "seed": (["--seed", "-1"], "--seed"),
    "missing data": (["--dataset", "PACS", "--data_dir", "/nowhere"], "/nowhere"),
    "missing folder": (["--dataset", "folder:/nowhere"], "/nowhere"),
    "minutes": (["--checkpoint_minutes", "-1"], "--checkpoint_minutes -1.0 is impossible"),
    "output folder": (["--output_dir", "/dev/null/x"], "cannot write to the output folder"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_line_and_status_2(tmp_path, capsys, case):
    flags, expected = BAD_INPUT[case]
    assert main([*run_flags(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected in error
    assert error.count("\n") == 1


def test_a_typing_error_leaves_no_folder(tmp_path, capsys):
    assert main([*run_flags(tmp_path / "out"), "--algorithm", "LTDRR"]) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there_is_said(tmp_path):
    with pytest.raises(UsageError, match="finds no CUDA device"):
        run(tmp_path, device="cuda")


def test_flags_are_frozen():
    """Removing or renaming one breaks scripts: it takes a forwarding shim."""
    upstream = (
        "data_dir dataset algorithm task hparams hparams_seed trial_seed seed steps "
        "checkpoint_freq test_envs output_dir holdout_fraction uda_holdout_fraction "
        "skip_model_save save_model_every_checkpoint"
    ).split()
    actions = {action.dest: action for action in build_parser()._actions if action.dest != "help"}
    assert set(actions) == {
        *(*upstream, "device", "num_workers", "distributed", "checkpoint_minutes", "eval_splits"),
        *("image_cache", "image_cache_dir", "image_cache_gb", "no_tensorboard", "wandb"),
        "hparams_per_trial",
    }
    # DomainBed's defaults, but for the data: it has no data folder, and RotatedMNIST is no file.
    assert {name: actions[name].default for name in upstream[2:]} == {
        "algorithm": "ERM",
        "task": "domain_generalization",
        "hparams": None,
        "hparams_seed": 0,
        "trial_seed": 0,
        "seed": 0,
        "steps": None,
        "checkpoint_freq": None,
        "test_envs": [0],
        "output_dir": "train_output",
        "holdout_fraction": 0.2,
        "uda_holdout_fraction": 0,
        "skip_model_save": False,
        "save_model_every_checkpoint": False,
    }


def start_process(folder, *flags):
    command = [sys.executable, "-m", "domainbed_ext.scripts.train", *run_flags(folder), *flags]
    environment = {**os.environ, "PYTHONPATH": _python_path(), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def _python_path():
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.mark.parametrize(
    ("cores", "num_loaders", "expected"), [(2, 3, 1), (6, 3, 2), (64, 3, 2), (1, 5, 1)]
)
def test_loaders_start_no_more_processes_than_there_are_cores(
    monkeypatch, cores, num_loaders, expected
):
    monkeypatch.setattr(runs, "num_cores", lambda: cores)
    assert runs.useful_workers(2, num_loaders=num_loaders) == expected
    assert runs.useful_workers(0, num_loaders=num_loaders) == 0  # of data in memory
