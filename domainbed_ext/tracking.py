"""Records on their way to TensorBoard and Weights & Biases while a run goes on.

results.jsonl stays the truth; what is told here is a copy, made so that a run that was stopped and
goes on has no step twice. A tracker changes nothing of the run, neither numbers nor random
generators, and one that fails is dropped with one warning. Its package is imported when the first
record is there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import random
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from domainbed_ext.atomic_files import write_atomically
from domainbed_ext.errors import UsageError
from domainbed_ext.train_args import job_label

if TYPE_CHECKING:
    from domainbed_ext.records import Record
    from domainbed_ext.runs import Run
    from domainbed_ext.train_args import TrainArgs

WANDB_FILE = "wandb.json"
EVENTS_GLOB = "events.out.tfevents.*"  # a name that TensorBoard looks for

_logger = logging.getLogger(__name__)
_DOMAIN_ACC = re.compile(r"env(\d+)_(\w+_acc)")


def add_tracker_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `train` and `sweep` that choose trackers."""
    parser.add_argument(
        "--no_tensorboard",
        action="store_true",
        help="write no event file for TensorBoard (else: tensorboard --logdir FOLDER)",
    )
    parser.add_argument(
        "--wandb",
        metavar="PROJECT",
        help="send records to this project of Weights & Biases too (extra [tracking]; "
        "WANDB_MODE=offline keeps them here)",
    )


def check_tracker_flags(args: TrainArgs) -> None:
    """Refuses a tracker that is asked for by name and not installed."""
    if args.wandb is None:
        return
    if not args.wandb:
        raise UsageError("--wandb needs the name of a project")
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a folder called wandb is no package
        raise UsageError(
            "--wandb needs wandb; install the extra: pip install 'gmoe-ltdr[tracking]'"
        )


@contextlib.contextmanager
def tracked(run: Run, records: Sequence[Record]) -> Iterator[Callable[[Record], None]]:
    """Gives a function to call with each new record; does something on the first rank only.

    Args:
        run: Which run it is.
        records: What it has recorded before it was stopped.
    """
    trackers: list[Tracker] = []
    if run.ranks.is_first:
        trackers += [] if run.args.no_tensorboard else [TensorBoard(run)]
        trackers += [] if run.args.wandb is None else [WandB(run)]

    def each(action: Callable[[Tracker], None]) -> None:
        for tracker in list(trackers):
            try:
                with _untouched_generators():
                    action(tracker)
            except Exception as error:
                trackers.remove(tracker)
                _logger.warning(
                    "%s gets no more records of %s (%s: %s); the run goes on",
                    type(tracker).__name__,
                    run.folder,
                    type(error).__name__,
                    error,
                )

    def add(record: Record) -> None:
        each(lambda tracker: tracker.add(record))

    for record in list(records):
        add(record)
    try:
        yield add
    except BaseException:
        each(lambda tracker: tracker.close(failed=True))
        raise
    each(lambda tracker: tracker.close(failed=False))


class Tracker:
    """Gets the records of one run: when it goes on those that it has, then the new ones."""

    def __init__(self, run: Run) -> None:
        self.folder = run.folder
        self.label = job_label(run.args)
        self.settings = {**run.args.record_args(), "hparams": run.hparams}

    def add(self, record: Record) -> None:
        """Takes a record that results.jsonl has."""
        raise NotImplementedError

    def close(self, *, failed: bool) -> None:
        """The run is over."""
        raise NotImplementedError


class TensorBoard(Tracker):
    """One event file in the run's folder, written anew when a run goes on."""

    _file: Any = None

    def add(self, record: Record) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._file is None:
            self._open()
        values = [Summary.Value(tag=t, simple_value=v) for t, v in scalars(record).items()]
        self._write(step=record["step"], summary=Summary(value=values))
        self._file.flush()

    def close(self, *, failed: bool) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.summary.writer.record_writer import RecordWriter
        from tensorboard.util.tensor_util import make_tensor_proto

        for old in self.folder.glob(EVENTS_GLOB):
            old.unlink()
        name = EVENTS_GLOB.replace("*", f"{time.time():.6f}.{socket.gethostname()}.{os.getpid()}")
        self._file = RecordWriter(open(self.folder / name, "wb"))
        self._write(file_version="brain.Event:2")
        # A TensorBoard that is watching forgets what it has read of the old file.
        self._write(step=0, session_log=SessionLog(status=SessionLog.START))
        rows = [f"**{self.label}**", "", *(f"    {key}: {v}" for key, v in self.settings.items())]
        text = Summary.Value(
            tag="run",
            metadata=create_summary_metadata("run", ""),
            tensor=make_tensor_proto("\n".join(rows)),
        )
        self._write(step=0, summary=Summary(value=[text]))

    def _write(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._file.write(Event(wall_time=time.time(), **content).SerializeToString())


class WandB(Tracker):
    """A run of Weights & Biases; `wandb.json` remembers which, and how many records it has."""

    _run: Any = None

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.project = run.args.wandb
        self._id = uuid.uuid4().hex[:16]
        self._num_seen = self._num_sent = 0

    def add(self, record: Record) -> None:
        if self._run is None:
            self._open()
        self._num_seen += 1
        if self._num_seen <= self._num_sent:
            return
        self._run.log(scalars(record), step=record["step"])
        self._num_sent = self._num_seen
        state = {"id": self._id, "records": self._num_sent}
        write_atomically(self.folder / WANDB_FILE, json.dumps(state) + "\n")

    def close(self, *, failed: bool) -> None:
        if self._run is not None:
            self._run.finish(exit_code=int(failed))

    def _open(self) -> None:
        import wandb

        path = self.folder / WANDB_FILE
        if path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            self._id, self._num_sent = known["id"], known["records"]
        self._run = wandb.init(
            project=self.project,
            id=self._id,
            resume="allow",
            name=self.label,
            config=self.settings,
            dir=str(self.folder),
            # out.txt and err.txt have what is printed, and need no summary of it
            settings=wandb.Settings(console="off", quiet=True),
        )


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """A record's numbers under names that trackers group by what is before the slash:
    "accuracy/test", "in_acc/0_art_painting", "loss/balance_loss", "run/lr". Those of the average
    that SWAD ends with, at the last step as the record before it, are "swad_accuracy/test" and so
    on.
    """
    from domainbed_ext.records import weights_of
    from domainbed_ext.selection import split_accs

    names = (record.get("provenance") or {}).get("environments") or []
    found = {f"accuracy/{split}": acc for split, acc in split_accs(record).items()}
    for key, value in record.items():
        if key == "step" or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        match = _DOMAIN_ACC.fullmatch(key)
        if match:
            env = int(match[1])
            name = re.sub(r"[^\w.-]", "_", f"{env}_{names[env]}" if env < len(names) else match[1])
            found[f"{match[2]}/{name}"] = value
        else:
            found[f"{'loss' if 'loss' in key else 'run'}/{key}"] = value
    return {f"swad_{n}": v for n, v in found.items()} if weights_of(record) == "swad" else found


@contextlib.contextmanager
def _untouched_generators() -> Iterator[None]:
    import numpy as np

    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
