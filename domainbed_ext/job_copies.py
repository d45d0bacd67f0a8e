"""Jobs that lie in a sweep's folder more than once: a copy counts once, another run is refused.

Copying a job's folder beside itself, or merging sweeps of two machines, must not change a table.
Leave-one-domain-out, for one, takes exactly one record per step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from domainbed_ext.errors import UsageError
from domainbed_ext.records import Record

_Job = tuple[str, str, tuple[int, ...], int, int]


def drop_copies(jobs: Mapping[Path, Sequence[Record]]) -> tuple[list[Record], list[str]]:
    """The records, those of each job once, and a sentence for each copy that is left out.

    A folder is a copy of another when its job is the same and its records begin, or are, the
    other's: then the longer one counts.

    Args:
        jobs: What `load_jobs` returned.

    Raises:
        UsageError: Two folders hold different records of one job.
    """
    folders: dict[_Job, list[Path]] = {}
    for folder, records in jobs.items():
        for job in dict.fromkeys(map(_job_of, records)):
            folders.setdefault(job, []).append(folder)
    left_out: set[tuple[Path, _Job]] = set()
    notes = []
    for job, places in folders.items():
        own = {place: [r for r in jobs[place] if _job_of(r) == job] for place in places}
        kept = max(places, key=lambda place: len(own[place]))  # of equally long ones the first
        for place in places:
            if place == kept:
                continue
            if _numbers(own[place]) != _numbers(own[kept])[: len(own[place])]:
                raise UsageError(
                    f"{kept} and {place} hold two different runs of one job ({_words(job)}); "
                    "delete one, collect them from separate folders, or pass --allow-mixed"
                )
            left_out.add((place, job))
            notes.append(f"{place.name} is a copy of {kept.name}")
    records = [
        record
        for folder, own in jobs.items()
        for record in own
        if (folder, _job_of(record)) not in left_out
    ]
    return records, notes


def _job_of(record: Record) -> _Job:
    args = record["args"]
    seeds = args["hparams_seed"], args["trial_seed"]
    return (args["dataset"], args["algorithm"], tuple(args["test_envs"]), *seeds)


def _numbers(records: Sequence[Record]) -> list[str]:
    """What a table could take from them; as text, in which NaN equals NaN."""
    return [
        repr(sorted((key, record[key]) for key in record if key == "step" or key.endswith("_acc")))
        for record in records
    ]


def _words(job: _Job) -> str:
    dataset, algorithm, test_envs, hparams_seed, trial_seed = job
    return (
        f"{algorithm} on {dataset}, test_envs {list(test_envs)}, hparams seed {hparams_seed}, "
        f"trial {trial_seed}"
    )
