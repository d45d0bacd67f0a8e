"""The records of a sweep: one JSON object per checkpoint in `<sweep>/<job>/results.jsonl`.

The keys are DomainBed's (args, hparams, step, epoch, env{i}_in_acc, env{i}_out_acc, losses, ...),
plus two of ours: "provenance", which says what the numbers rest on, and "router", which says what
the routers of sparse algorithms did. Either side reads what the other wrote.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from domainbed_ext.atomic_files import write_atomically, writing
from domainbed_ext.errors import UsageError
from domainbed_ext.seeds import is_job_name

Record = dict[str, Any]
RECORDS_FILE = "results.jsonl"
DONE_FILE = "done"
REQUIRED_ARGS = ("algorithm", "dataset", "hparams_seed", "test_envs", "trial_seed")

_logger = logging.getLogger(__name__)
_FAILED_FILE = "failed"
_JOB_FILES = (RECORDS_FILE, DONE_FILE, _FAILED_FILE, "lock", "out.txt", "err.txt")


@dataclass(frozen=True)
class RecordGroup:
    """All records that decide one number of a table before averaging over trials.

    A record of a run with two test environments belongs to two groups.
    """

    trial_seed: int
    dataset: str
    algorithm: str
    test_env: int
    records: list[Record] = field(repr=False)


@dataclass(frozen=True)
class JobCount:
    """How many jobs a sweep's folder holds, and the names of some of them.

    Attributes:
        unfinished: Lack the file `done`.
        failed: Those of them that gave up.
        empty: Finished, and without a record all the same.
    """

    total: int
    unfinished: list[str]
    failed: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)


def append_record(path: str | os.PathLike[str], record: Record) -> None:
    """Adds one record as one line, flushed to disk before returning.

    A partial last line, left by a process that was killed while writing, is removed first:
    otherwise the new record would be glued to it and both lost. NumPy and torch scalars are written
    as plain numbers.

    Raises:
        CannotWriteError: The records that were there still are.
    """
    line = format_records([record])
    with writing(Path(path)), open(path, "ab+") as file:
        file.seek(0)
        content = file.read()
        tail = content[content.rfind(b"\n") + 1 :]
        if tail and _is_json(tail):
            file.write(b"\n")
        else:
            file.truncate(len(content) - len(tail))
        file.write(line.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def write_records(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Replaces a results file by these records, atomically."""
    write_atomically(Path(path), format_records(records))


def restore_records(path: str | os.PathLike[str], records: Sequence[Record]) -> bool:
    """Lets a results file hold these records and no more. For resuming: what came after the
    checkpoint is made again.

    Returns:
        Whether the file had lost any of them.
    """
    path, wanted = Path(path), format_records(records).encode("utf-8")
    content = path.read_bytes() if path.exists() else b""
    if content != wanted:
        write_records(path, records)
    return not content.startswith(wanted)


def format_records(records: Iterable[Record]) -> str:
    """Records as the lines of a results file."""
    return "".join(
        json.dumps(record, sort_keys=True, default=_plain_number) + "\n" for record in records
    )


def parse_records(text: str | bytes) -> list[Record]:
    """What `format_records` formatted."""
    return [json.loads(line) for line in text.splitlines()]


def read_records(path: str | os.PathLike[str], *, finished: bool = False) -> list[Record]:
    """The records of one results file.

    A last line that was cut off while being written is left out with a warning, unless the job is
    finished. Any other line that is not a record raises a UsageError naming file and line.
    """
    records: list[Record] = []
    with _named_if_unreadable(path):
        content = Path(path).read_bytes()
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            if number == len(lines) and not finished:
                _logger.warning("%s, line %d is cut off and was left out", path, number)
                continue
            raise UsageError(
                f"{path}, line {number} is not a JSON record ({error}); an unfinished job restores "
                "it when it goes on, of a finished one delete the folder and run it again"
            ) from None
        _check_record(record, f"{path}, line {number}")
        records.append(record)
    return records


def first_record(path: str | os.PathLike[str]) -> Record | None:
    """The first record of a results file; None where there is none, or it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            record = json.loads(file.readline())
        _check_record(record, str(path))
    except (OSError, ValueError, RecursionError):
        return None
    return dict(record)


def load_records(folder: str | os.PathLike[str]) -> list[Record]:
    """All records of a sweep: those of each sub-folder's results.jsonl, in order of folder names.

    The folder of a single job is taken too. `pandas.json_normalize(load_records(folder))` makes a
    flat frame.
    """
    return [record for records in load_jobs(folder).values() for record in records]


def load_jobs(folder: str | os.PathLike[str]) -> dict[Path, list[Record]]:
    """The records of a sweep by job folder, for each that has a results.jsonl."""
    folder = _existing_folder(folder)
    jobs = {}
    with _named_if_unreadable(folder):
        for job in [folder, *sorted(folder.iterdir())]:
            if (job / RECORDS_FILE).is_file():
                done = (job / DONE_FILE).is_file()
                jobs[job] = read_records(job / RECORDS_FILE, finished=done)
    return jobs


def count_jobs(folder: str | os.PathLike[str]) -> JobCount:
    """Counts the job folders of a sweep: unfinished lack the file `done`, failed have `failed`."""
    folder = _existing_folder(folder)
    with _named_if_unreadable(folder):
        jobs = [folder] if _has_job_file(folder) else []
        jobs += job_folders(folder)
        finished = [job for job in jobs if (job / DONE_FILE).is_file()]
        unfinished = [job for job in jobs if job not in finished]
        failed = [job.name for job in unfinished if (job / _FAILED_FILE).is_file()]
        empty = [job.name for job in finished if not _has_content(job / RECORDS_FILE)]
    return JobCount(len(jobs), [job.name for job in unfinished], failed, empty)


def job_folders(folder: Path) -> list[Path]:
    """The folders of jobs below a sweep's, in order of their names."""
    return [
        child
        for child in sorted(folder.iterdir())
        if child.is_dir() and (is_job_name(child.name) or _has_job_file(child))
    ]


def group_records(records: Sequence[Record]) -> list[RecordGroup]:
    """Groups records by (trial seed, data set, algorithm, test environment), in order of first
    appearance.
    """
    groups: dict[tuple[int, str, str, int], list[Record]] = {}
    for record in records:
        args = record["args"]
        for test_env in args["test_envs"]:
            key = (args["trial_seed"], args["dataset"], args["algorithm"], test_env)
            groups.setdefault(key, []).append(record)
    return [RecordGroup(*key, records=members) for key, members in groups.items()]


def weights_of(record: Mapping[str, Any]) -> str | None:
    """Whose weights a record's accuracies are of: "raw", "ema" or "swad"; None: it does not say."""
    weights = (record.get("provenance") or {}).get("weights")
    return None if weights is None else str(weights)


def of_deployed_weights(records: Iterable[Record]) -> list[Record]:
    """The records that can stand in a table: without those that a run with SWAD makes on its way to
    the average.
    """
    return [
        record
        for record in records
        if (record.get("hparams") or {}).get("weight_averaging") != "swad"
        or weights_of(record) == "swad"
    ]


@contextlib.contextmanager
def _named_if_unreadable(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot read {error.filename or path}: {error.strerror or error}; make it readable, "
            "or move that job's folder elsewhere"
        ) from None


def _has_job_file(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _JOB_FILES)


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _existing_folder(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder)
    if not path.exists():
        raise UsageError(
            f"{path} does not exist; give the folder that the sweep wrote to (its --output_dir)"
        )
    if not path.is_dir():
        raise UsageError(
            f"{path} is a file; give the folder that the sweep wrote to (its --output_dir)"
        )
    return path


def _check_record(record: object, where: str) -> None:
    args = record.get("args") if isinstance(record, dict) else None
    if not isinstance(record, dict) or not isinstance(args, dict):
        raise UsageError(
            f"{where} is JSON but not a record: it has no object 'args'; "
            "is this a results file of a job?"
        )
    missing = [f"args.{name}" for name in REQUIRED_ARGS if name not in args]
    missing += [] if "step" in record else ["step"]
    if missing:
        raise UsageError(
            f"{where}: the record lacks {', '.join(missing)}; is this a results file of a job?"
        )
    named = {"step": record["step"], **{f"args.{name}": args[name] for name in REQUIRED_ARGS}}
    named |= {name: value for name, value in record.items() if name.endswith("_acc")}
    named |= {name: record[name] for name in ("hparams", "provenance") if name in record}
    for name, value in named.items():
        if not _IS_POSSIBLE.get(name, _is_number)(value):
            raise UsageError(
                f"{where}: {name} cannot be {json.dumps(value)[:40]}; was the file changed?"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _is_int(value: object) -> bool:
    return isinstance(value, int)


def _is_object(value: object) -> bool:
    return value is None or isinstance(value, dict)


# of what a record must or may hold; all that ends in "_acc" is a number
_IS_POSSIBLE: dict[str, Callable[[object], bool]] = {
    "args.algorithm": lambda value: isinstance(value, str),
    "args.dataset": lambda value: isinstance(value, str),
    "args.hparams_seed": _is_int,
    "args.trial_seed": _is_int,
    "args.test_envs": lambda value: isinstance(value, list) and all(map(_is_int, value)),
    "hparams": _is_object,
    "provenance": _is_object,
}


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _plain_number(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(
        f"a record can hold JSON values and scalars, not {type(value).__name__}: {value!r}"
    )
