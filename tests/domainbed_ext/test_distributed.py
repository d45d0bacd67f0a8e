"""One run on several ranks: equal to one process, resumable on any number, clear when it fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import domainbed_ext.checkpoint as checkpoint_module
from domainbed_ext.algorithms import ERM_ViT
from domainbed_ext.atomic_files import CannotWriteError
from domainbed_ext.checkpoint import load_checkpoint, save_checkpoint
from domainbed_ext.distributed import (
    LostRankError,
    OtherRankError,
    Ranks,
    current_ranks,
    first_message,
    on_first_rank,
)
from domainbed_ext.errors import UsageError
from domainbed_ext.job_files import read_failure
from domainbed_ext.job_process import TORCHRUN_MODULE
from domainbed_ext.launchers import devices
from domainbed_ext.loaders import EvalBatches, TrainBatches
from domainbed_ext.records import read_records
from domainbed_ext.runs import prepare_run
from domainbed_ext.saved_models import load_algorithm
from domainbed_ext.scripts.sweep import main as sweep
from domainbed_ext.scripts.train import main
from domainbed_ext.stop_signals import Stopped, stops_on_signals
from domainbed_ext.torchrun import distributed_command, ranks_of
from domainbed_ext.train_args import TrainArgs
from domainbed_ext.train_checks import check_args
from domainbed_ext.training_job import train
from tests.distributed import RankError, run_ranks

ROOT = Path(__file__).resolve().parents[2]
# Nothing drawn at random, so that one process computes the same. Seven images per domain are not
# shared evenly, and five experts neither.
QUIET = {
    "moe_noise_std": 0.0,
    "moe_expert_dropout": 0.0,
    "drop_path": 0.0,
    "ltdr_tail_scope": "image",
    "moe_num_experts": 5,
    "batch_size": 7,
    "grad_clip": 0.5,
    "ema_decay": 0.9,
}


def arguments(folder: Path, **hparams) -> TrainArgs:
    return TrainArgs(
        algorithm="LTDR",
        dataset="Debug28",
        output_dir=str(folder),
        hparams={"moe_dispatcher": "all_to_all", **hparams},
        steps=5,
        checkpoint_freq=2,
        device="cpu",
    )


def without_times(records: list[dict]) -> list[dict]:
    kept = []
    for record in records:
        numbers = {k: v for k, v in record.items() if k not in ("step_time", "args", "provenance")}
        kept.append(numbers)
    return kept


class Stop(Exception):  # noqa: N818
    pass


def train_on_ranks(args: TrainArgs, stop_at: int | None = None) -> list[dict] | str:
    """`train` on this rank; with `stop_at`, rank 1 fails at that step."""
    plain_update, steps = ERM_ViT.update, []

    def update(self, minibatches, unlabeled=None):
        steps.append(None)
        if stop_at == len(steps) - 1 and current_ranks().rank == 1:
            raise Stop("of the test")
        return plain_update(self, minibatches, unlabeled)

    ERM_ViT.update = update
    try:
        return train(args)
    except (Stop, OtherRankError) as error:
        return str(error)
    finally:
        ERM_ViT.update = plain_update


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, train(arguments(folder, **QUIET))


def assert_same_numbers(records: list[dict], expected: list[dict]) -> None:
    assert len(records) == len(expected)
    for ours, theirs in zip(without_times(records), without_times(expected), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            # a token at the threshold may fall on either side when sums round differently
            slack = 5e-3 if name in ("tail_share", "experts_per_token") else 5e-5
            if isinstance(value, float):
                assert ours[name] == pytest.approx(value, abs=slack), name


@pytest.mark.parametrize("dispatcher", ["all_to_all", "local"])
def test_two_ranks_equal_one_process(tmp_path, one_process, dispatcher):
    folder, expected = one_process
    args = arguments(tmp_path, **{**QUIET, "moe_dispatcher": dispatcher})
    run_ranks(train_on_ranks, 2, args)
    records = read_records(tmp_path / "results.jsonl")
    assert_same_numbers(records, expected)
    assert records[0]["provenance"]["ranks"] == 2
    assert "ranks" not in expected[0]["provenance"]
    assert records[0]["args"].keys() == expected[0]["args"].keys()
    assert sorted(p.name.partition(".tfevents.")[0] for p in tmp_path.iterdir()) == [
        "done", "events.out", "model.json", "model.safetensors", "results.jsonl",
    ]  # fmt: skip
    ours, theirs = load_algorithm(tmp_path), load_algorithm(folder)
    x = torch.rand(4, 3, 28, 28)
    torch.testing.assert_close(ours.predict(x), theirs.predict(x), atol=1e-3, rtol=1e-3)


def test_a_stopped_run_goes_on_and_ends_with_the_same_records(tmp_path):
    """Bit for bit on as many ranks, noise and dropout included; and on any other number."""
    uninterrupted = tmp_path / "uninterrupted"
    run_ranks(train_on_ranks, 2, arguments(uninterrupted))
    expected = without_times(read_records(uninterrupted / "results.jsonl"))

    stopped = tmp_path / "stopped"
    args = arguments(stopped)
    said = run_ranks(train_on_ranks, 2, args, 3)
    assert said[1] == "of the test"
    assert said[0] == "rank 1: Stop: of the test"
    assert read_failure(stopped)["message"] == "rank 1: Stop: of the test"
    assert [record["step"] for record in read_records(stopped / "results.jsonl")] == [0, 2]
    state = load_checkpoint(stopped / "checkpoint.safetensors")
    assert state.step == 2  # though rank 1 went away right after it
    assert len(state.other_rng_states) == 1
    experts = state.training_state["algorithm"]["network.blocks.2.mlp.experts.fc1_weight"]
    assert len(experts) == 6  # all of them, though each rank had three
    for number in (1, 3):
        shutil.copytree(stopped, tmp_path / str(number))

    run_ranks(train_on_ranks, 2, args)
    assert without_times(read_records(stopped / "results.jsonl")) == expected
    assert not (stopped / "failed").exists()

    train(arguments(tmp_path / "1"))
    run_ranks(train_on_ranks, 3, arguments(tmp_path / "3"))
    for number in (1, 3):
        records = read_records(tmp_path / str(number) / "results.jsonl")
        assert [record["step"] for record in records] == [0, 2, 4]
        assert without_times(records)[:2] == expected[:2]
        assert np.isfinite(records[-1]["loss"])


def save_slowly_then_in_vain(path: Path) -> None:
    """Rank 1 returns from saving when rank 0 has written; and hears that it could not."""
    write = checkpoint_module.write_tensors

    def write_slowly(*args, **options):
        time.sleep(0.3)
        write(*args, **options)

    checkpoint_module.write_tensors = write_slowly
    save_checkpoint(path, step=3, algorithm=torch.nn.Linear(2, 2), info={})
    assert load_checkpoint(path).step == 3

    expected = CannotWriteError if current_ranks().is_first else OtherRankError
    with pytest.raises(expected, match="cannot write"):
        save_checkpoint(path / "below a file", step=4, algorithm=torch.nn.Linear(2, 2), info={})


def test_no_rank_leaves_before_a_checkpoint_is_written(tmp_path):
    run_ranks(save_slowly_then_in_vain, 2, tmp_path / "checkpoint.safetensors")


def signalled_at_step_3(args: TrainArgs) -> int | None:
    """Rank 1 alone gets a signal; all leave after the same step."""

    def progress(state):
        if state.step == 4 and current_ranks().rank == 1:
            os.kill(os.getpid(), signal.SIGUSR2)

    with pytest.raises(Stopped) as stop, stops_on_signals():
        train(args, progress=progress)
    return stop.value.step


def test_a_signal_to_one_rank_stops_all_at_one_step(tmp_path):
    whole, parts = (arguments(tmp_path / name) for name in ("whole", "parts"))
    run_ranks(train_on_ranks, 2, whole)
    assert run_ranks(signalled_at_step_3, 2, parts) == [3, 3]
    checkpoint = load_checkpoint(tmp_path / "parts" / "checkpoint.safetensors")
    assert checkpoint.step == 3
    assert len(checkpoint.since_record["loss"]) == 1  # the last record was made at step 2
    run_ranks(train_on_ranks, 2, parts)
    ours, theirs = (
        without_times(read_records(tmp_path / name / "results.jsonl"))
        for name in ("parts", "whole")
    )
    assert ours == theirs


@pytest.mark.slow
def test_sigterm_reaches_the_ranks_of_a_sweep(tmp_path):
    command = [
        *(sys.executable, "-m", "domainbed_ext.scripts.sweep"),
        *("--datasets", "Debug28", "--algorithms", "LTDR", "--output_dir", str(tmp_path)),
        *("--n_hparams", "1", "--n_trials", "1", "--single_test_envs", "--test_envs", "0"),
        *("--steps", "100000", "--skip_confirmation", "--device", "cpu", "--gpus_per_job", "2"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 90
        while not (found := list(tmp_path.glob("*/results.jsonl"))):
            assert time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=90)
    assert process.returncode == 143
    assert "Traceback" not in said
    folder = found[0].parent
    step = load_checkpoint(folder / "checkpoint.safetensors").step
    expected = f"stopped after step {step}; the same command goes on from there\n"
    assert (folder / "err.txt").read_text() == expected
    assert not (folder / "failed").exists()


def die_at_step_3(args: TrainArgs) -> None:
    """Rank 1 is killed; rank 0 leaves the reason and what to do."""
    plain_update, steps = ERM_ViT.update, []

    def update(self, minibatches, unlabeled=None):
        steps.append(None)
        if len(steps) == 4 and current_ranks().rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain_update(self, minibatches, unlabeled)

    ERM_ViT.update = update
    with pytest.raises(LostRankError):
        train(args)


def test_a_rank_that_is_killed_is_missed(tmp_path):
    with pytest.raises(RankError, match="rank 1 died with code -9"):
        run_ranks(die_at_step_3, 2, arguments(tmp_path), outlast_deaths=True)
    failure = read_failure(tmp_path)
    assert failure["reason"] == "died"
    assert "rank 0 lost its connection to another rank" in failure["message"]
    assert len(read_records(tmp_path / "results.jsonl")) == 2


def check_agreement() -> None:
    ranks = current_ranks()
    assert on_first_rank(lambda: ("only", ranks.rank)) == ("only", 0)
    assert first_message(f"from {ranks.rank}" if ranks.rank else None) == "from 1"
    assert first_message(None) is None

    def fail():
        raise UsageError("what is wrong")

    with pytest.raises(UsageError if ranks.is_first else OtherRankError, match="what is wrong"):
        on_first_rank(fail)

    for args, message in (
        (TrainArgs(algorithm="ERM", dataset="Debug28", device="cpu"), "cannot train ERM"),
        (
            TrainArgs(
                algorithm="ERM_ViT", dataset="Debug28", device="cpu", hparams={"batch_size": 1}
            ),
            "batch_size=1 images per domain cannot be shared by 2 ranks",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            prepare_run(args, check_args(args))


def test_ranks_agree():
    run_ranks(check_agreement, 2)


def test_shares_make_the_whole_batch():
    dataset = prepare_run(arguments(Path("unused")), check_args(arguments(Path("unused")))).dataset
    split = dataset.splits(0, holdout_fraction=0.2, trial_seed=0)["in"]
    options = {"batch_size": 7, "seed": 0, "transform": dataset.train_transform}
    whole_x, whole_y = next(iter(TrainBatches(split, **options)))
    parts = [
        next(iter(TrainBatches(split, **options, share=Ranks(rank, 3).share(7))))
        for rank in range(3)
    ]
    assert [len(y) for _, y in parts] == [2, 2, 3]
    assert torch.equal(torch.cat([x for x, _ in parts]), whole_x)
    assert torch.equal(torch.cat([y for _, y in parts]), whole_y)

    # evaluation: every image once, as many batches everywhere, fillers with the label -1
    options = {"batch_size": 2, "transform": dataset.eval_transform}
    seen = [
        [y for _, y in EvalBatches(split, **options, ranks=Ranks(rank, 3))] for rank in range(3)
    ]
    assert len({len(batches) for batches in seen}) == 1
    labels = torch.cat([y for batches in seen for y in batches])
    assert len(labels[labels >= 0]) == len(split)


def test_torchrun_is_asked_for(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("RANK", raising=False)
    flags = ["--distributed", "--algorithm", "LTDR", "--dataset", "Debug28"]
    assert main([*flags, "--output_dir", str(tmp_path / "new")]) == 2
    assert "torchrun --standalone --nproc_per_node 2" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_commands_of_a_sweep():
    plain = ["python", "-m", "domainbed_ext.scripts.train", "--dataset", "PACS"]
    command = distributed_command(plain, 4)
    assert ranks_of(plain) == 1
    assert ranks_of(command) == 4
    assert TORCHRUN_MODULE in command
    assert command[-4:] == [
        "domainbed_ext.scripts.train", "--distributed", "--dataset", "PACS",
    ]  # fmt: skip


def test_bad_input_of_a_sweep(capsys, monkeypatch, tmp_path):
    flags = ["--datasets", "Debug28", "--output_dir", str(tmp_path), "--skip_confirmation"]
    few = [*flags, "--n_hparams", "1", "--n_trials", "1", "--single_test_envs", "--test_envs", "0"]
    assert sweep([*few, "--algorithms", "ERM", "LTDR", "--gpus_per_job", "2"]) == 2
    assert "ERM trains on one device only" in capsys.readouterr().err
    assert sweep([*few, "--algorithms", "LTDR", "--gpus_per_job", "0"]) == 2
    assert "--gpus_per_job 0" in capsys.readouterr().err
    monkeypatch.setattr(devices, "cuda_devices", lambda: ["0"])
    assert sweep([*few, "--algorithms", "LTDR", "--gpus_per_job", "2"]) == 2
    assert "this machine has 1 CUDA devices" in capsys.readouterr().err


def images(folder: Path) -> Path:
    """Two domains of twelve small images; the last one of the second domain is damaged."""
    for domain in ("day", "night"):
        for label in ("cat", "dog"):
            place = folder / domain / label
            place.mkdir(parents=True)
            for number in range(6):
                pixels = np.full((16, 16, 3), 20 * number, np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


def test_a_rank_that_fails_ends_the_job_with_its_reason(tmp_path, capsys):
    """Through torchrun and a sweep: a damaged image that only one rank reads; then it is mended."""
    data = images(tmp_path / "images")
    out = tmp_path / "sweep"
    hparams = {
        "backbone": "vit_tiny_patch16_224",
        "pretrained": False,
        "batch_size": 8,
        "moe_dispatcher": "all_to_all",
    }
    flags = [
        "--datasets", f"folder:{data}", "--algorithms", "LTDR", "--output_dir", str(out),
        "--data_dir", str(tmp_path / "data"),
        "--n_hparams", "1", "--n_trials", "1", "--single_test_envs", "--test_envs", "1",
        "--steps", "1", "--hparams", json.dumps(hparams), "--skip_confirmation",
        "--device", "cpu", "--num_workers", "0", "--gpus_per_job", "2", "--skip_model_save",
    ]  # fmt: skip

    damaged = data / "night" / "dog" / "5.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(b"no image")
    assert sweep(flags) == 1
    said = capsys.readouterr().err
    (folder,) = [path for path in out.iterdir() if path.is_dir()]
    reason = read_failure(folder)["message"]
    assert "5.png" in reason
    assert "5.png" in said
    assert "5.png" in (folder / "err.txt").read_text().splitlines()[-1]

    damaged.write_bytes(whole)
    assert sweep(flags) == 0
    (record,) = read_records(folder / "results.jsonl")
    assert record["provenance"]["ranks"] == 2
    assert (folder / "done").exists()
