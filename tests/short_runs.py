"""Runs of a few steps on images that need no file, for the tests of training and resuming."""

from __future__ import annotations

from pathlib import Path

from domainbed_ext.train_args import TrainArgs
from domainbed_ext.training_job import train

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"dataset": "Debug28", "steps": 5, "checkpoint_freq": 2, "device": "cpu"}
# What differs between equal runs: wall-clock time, and the commit if someone commits in between.
NOT_REPEATABLE = ("step_time", "provenance")


def run(folder, **changes):
    """Trains in this process. Returns the records."""
    return train(run_args(folder, **changes))


def comparable(records):
    """What equal runs have in common."""
    kept = []
    for record in records:
        args = {key: value for key, value in record["args"].items() if key != "output_dir"}
        rest = {key: value for key, value in record.items() if key not in NOT_REPEATABLE}
        kept.append({**rest, "args": args})
    return kept


class Stop(BaseException):
    """Ends a run at a step, as Ctrl-C would."""


def stop_at(step):
    """A `progress` that raises `Stop` there."""

    def progress(state):
        if state.step == step and state.phase == "training":
            raise Stop

    return progress


def run_args(folder, **changes):
    """The arguments of such a run."""
    return TrainArgs(**{**SMALL, "algorithm": "ERM_ViT", "output_dir": folder, **changes})


def run_flags(folder):
    """The same as flags of `train`."""
    return run_args(folder).command_line()
