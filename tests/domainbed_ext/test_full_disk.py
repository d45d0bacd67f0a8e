"""A full disk: the job says so and stops, nothing good is lost, it goes on when there is room."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
import sys

import pytest
from sweep_records import make_record

from domainbed_ext.atomic_files import CannotWriteError, write_atomically
from domainbed_ext.checkpoint import load_last_checkpoint
from domainbed_ext.display import run_progress
from domainbed_ext.jobs import Job, JobState
from domainbed_ext.log_files import LogFile
from domainbed_ext.records import append_record, read_records
from domainbed_ext.scripts import train as train_module
from domainbed_ext.scripts.train import main
from domainbed_ext.train_args import TrainArgs
from domainbed_ext.training_job import run_job
from domainbed_ext.workers import _run_into_files

SMALL = (
    "--dataset Debug28 --algorithm LTDR --steps 5 --checkpoint_freq 2 --device cpu --no_tensorboard"
).split()
PAGE = 4096  # a tmpfs gives room by the page


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A disk of 64 MB of our own; a checkpoint of these runs takes 5."""
    path = tmp_path_factory.mktemp("disk")
    try:
        command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(path)]
        mounted = subprocess.run(command, capture_output=True, text=True)
        problem = mounted.stderr.strip() if mounted.returncode else None
    except OSError as error:
        problem = str(error)
    if problem:
        pytest.skip(f"no small file system can be mounted here ({problem})")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


class Ballast:
    """Fills a disk at a moment of a run, up to a little room."""

    def __init__(self, disk, *, step=None, phase=None, room=0):
        self.path = disk / "ballast"
        self.moment = (step, phase)
        self.room = room

    def __call__(self, state):
        if (state.step, state.phase) == self.moment:
            self.fill()

    def fill(self):
        with open(self.path, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(PAGE)):
                pass
        os.truncate(self.path, self.path.stat().st_size // PAGE * PAGE - self.room)

    def remove(self):
        self.path.unlink()


def flags(folder):
    return [*SMALL, "--output_dir", str(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert main(flags(folder)) == 0
    return folder


def comparable(folder):
    records = read_records(folder / "results.jsonl")
    for record in records:
        del record["step_time"], record["provenance"], record["args"]["output_dir"]
    return records, (folder / "model.safetensors").read_bytes()


# When the disk fills up, what room is left, the file that finds none, and what is there then: the
# steps of the records and of the checkpoint. Records are made at steps 0, 2 and 4; a state counts
# steps from 1.
MOMENTS = {
    "before the first record": ((1, "evaluating"), 0, "results.jsonl", [], None),
    "first checkpoint": ((1, "evaluating"), 4 * PAGE, "checkpoint.safetensors", [0], None),
    "second checkpoint": ((3, "evaluating"), 4 * PAGE, "checkpoint.safetensors", [0, 2], 0),
    # half of it: two records find room in the page that the first one took
    "third record": ((5, "evaluating"), 0, "results.jsonl", [0, 2], 2),
    "model": ((5, "saving"), 4 * PAGE, "model.safetensors", [0, 2, 4], 4),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_disk_that_fills_up(small_disk, whole, monkeypatch, capsys, moment):
    at, room, file, steps, checkpoint_step = MOMENTS[moment]
    ballast = Ballast(small_disk, step=at[0], phase=at[1], room=room)

    @contextlib.contextmanager
    def filling_up(label):
        with run_progress(label):
            yield ballast

    monkeypatch.setattr(train_module, "run_progress", filling_up)
    folder = small_disk / moment.replace(" ", "-")
    assert main(flags(folder)) == 1
    error = capsys.readouterr().err
    assert error == (
        f"error: cannot write {folder / file}: No space left on device; when that is mended, the "
        "same command goes on from the last checkpoint\n"
    )
    check_left(folder, steps, checkpoint_step)
    monkeypatch.undo()

    ballast.fill()  # it is still full when the job is tried again, and nothing gets worse
    assert main(flags(folder)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: cannot write ")
    assert "No space left on device" in error
    assert error.count("\n") == 1
    check_left(folder, None, checkpoint_step)

    ballast.remove()
    assert main(flags(folder)) == 0
    assert comparable(folder) == comparable(whole)
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in whole.iterdir()}


def check_left(folder, steps, checkpoint_step):
    checkpoint = load_last_checkpoint(folder)
    assert (checkpoint and checkpoint.step) == checkpoint_step
    path = folder / "results.jsonl"
    found = [record["step"] for record in (read_records(path) if path.exists() else [])]
    if steps is None:
        assert found[: len(checkpoint.records if checkpoint else [])] == [
            record["step"] for record in (checkpoint.records if checkpoint else [])
        ]
    else:
        assert found == steps
    assert not (folder / ".unfinished").exists()
    assert Job({}, folder).state in (JobState.FAILED, JobState.INCOMPLETE)


def test_a_worker_outlives_a_full_disk(small_disk, whole, capfd):
    folder = small_disk / "worker"
    args = TrainArgs(
        dataset="Debug28", algorithm="LTDR", steps=5, checkpoint_freq=2, output_dir=str(folder)
    )
    ballast = Ballast(small_disk, step=3, phase="evaluating")
    assert _run_into_files(args, ballast) == 1
    print("still heard")
    print("still heard", file=sys.stderr)
    assert capfd.readouterr() == ("still heard\n", "still heard\n")
    ballast.remove()
    assert _run_into_files(args, lambda state: None) == 0
    assert comparable(folder) == comparable(whole)


@contextlib.contextmanager
def largest_file(num_bytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_may_not_grow(tmp_path, whole, capsys):
    """The same without a small disk: the checkpoint is larger than files may be."""
    args = TrainArgs(
        **{"dataset": "Debug28", "algorithm": "LTDR", "steps": 5, "checkpoint_freq": 2},
        output_dir=str(tmp_path),
    )
    with largest_file(200_000):
        assert run_job(args) == 1
    assert f"checkpoint.safetensors: {os.strerror(errno.EFBIG)}" in capsys.readouterr().err
    assert Job({}, tmp_path).state is JobState.FAILED
    assert "cannot write" in Job({}, tmp_path).last_error_line()
    assert run_job(args) == 0
    assert comparable(tmp_path) == comparable(whole)


def test_a_record_that_finds_no_room_costs_no_other(tmp_path):
    path = tmp_path / "results.jsonl"
    first, second = (
        make_record([0], step=step, in_acc=[0.5], out_acc=[0.5], text="x" * 1000) for step in (0, 1)
    )
    append_record(path, first)
    with largest_file(path.stat().st_size + 500):
        with pytest.raises(CannotWriteError, match=r"cannot write .*results\.jsonl: File too"):
            append_record(path, second)
    assert read_records(path) == [first]
    append_record(path, second)
    assert read_records(path) == [first, second]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "text"
    write_atomically(path, "before")
    with largest_file(100):
        with pytest.raises(CannotWriteError, match="cannot write"):
            write_atomically(path, "x" * 1000)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_log_loses_lines_and_says_so(tmp_path):
    path = tmp_path / "out.txt"
    with LogFile(path) as log:
        log.write("first line\n")
        with largest_file(15):
            log.write("second line\n")
            log.write("third line\n")
        log.write("fourth line\n")
    assert path.read_text() == (
        "first line\nseco\n(output is missing here: File too large)\nfourth line\n"
    )
    with LogFile(path) as log:
        log.write("fifth line\n")
    assert path.read_text().endswith("fourth line\nfifth line\n")


def test_a_log_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(CannotWriteError, match=r"cannot write .*out\.txt: No such file"):
        LogFile(tmp_path / "absent" / "out.txt")
