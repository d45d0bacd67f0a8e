"""How long jobs will take, reckoned from those of the same kind that are done.

A record holds the time of a training step. That of an evaluation is in no record: it is reckoned at
a third of a step per image, a step being a forward and a backward pass, which costs as much as two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from domainbed_ext.datasets import get_dataset_class, num_environments
from domainbed_ext.jobs import Job
from domainbed_ext.records import RECORDS_FILE, Record, read_records

FORWARD_SHARE = 1 / 3


@dataclass(frozen=True)
class Pace:
    """How fast jobs of one data set and algorithm were.

    Attributes:
        device: The name of what they ran on.
        num_jobs: How many they are.
        step: Seconds of a step, the median.
        image: Seconds of an image in an evaluation.
    """

    device: str
    num_jobs: int
    step: float
    image: float


def measured_pace(folders: Iterable[Path], *, device: str | None) -> Pace | None:
    """The pace of jobs of one data set and algorithm; None if none of them can tell.

    Args:
        folders: Of jobs that are done.
        device: Where it counts; None: wherever most of them ran.
    """
    steps: dict[str, list[float]] = {}
    images: dict[str, list[float]] = {}
    for folder in folders:
        # a job's first record is left out: its steps warm up
        timed = [r for r in _records(folder) if r["step"] and "step_time" in r]
        if not timed or "batch_size" not in (timed[-1].get("hparams") or {}):
            continue
        name = str((timed[-1].get("provenance") or {}).get("device", "unknown"))
        step = median(record["step_time"] for record in timed)
        steps.setdefault(name, []).append(step)
        images.setdefault(name, []).append(step / _images_per_step(timed[-1]))
    name = device or max(steps, key=lambda found: len(steps[found]), default="")
    if name not in steps:
        return None
    return Pace(name, len(steps[name]), median(steps[name]), FORWARD_SHARE * median(images[name]))


def seconds_left(job: Job, pace: Pace, *, num_images: int) -> float:
    """What a job that is not done still takes, without its start.

    Args:
        job: Begun or not.
        pace: Of its data set and algorithm.
        num_images: Of the data set; an evaluation goes through all of them.
    """
    kind = get_dataset_class(job.args.dataset)
    num_steps = job.args.steps or kind.N_STEPS
    freq = job.args.checkpoint_freq or kind.CHECKPOINT_FREQ
    records = _records(job.output_dir)
    first = records[-1]["step"] + 1 if records else 0
    with_record = {step for step in range(0, num_steps, freq) if step >= first} | {num_steps - 1}
    return (num_steps - first) * pace.step + len(with_record) * num_images * pace.image


def _images_per_step(record: Record) -> int:
    args = record["args"]
    num_domains = num_environments(args["dataset"]) - len(args["test_envs"])
    return num_domains * record["hparams"]["batch_size"]


def _records(folder: Path) -> list[Record]:
    path = folder / RECORDS_FILE
    return read_records(path) if path.exists() else []
