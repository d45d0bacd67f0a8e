"""TensorBoard and Weights & Biases get each record once, and change nothing."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sweep_records import make_record

from domainbed_ext.distributed import Ranks
from domainbed_ext.errors import UsageError
from domainbed_ext.plan import make_jobs
from domainbed_ext.records import read_records
from domainbed_ext.sweep_flags import build_parser
from domainbed_ext.tracking import EVENTS_GLOB, TensorBoard, scalars, tracked
from domainbed_ext.train_args import TrainArgs
from domainbed_ext.train_checks import check_args
from domainbed_ext.training_job import train

ROOT = Path(__file__).resolve().parents[2]


class Stop(BaseException):
    """Ends a run at a step, as Ctrl-C would."""


def train_here(folder, *, stop_at=None, **changes):
    def progress(state):
        if state.step == stop_at and state.phase == "training":
            raise Stop

    small = {"dataset": "Debug28", "steps": 5, "checkpoint_freq": 2, "device": "cpu"}
    args = TrainArgs(**{**small, "algorithm": "ERM_ViT", "output_dir": folder, **changes})
    return train(args, progress=progress)


def record_of(step, **extra):
    return make_record([0], step=step, in_acc=[0.5] * 3, out_acc=[0.4] * 3, loss=1.5, **extra)


def fake_run(folder, *, ranks=None, **args):
    args = TrainArgs(output_dir=folder, **args)
    return SimpleNamespace(folder=folder, args=args, hparams={"lr": 0.1}, ranks=ranks or Ranks())


def read_events(folder):
    """{tag: [(step, value)]} of a folder's only event file, in the order they were written."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    (file,) = folder.glob(EVENTS_GLOB)
    found = {}
    for event in loader.LegacyEventFileLoader(str(file)).Load():
        for value in event.summary.value:
            number = value.simple_value if value.HasField("simple_value") else value.tensor
            found.setdefault(value.tag, []).append((event.step, number))
    return found


def test_numbers_get_names_that_group():
    record = make_record(
        [1],
        in_acc=[0.9, 0.4],
        out_acc=[0.6, 0.5],
        env1_unseen_class_acc=0.3,
        balance_loss=0.01,
        lr=1e-3,
        provenance={"environments": ["art painting", "+90%"]},
    )
    assert scalars(record) == {
        "accuracy/in": 0.9,
        "accuracy/out": 0.6,
        "accuracy/test": 0.4,
        "in_acc/0_art_painting": 0.9,
        "in_acc/1__90_": 0.4,
        "out_acc/0_art_painting": 0.6,
        "out_acc/1__90_": 0.5,
        "unseen_class_acc/1__90_": 0.3,
        "loss/balance_loss": 0.01,
        "run/lr": 1e-3,
    }
    assert scalars(record_of(0))["out_acc/2"] == 0.4  # records of DomainBed name no domains


def test_the_average_of_swad_is_told_apart_from_the_last_step(tmp_path, wandb):
    average = record_of(10, provenance={"weights": "swad"})
    with tracked(fake_run(tmp_path, wandb="dg"), [record_of(0)]) as track:
        track(record_of(10))
        track(average)
    with tracked(fake_run(tmp_path, wandb="dg"), [record_of(0), record_of(10), average]):
        pass
    events = read_events(tmp_path)
    assert [step for step, _ in events["accuracy/test"]] == [0, 10]
    assert events["swad_accuracy/test"] == [(10, 0.5)]
    logged = [said for said in wandb() if "log" in said]
    logged = [(said["log"], "swad_accuracy/test" in said["values"]) for said in logged]
    assert logged == [(0, False), (10, False), (10, True)]


def test_tensorboard_has_every_record_of_a_run_once(tmp_path):
    records = train_here(tmp_path)
    events = read_events(tmp_path)
    assert b"ERM_ViT on Debug28, test 0" in events.pop("run")[0][1].string_val[0]
    assert set(events) == {tag for record in records for tag in scalars(record)}
    for tag, found in events.items():
        expected = [(r["step"], scalars(r)[tag]) for r in records if tag in scalars(r)]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [v for _, v in found] == pytest.approx([v for _, v in expected], rel=1e-6)


def test_a_run_that_goes_on_repeats_no_step(tmp_path):
    for step in (2, 4):
        with pytest.raises(Stop):
            train_here(tmp_path, stop_at=step)
    records = train_here(tmp_path)
    assert [record["step"] for record in records] == [0, 2, 4]
    for tag, found in read_events(tmp_path).items():
        assert tag == "run" or [step for step, _ in found] == [0, 2, 4]


def test_records_made_again_replace_those_that_were_told(tmp_path):
    with tracked(fake_run(tmp_path), []) as track:
        track(record_of(0))
        track(record_of(10, balance_loss=7.0))
    # Killed before the checkpoint of step 10: the run goes on with the record of step 0 alone.
    with tracked(fake_run(tmp_path), [record_of(0)]) as track:
        track(record_of(10, balance_loss=8.0))
    assert read_events(tmp_path)["loss/balance_loss"] == [(10, 8.0)]
    assert read_events(tmp_path)["loss/loss"] == [(0, 1.5), (10, 1.5)]


def test_a_record_that_was_not_told_is_told_when_the_run_goes_on(tmp_path):
    with tracked(fake_run(tmp_path), [record_of(0)]) as track:
        track(record_of(10))
    # Killed between the checkpoint of the last step and the tracker: nothing new comes.
    with tracked(fake_run(tmp_path), [record_of(0), record_of(10), record_of(20)]):
        pass
    assert [step for step, _ in read_events(tmp_path)["loss/loss"]] == [0, 10, 20]


def test_no_tensorboard_writes_none(tmp_path):
    train_here(tmp_path, no_tensorboard=True)
    assert not list(tmp_path.glob(EVENTS_GLOB))


def test_only_the_first_rank_tells(tmp_path):
    with tracked(fake_run(tmp_path, ranks=Ranks(rank=1, size=2)), []) as track:
        track(record_of(0))
    assert not list(tmp_path.glob(EVENTS_GLOB))


def test_a_tracker_that_fails_warns_once_and_stops_nothing(tmp_path, monkeypatch, caplog):
    expected = train_here(tmp_path / "without", no_tensorboard=True)
    calls = []

    def full_disk(self, record):
        calls.append(record)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoard, "add", full_disk)
    with caplog.at_level(logging.WARNING):
        records = train_here(tmp_path / "failing")
    assert len(calls) == 1
    (line,) = [r.getMessage() for r in caplog.records if r.name == "domainbed_ext.tracking"]
    assert line == (
        f"TensorBoard gets no more records of {tmp_path / 'failing'} "
        "(OSError: [Errno 28] No space left on device); the run goes on"
    )
    assert (tmp_path / "failing" / "done").exists()
    assert accuracies(records) == accuracies(expected)


def accuracies(records):
    return [{k: v for k, v in r.items() if k.endswith(("acc", "loss"))} for r in records]


# A stand-in for the package: it writes down what it is told, and draws random numbers as the real
# one does.
FAKE_WANDB = """
import json, os, random
import numpy as np

class Settings:
    def __init__(self, **settings):
        self.settings = settings

class Run:
    def log(self, values, step):
        if os.environ.get("FAKE_WANDB_FAILS") == "log":
            raise ConnectionError("no network")
        random.random(), np.random.rand()
        tell(log=step, values=values)

    def finish(self, exit_code):
        tell(finish=exit_code)

def tell(**said):
    with open(os.environ["FAKE_WANDB"], "a") as file:
        print(json.dumps(said), file=file)

def init(*, settings, **options):
    tell(init=options, settings=settings.settings)
    return Run()
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """The stand-in, importable; returns a function that reads what it was told."""
    package = tmp_path / "packages" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    told = tmp_path / "told.jsonl"
    monkeypatch.setenv("FAKE_WANDB", str(told))
    yield lambda: [json.loads(line) for line in told.read_text().splitlines()]
    sys.modules.pop("wandb", None)


def test_wandb_gets_every_record_once_and_changes_no_number(tmp_path, wandb):
    expected = train_here(tmp_path / "without", no_tensorboard=True)
    with pytest.raises(Stop):
        train_here(tmp_path / "run", wandb="dg", stop_at=4)
    records = train_here(tmp_path / "run", wandb="dg")
    assert accuracies(records) == accuracies(expected)
    first, second = (said for said in wandb() if "init" in said)
    assert first["init"]["project"] == "dg"
    assert first["init"]["name"] == "ERM_ViT on Debug28, test 0, hparams 0, trial 0"
    assert first["init"]["config"]["hparams"] == records[0]["hparams"]
    assert first["init"]["resume"] == "allow"
    assert first["init"]["id"] == second["init"]["id"]
    assert first["settings"] == {"console": "off", "quiet": True}
    logged = [(said["log"], said["values"]) for said in wandb() if "log" in said]
    assert logged == [(record["step"], scalars(record)) for record in records]
    assert [said["finish"] for said in wandb() if "finish" in said] == [1, 0]
    # It is no part of what a run is.
    assert "wandb" not in read_records(tmp_path / "run" / "results.jsonl")[0]["args"]


def test_wandb_gets_what_was_recorded_before_it_was_asked_for(tmp_path, wandb):
    with tracked(fake_run(tmp_path, wandb="dg"), [record_of(0), record_of(10)]) as track:
        track(record_of(20))
    assert [said["log"] for said in wandb() if "log" in said] == [0, 10, 20]
    with tracked(fake_run(tmp_path, wandb="dg"), [record_of(s) for s in (0, 10)]) as track:
        track(record_of(20))  # made again
        track(record_of(30))
    assert Counter(said["log"] for said in wandb() if "log" in said) == {0: 1, 10: 1, 20: 1, 30: 1}


def test_without_a_network_the_run_goes_on(tmp_path, wandb, monkeypatch, caplog):
    monkeypatch.setenv("FAKE_WANDB_FAILS", "log")
    with tracked(fake_run(tmp_path, wandb="dg"), []) as track:
        track(record_of(0))
        track(record_of(10))
    assert caplog.text.count("WandB gets no more records") == 1
    assert "ConnectionError: no network" in caplog.text
    assert [step for step, _ in read_events(tmp_path)["loss/loss"]] == [0, 10]


def test_generators_are_left_as_they_were(tmp_path, wandb):
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    with tracked(fake_run(tmp_path, wandb="dg"), []) as track:
        track(record_of(0))
    assert (random.random(), np.random.rand()) == expected


def test_wandb_that_is_not_there_is_refused_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"install the extra: pip install 'gmoe-ltdr\[tracking\]'"):
        check_args(TrainArgs(dataset="Debug28", wandb="dg"))
    with pytest.raises(UsageError, match="--wandb needs the name of a project"):
        check_args(TrainArgs(dataset="Debug28", wandb=""))


def test_a_folder_called_wandb_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # what offline runs leave behind
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UsageError, match="--wandb needs wandb"):
        check_args(TrainArgs(dataset="Debug28", wandb="dg"))


def test_sweeps_hand_the_flags_to_their_jobs(wandb):
    flags = ["--datasets", "Debug28", "--algorithms", "LTDR", "--no_tensorboard", "--wandb", "dg"]
    plain, tracking = (
        make_jobs(build_parser().parse_args([*flags[:count], "--n_trials", "1"]))
        for count in (4, len(flags))
    )
    assert all(job.args.no_tensorboard and job.args.wandb == "dg" for job in tracking)
    assert [job.output_dir for job in plain] == [job.output_dir for job in tracking]


def test_trackers_are_imported_at_the_first_record():
    code = (
        "import sys; import domainbed_ext.scripts.sweep, domainbed_ext.tracking;"
        "print(*(name in sys.modules for name in ('tensorboard', 'wandb', 'pandas')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["False"] * 3, done.stderr
