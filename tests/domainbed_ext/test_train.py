"""One run: its records, its folder, stopping and going on, bad input."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from domainbed_ext import algorithms, runs, training
from domainbed_ext.checkpoint import load_checkpoint
from domainbed_ext.errors import DivergedError, UsageError
from domainbed_ext.job_locks import job_lock
from domainbed_ext.jobs import Job, JobState
from domainbed_ext.records import read_records
from domainbed_ext.runs import evaluation_splits, prepare_run
from domainbed_ext.saved_models import load_algorithm
from domainbed_ext.scripts.train import build_parser, main
from domainbed_ext.stop_signals import stop_requested, stops_on_signals
from domainbed_ext.train_args import TrainArgs
from domainbed_ext.train_checks import run_hparams
from domainbed_ext.training_job import run_job, train

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"dataset": "Debug28", "steps": 5, "checkpoint_freq": 2, "device": "cpu"}
# What differs between equal runs: wall-clock time, and the commit if someone commits in between.
NOT_REPEATABLE = ("step_time", "provenance")


def run(folder, **changes):
    return train(TrainArgs(**{**SMALL, "algorithm": "ERM_ViT", "output_dir": folder, **changes}))


def comparable(records):
    kept = []
    for record in records:
        args = {key: value for key, value in record["args"].items() if key != "output_dir"}
        rest = {key: value for key, value in record.items() if key not in NOT_REPEATABLE}
        kept.append({**rest, "args": args})
    return kept


class Stop(BaseException):
    """Ends a run at a step, as Ctrl-C would."""


def stop_at(step):
    def progress(state):
        if state.step == step and state.phase == "training":
            raise Stop

    return progress


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
    assert main(_flags(tmp_path)) == 0
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


def test_a_finished_run_is_left_alone(tmp_path, capsys):
    first = run(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert run(tmp_path) == first
    assert "finished: nothing to do" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def forget_records(folder):
    (folder / "results.jsonl").unlink()


def forget_the_last_record(folder):
    path = folder / "results.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def cut_the_last_record(folder):
    os.truncate(folder / "results.jsonl", (folder / "results.jsonl").stat().st_size - 10)


def garble_a_record(folder):
    path = folder / "results.jsonl"
    path.write_bytes(b"\xff\x00" * 50 + b"\n" + path.read_bytes())


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (forget_records, "is marked as done and holds no record"),
        (forget_the_last_record, "its records end at step 2, not 4"),
        (cut_the_last_record, "results.jsonl, line 3 is not a JSON record"),
        (garble_a_record, "results.jsonl, line 1 is not a JSON record"),
    ],
)
def test_a_finished_run_whose_records_are_not_whole_is_not_taken_for_one(
    tmp_path, capsys, harm, expected
):
    assert main(_flags(tmp_path)) == 0
    (tmp_path / "done").write_bytes(b"\xff garbage")  # what is in it does not matter
    harm(tmp_path)
    before = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert main(_flags(tmp_path)) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    after = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    for name in ("out.txt", "err.txt", "lock"):
        before.pop(name, None)
        after.pop(name, None)
    assert after == before


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b'{"reason": 5}'])
def test_an_unreadable_failure_marker_is_a_failure_and_no_obstacle(tmp_path, content):
    (tmp_path / "failed").write_bytes(content)
    assert Job({}, tmp_path).state is JobState.FAILED
    assert Job({}, tmp_path).last_error_line()
    assert main(_flags(tmp_path)) == 0
    assert Job({}, tmp_path).state is JobState.DONE


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"algorithm": "LTDR"}, "algorithm ERM_ViT there and LTDR here"), ({"seed": 1}, "seed 0")],
)
def test_another_run_in_the_same_folder_is_refused(tmp_path, changes, named):
    run(tmp_path / "finished")
    with pytest.raises(UsageError, match=f"holds another run.*{named}"):
        run(tmp_path / "finished", **changes)
    with pytest.raises(Stop):
        train(_args(tmp_path / "unfinished"), progress=stop_at(4))
    with pytest.raises(UsageError, match=f"holds another run.*{named}"):
        run(tmp_path / "unfinished", **changes)


ELABORATE = {"schedule": "one_cycle", "ema_decay": 0.9, "optimizer": "adamw", "drop_path": 0.1}


@pytest.mark.parametrize(
    ("algorithm", "hparams"),
    [
        ("ERM", {"batch_size": 8}),
        ("ERM", {"batch_size": 8, "class_balanced": True}),
        ("ERM_ViT", ELABORATE),
        ("GMOE", {}),
        ("GMOE_DAR", {}),
        ("GMOE_EEA", {"ltdr_tail_scope": "ema"}),
        ("LTDR", {"augmentation": "domainbed"}),
        ("TASK", {"task_mode": "hard", "task_unseen": "nearest", "ema_decay": 0.9}),
        ("CLUSTER", {"ema_decay": 0.9}),
        ("INSTRUCT", {"moe_noise_std": 1.0}),
        ("DISTRIBUTION", {}),
        ("DYNAMIC", {"ema_decay": 0.9, "dynamic_cycle": 4}),
        ("STGC", {}),
        ("DEEPSEEK", {}),
        # two steps dense, two of evolution, one of routing
        ("EVOMOE", {"evomoe_dense_share": 0.4, "evomoe_evolution_share": 0.4, "ema_decay": 0.9}),
        ("GROUPS", {"groups_setting": "v4Top2-t4Top2"}),
    ],
)
def test_a_stopped_run_ends_with_the_records_of_an_uninterrupted_one(tmp_path, algorithm, hparams):
    changes = {"algorithm": algorithm, "hparams": hparams}
    expected = run(tmp_path / "whole", **changes)
    for step in (2, 4):  # before any but the first checkpoint, and between two
        with pytest.raises(Stop):
            train(_args(tmp_path / "parts", **changes), progress=stop_at(step))
        assert not (tmp_path / "parts" / "failed").exists()
    torch.manual_seed(123)  # the state of a new process
    assert comparable(run(tmp_path / "parts", **changes)) == comparable(expected)


def test_an_algorithm_may_look_at_the_training_images_once(tmp_path, monkeypatch):
    looked = []

    def prepare(self, environments):
        looked.append([torch.cat([x for x, _ in batches]) for batches in environments])

    monkeypatch.setattr(algorithms.ERM_ViT, "prepare", prepare)
    with pytest.raises(Stop):
        train(_args(tmp_path, test_envs=(1,)), progress=stop_at(4))
    run(tmp_path, test_envs=(1,))  # goes on, and does not look again
    ((first, second),) = looked
    assert len(first) == len(second) == 13  # 16 images per domain less the 3 held out
    prepared = prepare_run(_args(tmp_path, test_envs=(1,)), run_hparams(_args(tmp_path)))
    split = prepared.splits["env2_in"]
    plain = prepared.dataset.eval_transform(split.environment.images(split.keys), None)
    assert torch.equal(second, plain)


def test_the_look_at_the_training_images_shows_how_far_it_is(tmp_path, monkeypatch):
    def prepare(self, environments):
        for batches in environments:  # two domains of 13 images, in batches of 5
            assert [len(y) for _, y in batches] == [5, 5, 3]
        assert sum(len(y) for _, y in environments[1]) == 13  # again, if wanted

    monkeypatch.setattr(algorithms.ERM_ViT, "prepare", prepare)
    states = []
    args = _args(tmp_path, test_envs=(1,), hparams={"eval_batch_size": 5})
    train(args, progress=states.append)
    looks = [state for state in states if state.phase == "preparing"]
    second = [13, 18, 23, 26]
    assert [state.step for state in looks] == [0, 5, 10, 13, *second, *second]
    assert {state.num_steps for state in looks} == {26}
    assert states[: len(looks)] == looks


def test_a_record_without_its_checkpoint_is_made_again(tmp_path, monkeypatch):
    expected = run(tmp_path / "whole")
    real, calls = training.save_checkpoint, []

    def full_disk(path, **rest):
        calls.append(rest["step"])
        if rest["step"] == 2 and calls.count(2) == 1:
            raise OSError(28, "No space left on device")
        real(path, **rest)

    monkeypatch.setattr(training, "save_checkpoint", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path / "parts")
    folder = tmp_path / "parts"
    assert json.loads((folder / "failed").read_text())["reason"] == "error"
    assert [record["step"] for record in read_records(folder / "results.jsonl")] == [0, 2]
    with open(folder / "results.jsonl", "a") as file:
        file.write('{"half a rec')
    assert comparable(run(folder)) == comparable(expected)
    assert not (folder / "failed").exists()


def ask_at(step, phase="training", number=signal.SIGTERM):
    """Sends this process a signal at a step."""

    def progress(state):
        if (state.step, state.phase) == (step, phase):
            os.kill(os.getpid(), number)

    return progress


@pytest.mark.parametrize(
    ("algorithm", "hparams"),
    [("ERM_ViT", ELABORATE), ("LTDR", {"ltdr_tail_scope": "ema", "augmentation": "domainbed"})],
)
def test_a_signal_saves_at_that_step_and_changes_no_number(tmp_path, algorithm, hparams):
    changes = {"algorithm": algorithm, "hparams": hparams, "steps": 7, "checkpoint_freq": 3}
    expected = run(tmp_path / "whole", **changes)
    args = _args(tmp_path / "parts", **changes)
    # Records are made at steps 0, 3 and 6; a state counts the steps taken. So: between two records,
    # at the step of a record, and twice in the evaluation that makes one.
    signals = [
        (2, "training", signal.SIGTERM),
        (4, "training", signal.SIGUSR1),
        (4, "evaluating", signal.SIGUSR2),
        (7, "evaluating", signal.SIGTERM),
    ]
    for step, phase, number in signals:
        torch.manual_seed(123)  # the state of a new process
        with stops_on_signals():
            assert run_job(args, progress=ask_at(step, phase, number)) == 143
        assert load_checkpoint(tmp_path / "parts" / "checkpoint.safetensors").step == step - 1
        assert Job({}, tmp_path / "parts").state is JobState.INCOMPLETE
    assert comparable(train(args)) == comparable(expected)


def test_checkpoints_between_records_change_no_number(tmp_path, monkeypatch):
    real, saved = training.save_checkpoint, []

    def save(path, **rest):
        real(path, **rest)
        saved.append((rest["step"], bool(rest["since_record"])))

    monkeypatch.setattr(training, "save_checkpoint", save)
    expected = run(tmp_path / "whole", checkpoint_minutes=math.inf)
    assert saved == [(0, False), (2, False), (4, False)]
    saved.clear()
    assert comparable(run(tmp_path / "often", checkpoint_minutes=0)) == comparable(expected)
    pending = [(0, True), (0, False), (1, True), (2, True), (2, False)]
    assert saved[:5] == pending


def test_a_record_that_a_checkpoint_waits_for_is_made_once(tmp_path, monkeypatch):
    expected = run(tmp_path / "whole")
    real = training.save_checkpoint

    def killed_after_the_record(path, **rest):
        if rest["step"] == 2 and not rest["since_record"]:
            raise Stop
        real(path, **rest)

    monkeypatch.setattr(training, "save_checkpoint", killed_after_the_record)
    with pytest.raises(Stop):
        run(tmp_path / "parts", checkpoint_minutes=0)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "parts" / "checkpoint.safetensors").step == 2
    assert len(read_records(tmp_path / "parts" / "results.jsonl")) == 2
    assert comparable(run(tmp_path / "parts")) == comparable(expected)


def test_an_error_after_a_signal_is_no_failure(tmp_path, monkeypatch, capsys):
    def update(self, minibatches, unlabeled=None):
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("a decoding process is gone")

    monkeypatch.setattr(algorithms.ERM_ViT, "update", update)
    assert main(_flags(tmp_path)) == 143
    assert capsys.readouterr().err == (
        "stopped (a decoding process is gone); the same command goes on from the last checkpoint, "
        "if there is one\n"
    )
    assert not (tmp_path / "failed").exists()
    assert not stop_requested()


def test_a_signal_before_the_first_step_ends_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "domainbed_ext.runs.prepare_run", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
    )
    assert main(_flags(tmp_path)) == 143
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("err.txt", "lock", "out.txt", "progress.json"),
    ]


def lose_the_end(path):
    os.truncate(path, path.stat().st_size - 700)


def overwrite_a_line(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\x00\xff garbage\n" + lines[1])


def lose_a_line(path):
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[1])


def change_a_digit(path):
    path.write_bytes(path.read_bytes().replace(b'"epoch": 0.0', b'"epoch": 0.5', 1))


@pytest.mark.parametrize(
    "harm", [lose_the_end, overwrite_a_line, lose_a_line, change_a_digit, Path.unlink]
)
def test_damaged_records_are_restored_from_the_checkpoint(tmp_path, capsys, harm):
    expected = run(tmp_path / "whole")
    with pytest.raises(Stop):
        train(_args(tmp_path / "parts"), progress=stop_at(4))  # after the records of steps 0 and 2
    harm(tmp_path / "parts" / "results.jsonl")
    capsys.readouterr()
    assert comparable(run(tmp_path / "parts")) == comparable(expected)
    line = "results.jsonl was damaged: its 2 records are restored from the checkpoint"
    assert line in capsys.readouterr().out
    assert comparable(read_records(tmp_path / "parts" / "results.jsonl")) == comparable(expected)


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
    assert main(_flags(tmp_path)) == 1
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
    assert main(_flags(tmp_path)) == 1
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
    assert main([*_flags(tmp_path), "--test_envs"]) == 0
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
    args = _args(tmp_path, algorithm="LTDR", save_model_every_checkpoint=True)
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


def test_a_run_may_go_on_with_other_evaluations(tmp_path):
    expected = run(tmp_path / "whole")
    with pytest.raises(Stop):
        train(_args(tmp_path / "parts", eval_splits="needed"), progress=stop_at(4))
    records = run(tmp_path / "parts")
    assert ["env1_in_acc" in record for record in records] == [False, False, True]
    assert comparable(records)[2] == comparable(expected)[2]


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
        args = _args(tmp_path, trial_seed=trial, hparams_seed=draw, hparams_per_trial=mode)
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
        assert main(_flags(tmp_path)) == 3
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
    assert main([*_flags(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected in error
    assert error.count("\n") == 1


def test_a_typing_error_leaves_no_folder(tmp_path, capsys):
    assert main([*_flags(tmp_path / "out"), "--algorithm", "LTDRR"]) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
def test_cuda_repeats_itself_and_resumes(tmp_path):
    changes = {"device": "cuda", "algorithm": "LTDR"}
    expected = run(tmp_path / "whole", **changes)
    assert expected[0]["provenance"]["device"] == torch.cuda.get_device_name()
    with pytest.raises(Stop):
        train(_args(tmp_path / "parts", **changes), progress=stop_at(4))
    parts = run(tmp_path / "parts", **changes)
    for record in (*parts, *expected):
        del record["mem_gb"]
    assert comparable(parts) == comparable(expected)


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


def _args(folder, **changes):
    return TrainArgs(**{**SMALL, "algorithm": "ERM_ViT", "output_dir": folder, **changes})


def _flags(folder):
    return _args(folder).command_line()


def start_process(folder, *flags):
    command = [sys.executable, "-m", "domainbed_ext.scripts.train", *_flags(folder), *flags]
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
