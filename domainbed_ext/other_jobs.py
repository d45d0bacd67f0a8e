"""Jobs that lie in a sweep's folder and that its flags do not name.

A job's name is a hash of its arguments: with another `--steps`, or one algorithm less, a sweep does
not see what was run, and says so.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from domainbed_ext.datasets import DEFAULT_DATA_DIR
from domainbed_ext.hparams import order_algorithms
from domainbed_ext.jobs import Job, JobState, job_state
from domainbed_ext.records import RECORDS_FILE, Record, first_record, job_folders
from domainbed_ext.train_args import SHARED, TASKS

# Equal in all jobs of one sweep.
_COMMON = ("data_dir", "task", "steps", "hparams", "holdout_fraction")


def other_jobs(sweep_dir: Path, jobs: Iterable[Job]) -> dict[Path, JobState]:
    """The state of each job folder of a sweep that is none of these jobs'."""
    if not sweep_dir.is_dir():
        return {}
    own = {job.output_dir.name for job in jobs}
    return {
        folder: job_state(folder) for folder in job_folders(sweep_dir) if folder.name not in own
    }


def finished_by_kind(others: Mapping[Path, JobState]) -> dict[tuple[str, str], list[Path]]:
    """The folders of those that are done, by data set and algorithm."""
    kinds: dict[tuple[str, str], list[Path]] = {}
    done = [folder for folder, state in others.items() if state is JobState.DONE]
    for folder, args in _first_args(done).items():
        kinds.setdefault((args["dataset"], args["algorithm"]), []).append(folder)
    return kinds


def flags_of(folders: Collection[Path]) -> list[str] | None:
    """Flags of a sweep that has, as far as their records tell, jobs of these folders: of the most
    of them that can be of one sweep. None if no record can be read.
    """
    sweeps: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for args in _first_args(folders).values():
        common = tuple(repr(args.get(name)) for name in _COMMON)
        sweeps.setdefault(common, []).append(args)
    if not sweeps:
        return None
    members = max(sweeps.values(), key=len)
    first = members[0]
    datasets = Counter(args["dataset"] for args in members)
    flags = ["--algorithms", *order_algorithms(args["algorithm"] for args in members)]
    flags += ["--datasets", *datasets]
    draws = [args["hparams_seed"] for args in members]
    if min(draws):
        flags += ["--n_hparams_from", str(min(draws))]
    flags += ["--n_hparams", str(max(draws) + 1)]
    flags += ["--n_trials", str(max(args["trial_seed"] for args in members) + 1)]
    if all(len(args["test_envs"]) < 2 for args in members):
        flags.append("--single_test_envs")
    if any(args.get("hparams_per_trial") == SHARED for args in members):
        flags += ["--hparams_per_trial", SHARED]
    usual = {"data_dir": DEFAULT_DATA_DIR, "task": TASKS[0], "holdout_fraction": 0.2}
    for name in _COMMON:
        if first.get(name) not in (None, usual.get(name)):
            flags += [f"--{name}", str(first[name])]
    return flags


def other_jobs_lines(
    sweep_dir: Path, states: Mapping[Path, JobState], others: Mapping[Path, JobState]
) -> list[str]:
    """What to say of the others: how many they are and, where they are all there is, how to see
    them.

    Args:
        sweep_dir: The sweep's folder.
        states: Of the jobs that the flags name.
        others: Of the others, by folder.
    """
    if not others:
        return []
    counts = Counter(others.values())
    words = ", ".join(f"{counts[s]} {s.value.lower()}" for s in JobState if counts[s])
    lines = [f"{len(others)} job folders in {sweep_dir} belong to other flags ({words})"]
    if {*states.values()} <= {JobState.NOT_LAUNCHED}:
        flags = flags_of(others)
        if flags is not None:
            command = shlex.join([*flags, "--output_dir", str(sweep_dir)])
            lines.append(f"None is of these flags. For instance:\n  ltdr sweep status {command}")
    return lines


def recorded_num_domains(sweep_dir: Path) -> dict[str, int]:
    """How many domains the data sets have that jobs in this folder were run on."""
    if not sweep_dir.is_dir():
        return {}
    found = {}
    for record in _first_records(job_folders(sweep_dir)).values():
        names = (record.get("provenance") or {}).get("environments")
        if names:
            found[record["args"]["dataset"]] = len(names)
    return found


def _first_args(folders: Iterable[Path]) -> dict[Path, Mapping[str, Any]]:
    return {folder: record["args"] for folder, record in _first_records(folders).items()}


def _first_records(folders: Iterable[Path]) -> dict[Path, Record]:
    """Of each folder that has one that can be read."""
    found = {folder: first_record(folder / RECORDS_FILE) for folder in folders}
    return {folder: record for folder, record in found.items() if record is not None}
