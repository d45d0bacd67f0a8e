"""A run that SIGKILL ends, wherever it is and however often, ends with the same bytes as one that
nobody disturbed.

What may differ is one number of a record, "step_time": seconds of the wall clock. Memory, "mem_gb",
is that of a GPU and 0 here; the rest of `results.jsonl`, the model and its description, and the
names of the files in the folder are compared to the byte.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from domainbed_ext.records import read_records
from tests.killed_runs import ROOT, TINY_VIT, Attempt, End, TrainingProcesses

HPARAMS = {
    "backbone": TINY_VIT,
    "batch_size": 8,
    "eval_batch_size": 512,
    "moe_layers": "last_two",
    # Everything that draws numbers or remembers: noise of the gate, dropout, averaged weights.
    "moe_noise_std": 1.0,
    "moe_expert_dropout": 0.1,
    "drop_path": 0.2,
    "ema_decay": 0.9,
    "schedule": "cosine",
}
RUN = "--algorithm LTDR --dataset RotatedDigits --device cpu --steps 7 --checkpoint_freq 3".split()
FLAGS = [*RUN, "--output_dir", "job", "--hparams", json.dumps(HPARAMS)]
AT_EVERY_STEP = [*FLAGS, "--checkpoint_minutes", "0"]  # checkpoints
AFTER_THE_FIRST_CHECKPOINT = "save_checkpoint: return"

# Where to kill: a name, how many places of that kind the default suite takes, and which they are.
KINDS = [
    (
        "starting",
        2,
        r"(resume|_last_whole|load_\w+|restore_records|read_\w+|remove_unfinished): ",
    ),
    ("in a step", 1, r"(check_finite|check_parameters): "),
    ("in an evaluation", 2, r"(evaluate|predicted_classes): "),
    ("appending a record", 4, r"append_record: (before|after)"),
    ("between record and checkpoint", 2, r"append_record: return|save_checkpoint: call|_encode: "),
    ("writing a checkpoint", 6, r"(write_tensors|safetensors_writing|replaced|_checksum): "),
    ("saving the model", 3, r"(save_algorithm|file_checksum|write_atomically): "),
    ("around done", 4, r"mark_done: |tidy_up: |execute: return|job_lock: before"),
]


@pytest.fixture(scope="module")
def processes() -> Iterator[TrainingProcesses]:
    with TrainingProcesses() as started:
        yield started


@pytest.fixture(scope="module")
def whole(processes, tmp_path_factory) -> Path:
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    finish(processes, folder)
    return folder / "job"


def places_after_the_first_checkpoint(processes, folder, flags) -> dict[str, int]:
    """How often a run that goes on there comes through each place."""
    folder.mkdir()
    begin(processes, folder, flags)
    return finish(processes, folder, flags, watch=True).places


def begin(processes, folder, flags) -> None:
    end = processes.run(Attempt(str(folder), flags, kill_at=AFTER_THE_FIRST_CHECKPOINT))
    assert end.killed, end.printed


def finish(processes, folder, flags=FLAGS, *, watch=False) -> End:
    end = processes.run(Attempt(str(folder), flags, watch=watch))
    assert (end.killed, end.status) == (False, 0), end.printed
    return end


def content(job: Path) -> dict[str, bytes]:
    """The files that have to be the same; all others by name only."""
    # the name of TensorBoard's file has the time in it
    files = {path.name: b"" for path in job.iterdir() if not path.name.startswith("events.")}
    files |= {name: (job / name).read_bytes() for name in ("model.json", "model.safetensors")}
    records = (job / "results.jsonl").read_bytes()
    files["results.jsonl"], count = re.subn(rb'"step_time": [^,]+', b'"step_time": 0', records)
    assert count == records.count(b"\n") == 3
    return files


def lose_what_was_not_synced(job: Path, place: str, draw: random.Random) -> None:
    """What else the machine's end may do than that of a process: files that were written and not
    yet synced are there in part."""
    for path in job.glob(".unfinished/*"):
        os.truncate(path, draw.randint(0, path.stat().st_size))
    if place in ("append_record: after flush", "append_record: before fsync"):
        path = job / "results.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        os.truncate(path, path.stat().st_size - draw.randint(0, len(lines[-1])))


def check_interrupted(job: Path, whole: Path) -> None:
    """What can be read of a run at any moment."""
    path = job / "results.jsonl"
    steps = [record["step"] for record in (read_records(path) if path.exists() else [])]
    assert steps == [0, 3, 6][: len(steps)]
    if (job / "done").exists():
        assert content(job).items() >= content(whole).items()
    else:
        assert (job / "checkpoint.safetensors").exists() or (
            job / "checkpoint.previous.safetensors"
        ).exists()


def kill_at(processes, chosen, whole, tmp_path, draw, flags) -> int:
    """Kills runs at the chosen places, one after the other as long as there is something left of a
    run, and lets each run finish. Returns how often it killed."""
    waiting, kills = list(chosen), 0
    for number in range(len(chosen) + 1):
        if not waiting:
            return kills
        folder = tmp_path / f"{number}"
        folder.mkdir()
        begin(processes, folder, flags)
        kills += 1
        first = waiting[0]
        while waiting:
            place, occurrence = waiting[0]
            attempt = Attempt(str(folder), flags, kill_at=place, occurrence=occurrence)
            end = processes.run(attempt)
            if not end.killed:
                assert end.status == 0, end.printed
                assert (place, occurrence) != first, f"{place} is never reached"
                break
            kills += 1
            waiting.pop(0)
            lose_what_was_not_synced(folder / "job", place, draw)
            check_interrupted(folder / "job", whole)
        finish(processes, folder, flags)
        assert content(folder / "job") == content(whole), f"after a kill before {waiting[:1]}"
    raise AssertionError("no progress")


def test_killed_at_places_of_every_kind(processes, whole, tmp_path):
    places = places_after_the_first_checkpoint(processes, tmp_path / "watched", FLAGS)
    draw = random.Random(0)
    chosen = []
    for kind, number, pattern in KINDS:
        names = [name for name in places if re.match(pattern, name)]
        assert len(names) >= number, f"no place {kind} in {list(places)}"
        drawn = draw.sample(names, number)
        chosen += [(name, draw.randint(1, places[name])) for name in drawn]
    draw.shuffle(chosen)
    kills = kill_at(processes, chosen, whole, tmp_path, draw, FLAGS)
    assert kills >= 24


def test_killed_by_the_clock(processes, whole, tmp_path):
    """Inside whatever it is doing, compiled code included."""
    draw = random.Random(1)
    for _ in range(6):
        delay = draw.uniform(0.05, 0.5)
        end = processes.run(Attempt(str(tmp_path), AT_EVERY_STEP, kill_after=delay))
        assert end.killed or end.status == 0, end.printed
    finish(processes, tmp_path, AT_EVERY_STEP)
    assert content(tmp_path / "job") == content(whole)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [FLAGS, AT_EVERY_STEP], ids=["at records", "at every step"])
def test_killed_at_every_place(processes, whole, tmp_path, flags):
    places = places_after_the_first_checkpoint(processes, tmp_path / "watched", flags)
    draw = random.Random(2)
    chosen = [(name, draw.randint(1, count)) for name, count in places.items()]
    draw.shuffle(chosen)
    assert kill_at(processes, chosen, whole, tmp_path, draw, flags) > len(chosen)


@pytest.mark.slow
def test_killed_as_users_run_it(tmp_path):
    """The command line, started anew each time, killed by the clock."""
    flags = "--algorithm LTDR --dataset RotatedDigits --device cpu --steps 60".split()
    flags += ["--checkpoint_freq", "5", "--hparams", '{"ema_decay": 0.9}', "--output_dir", "job"]
    command = [sys.executable, "-m", "domainbed_ext.scripts.train", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(folder: Path) -> subprocess.Popen:
        folder.mkdir(exist_ok=True)
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def end_of(process: subprocess.Popen) -> int:
        _, error = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), error
        return process.returncode

    assert end_of(start(tmp_path / "whole")) == 0
    draw, kills = random.Random(3), 0
    for _ in range(40):
        process = start(tmp_path / "killed")
        results = tmp_path / "killed" / "job" / "results.jsonl"
        before = results.stat().st_size if results.exists() else 0
        while process.poll() is None and (not results.exists() or results.stat().st_size <= before):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 1))
        process.kill()
        kills += 1
        if end_of(process) == 0:
            break
    assert kills >= 5
    assert end_of(start(tmp_path / "killed")) == 0
    texts = [
        re.sub(r'"step_time": [^,]+', "", (tmp_path / name / "job/results.jsonl").read_text())
        for name in ("whole", "killed")
    ]
    assert texts[0] == texts[1]
    models = [
        (tmp_path / name / "job" / "model.safetensors").read_bytes() for name in ("whole", "killed")
    ]
    assert models[0] == models[1]
