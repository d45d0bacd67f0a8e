"""A run that was stopped or damaged, or is given again: what goes on, and what is refused."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from domainbed_ext import algorithms, training
from domainbed_ext.checkpoint import load_checkpoint
from domainbed_ext.errors import DivergedError, UsageError
from domainbed_ext.jobs import Job, JobState
from domainbed_ext.records import read_records
from domainbed_ext.runs import prepare_run
from domainbed_ext.scripts.train import main
from domainbed_ext.stop_signals import stop_requested, stops_on_signals
from domainbed_ext.train_checks import run_hparams
from domainbed_ext.training_job import run_job, train
from tests.short_runs import Stop, comparable, run, run_args, run_flags, stop_at

ELABORATE = {"schedule": "one_cycle", "ema_decay": 0.9, "optimizer": "adamw", "drop_path": 0.1}


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
    assert main(run_flags(tmp_path)) == 0
    (tmp_path / "done").write_bytes(b"\xff garbage")  # what is in it does not matter
    harm(tmp_path)
    before = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert main(run_flags(tmp_path)) == 2
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
    assert main(run_flags(tmp_path)) == 0
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
        train(run_args(tmp_path / "unfinished"), progress=stop_at(4))
    with pytest.raises(UsageError, match=f"holds another run.*{named}"):
        run(tmp_path / "unfinished", **changes)


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
            train(run_args(tmp_path / "parts", **changes), progress=stop_at(step))
        assert not (tmp_path / "parts" / "failed").exists()
    torch.manual_seed(123)  # the state of a new process
    assert comparable(run(tmp_path / "parts", **changes)) == comparable(expected)


def test_an_algorithm_may_look_at_the_training_images_once(tmp_path, monkeypatch):
    looked = []

    def prepare(self, environments):
        looked.append([torch.cat([x for x, _ in batches]) for batches in environments])

    monkeypatch.setattr(algorithms.ERM_ViT, "prepare", prepare)
    with pytest.raises(Stop):
        train(run_args(tmp_path, test_envs=(1,)), progress=stop_at(4))
    run(tmp_path, test_envs=(1,))  # goes on, and does not look again
    ((first, second),) = looked
    assert len(first) == len(second) == 13  # 16 images per domain less the 3 held out
    prepared = prepare_run(run_args(tmp_path, test_envs=(1,)), run_hparams(run_args(tmp_path)))
    split = prepared.splits["env2_in"]
    plain = prepared.dataset.eval_transform(split.environment.images(split.keys), None)
    assert torch.equal(second, plain)


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


def test_a_run_does_not_go_on_with_files_of_other_names(tmp_path):
    """As many images as before, in another order: its splits would be others."""
    data = tmp_path / "data"
    for domain in ("art", "photo"):
        for label, name in enumerate(("cat", "dog")):
            (data / domain / name).mkdir(parents=True)
            for number in range(5):
                image = Image.new("RGB", (8, 8), (50 * number, 90 * label, 0))
                image.save(data / domain / name / f"{number}.png")
    options = {
        "dataset": f"folder:{data}",
        "hparams": {"batch_size": 2, "pretrained": False, "backbone": "vit_tiny_patch16_224"},
    }
    with pytest.raises(Stop):
        train(run_args(tmp_path / "run", **options), progress=stop_at(3))
    one = data / "art" / "cat" / "1.png"
    one.rename(one.with_name("9.png"))
    with pytest.raises(UsageError, match=r"have other names than when the run in .* began") as said:
        run(tmp_path / "run", **options)
    assert "\n" not in str(said.value)
    one.with_name("9.png").rename(one)
    assert len(run(tmp_path / "run", **options)) == 3


def test_a_diverged_run_that_is_given_again_tells_the_same_reason(tmp_path, monkeypatch):
    plain = algorithms.ERM_ViT.loss

    def loss(self, x, y, domains):
        value, numbers = plain(self, x, y, domains)
        return value * (math.nan if steps.pop() else 1.0), numbers

    monkeypatch.setattr(algorithms.ERM_ViT, "loss", loss)
    said = []
    for again in ([True, False], [True]):
        steps = again  # the first step is fine, and its checkpoint is gone on from
        with pytest.raises(DivergedError) as error:
            run(tmp_path, checkpoint_freq=1)
        said.append(str(error.value))
    assert "loss is nan at step 1; last finite metrics: loss " in said[0]
    assert said[1].startswith(said[0].partition(", lr")[0])


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
    args = run_args(tmp_path / "parts", **changes)
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
    assert main(run_flags(tmp_path)) == 143
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
    assert main(run_flags(tmp_path)) == 143
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
        train(run_args(tmp_path / "parts"), progress=stop_at(4))  # has the records of steps 0 and 2
    harm(tmp_path / "parts" / "results.jsonl")
    capsys.readouterr()
    assert comparable(run(tmp_path / "parts")) == comparable(expected)
    line = "results.jsonl was damaged: its 2 records are restored from the checkpoint"
    assert line in capsys.readouterr().out
    assert comparable(read_records(tmp_path / "parts" / "results.jsonl")) == comparable(expected)


def test_a_run_may_go_on_with_other_evaluations(tmp_path):
    expected = run(tmp_path / "whole")
    with pytest.raises(Stop):
        train(run_args(tmp_path / "parts", eval_splits="needed"), progress=stop_at(4))
    records = run(tmp_path / "parts")
    assert ["env1_in_acc" in record for record in records] == [False, False, True]
    assert comparable(records)[2] == comparable(expected)[2]


@pytest.mark.gpu
def test_cuda_repeats_itself_and_resumes(tmp_path):
    changes = {"device": "cuda", "algorithm": "LTDR"}
    expected = run(tmp_path / "whole", **changes)
    assert expected[0]["provenance"]["device"] == torch.cuda.get_device_name()
    with pytest.raises(Stop):
        train(run_args(tmp_path / "parts", **changes), progress=stop_at(4))
    parts = run(tmp_path / "parts", **changes)
    for record in (*parts, *expected):
        del record["mem_gb"]
    assert comparable(parts) == comparable(expected)
