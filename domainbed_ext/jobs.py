"""A job: the arguments of one training run, and its folder.

The folder's files are the whole state of a sweep, so a sweep can be stopped, moved and continued
without a database:

    results.jsonl            one record per evaluation
    out.txt, err.txt         what the run printed
    checkpoint.safetensors   everything needed to go on; gone once the job is done
    checkpoint.previous.safetensors  the one before, in case that one is damaged
    model.safetensors/.json  the trained algorithm
    done                     written last, atomically: the job is finished
    failed                   why the job stopped for good; JSON
    lock                     held while a process works on the job; gone once the job is done
    progress.json            how far the run is; gone once the job is done
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import IO, Any

from domainbed_ext.atomic_files import remove_unfinished, write_atomically, writing
from domainbed_ext.datasets import DEFAULT_DATA_DIR
from domainbed_ext.errors import UsageError
from domainbed_ext.seeds import job_hash

DONE_FILE = "done"
FAILED_FILE = "failed"
LOCK_FILE = "lock"
PROGRESS_FILE = "progress.json"
CHECKPOINT_FILE = "checkpoint.safetensors"
PREVIOUS_CHECKPOINT_FILE = "checkpoint.previous.safetensors"
OUT_FILE = "out.txt"
ERR_FILE = "err.txt"

IN_USE = "in use by another process"

TASKS = ("domain_generalization", "domain_adaptation")
ALL_SPLITS, NEEDED_SPLITS = EVAL_SPLITS = ("all", "needed")
DRAWN, SHARED = HPARAMS_PER_TRIAL = ("drawn", "shared")

# How a run is carried out, not which run it is: never in records and job names, as DomainBed has no
# such flags.
_NOT_RECORDED = (
    *("device", "num_workers", "distributed", "checkpoint_minutes", "eval_splits"),
    *("image_cache", "image_cache_dir", "image_cache_gb"),
    *("no_tensorboard", "wandb"),
)
# Neither where a run is stored nor what else it saves makes it another run.
_NOT_IDENTITY = (
    *_NOT_RECORDED,
    "output_dir",
    "data_dir",
    "hparams",
    "skip_model_save",
    "save_model_every_checkpoint",
)

_logger = logging.getLogger(__name__)


class DivergedError(RuntimeError):
    """A loss, or a parameter, that is not finite any more."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class JobBusyError(UsageError):
    """Another process works on the job."""


@dataclass(frozen=True)
class TrainArgs:
    """The arguments of one run, with DomainBed's names and defaults; `train --help` explains them.

    `hparams` may be given as a mapping and is kept as JSON text, which is what records hold.
    """

    algorithm: str = "ERM"
    dataset: str = "RotatedDigits"
    test_envs: tuple[int, ...] = (0,)
    data_dir: str = DEFAULT_DATA_DIR
    output_dir: str = "train_output"
    task: str = "domain_generalization"
    hparams: str | Mapping[str, Any] | None = None
    hparams_seed: int = 0
    trial_seed: int = 0
    seed: int = 0
    steps: int | None = None
    checkpoint_freq: int | None = None
    holdout_fraction: float = 0.2
    uda_holdout_fraction: float = 0
    skip_model_save: bool = False
    save_model_every_checkpoint: bool = False
    device: str = "auto"
    num_workers: int | None = None
    distributed: bool = False
    image_cache: str = "exact"
    image_cache_dir: str | None = None
    image_cache_gb: float = 16.0
    no_tensorboard: bool = False
    wandb: str | None = None
    checkpoint_minutes: float = 10.0
    eval_splits: str = "all"
    hparams_per_trial: str = "drawn"

    def __post_init__(self) -> None:
        object.__setattr__(self, "test_envs", tuple(self.test_envs))
        object.__setattr__(self, "output_dir", str(self.output_dir))
        if self.hparams is not None and not isinstance(self.hparams, str):
            object.__setattr__(self, "hparams", json.dumps(dict(self.hparams)))

    @property
    def shares_draw(self) -> bool:
        """Whether its hyper-parameters are a random draw that all trials have in common."""
        return self.hparams_per_trial == SHARED and self.hparams_seed != 0

    def record_args(self) -> dict[str, Any]:
        """The "args" of the run's records: exactly DomainBed's keys, and "hparams_per_trial" where
        that is not DomainBed's."""
        values = {name: value for name, value in asdict(self).items() if name not in _NOT_RECORDED}
        if not self.shares_draw:
            del values["hparams_per_trial"]
        return {**values, "test_envs": list(self.test_envs)}

    def command_line(self) -> list[str]:
        """The flags of `train` that give these arguments; defaults are left out."""
        flags: list[str] = []
        for item in fields(self):
            value = getattr(self, item.name)
            if value == item.default:
                continue
            if isinstance(value, bool):
                flags.append(f"--{item.name}")
            elif isinstance(value, tuple):
                flags += [f"--{item.name}", *(str(part) for part in value)]
            else:
                flags += [f"--{item.name}", str(value)]
        return flags


def run_identity(args: Mapping[str, Any], hparams: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two runs the same run, from a record's "args" and "hparams"."""
    identity = {name: value for name, value in args.items() if name not in _NOT_IDENTITY}
    return {**identity, **{f"hparams.{name}": value for name, value in hparams.items()}}


def check_same_run(folder: Path, *, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuses to go on in a folder that holds another run."""
    missing = object()
    names = sorted({*found, *wanted})
    differences = [name for name in names if found.get(name, missing) != wanted.get(name, missing)]
    if differences:
        shown = ", ".join(
            f"{name} {found.get(name, '(none)')} there and {wanted.get(name, '(none)')} here"
            for name in differences[:3]
        )
        raise UsageError(
            f"{folder} holds another run ({shown}); give another --output_dir, or delete that "
            "folder to start afresh"
        )


class JobState(str, Enum):
    """What a job's folder says about it. The first three are DomainBed's."""

    NOT_LAUNCHED = "Not launched"
    INCOMPLETE = "Incomplete"
    DONE = "Done"
    RUNNING = "Running"
    FAILED = "Failed"
    DIVERGED = "Diverged"


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        train_args: What the sweep passes to it; their hash names the folder, as in DomainBed.
        output_dir: `<sweep>/<hash>`.
    """

    train_args: Mapping[str, Any]
    output_dir: Path
    extra_args: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def in_sweep(
        cls, train_args: Mapping[str, Any], sweep_dir: str | os.PathLike[str], **extra_args: Any
    ) -> Job:
        return cls(train_args, Path(sweep_dir) / job_hash(train_args), extra_args)

    @property
    def args(self) -> TrainArgs:
        return TrainArgs(**self.train_args, output_dir=str(self.output_dir), **self.extra_args)

    @property
    def state(self) -> JobState:
        return job_state(self.output_dir)

    @property
    def is_interrupted(self) -> bool:
        """Whether it was begun and left, through no fault of its own."""
        return self.state is JobState.INCOMPLETE or (
            self.state is JobState.FAILED and has_died(self.output_dir)
        )

    def last_error_line(self) -> str:
        """The last line of err.txt, which says why a job failed."""
        with contextlib.suppress(OSError):
            text = (self.output_dir / ERR_FILE).read_text(encoding="utf-8", errors="replace")
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            if lines:
                return lines[-1]
        return str((read_failure(self.output_dir) or {}).get("message", "no message in err.txt"))


def job_state(folder: Path) -> JobState:
    """What a job's folder says about it."""
    if not folder.is_dir():
        return JobState.NOT_LAUNCHED
    if (folder / DONE_FILE).exists():
        return JobState.DONE
    if is_locked(folder):
        return JobState.RUNNING
    failure = read_failure(folder)
    if failure is not None:
        return JobState.DIVERGED if failure.get("reason") == "diverged" else JobState.FAILED
    return JobState.INCOMPLETE


def has_died(folder: Path) -> bool:
    """Whether a job failed because its process was killed."""
    return (read_failure(folder) or {}).get("reason") == "died"


def taken_by_others(folder: Path) -> str | None:
    """What other processes have made of a job that was to be run, in words; None: nothing."""
    state = job_state(folder)
    if state is JobState.DONE:
        return "done by another process"
    if state is JobState.RUNNING:
        return IN_USE
    if state in (JobState.FAILED, JobState.DIVERGED) and not has_died(folder):
        return "failed in another process"
    return None


def job_label(args: TrainArgs) -> str:
    """A few words for displays: "LTDR on RotatedDigits, test 0"."""
    tested = " ".join(map(str, args.test_envs)) if args.test_envs else "none (all domains trained)"
    seeds = f", hparams {args.hparams_seed}, trial {args.trial_seed}"
    return f"{args.algorithm} on {args.dataset}, test {tested}{seeds}"


def make_folder(folder: Path) -> None:
    """Makes a job's folder, with a clear message when that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UsageError(
            f"cannot write to the output folder {folder}: {reason}; give another --output_dir"
        ) from None


def mark_done(folder: Path) -> None:
    """The last thing a run does."""
    (folder / FAILED_FILE).unlink(missing_ok=True)
    (folder / PROGRESS_FILE).unlink(missing_ok=True)
    write_atomically(folder / DONE_FILE, "done")


def tidy_up(folder: Path) -> None:
    """Removes what a job needs no more once it is done."""
    for name in (CHECKPOINT_FILE, PREVIOUS_CHECKPOINT_FILE):
        (folder / name).unlink(missing_ok=True)
    remove_unfinished(folder)


def mark_failed(folder: Path, *, reason: str, message: str, step: int | None = None) -> None:
    """Says that the job stopped for good.

    Args:
        folder: The job's folder.
        reason: "diverged" (would diverge again, so launching again leaves it alone), "memory" (ran
            out), "died" (its process was killed) or "error".
        message: One line.
        step: Where, if known.
    """
    write_atomically(
        folder / FAILED_FILE,
        json.dumps({"reason": reason, "message": message, "step": step}) + "\n",
    )


def read_failure(folder: Path) -> dict[str, Any] | None:
    """What `mark_failed` wrote, or None."""
    try:
        failure = json.loads((folder / FAILED_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        failure = None
    return (
        failure
        if isinstance(failure, dict)
        else {"reason": "error", "message": "unreadable failure marker"}
    )


@contextlib.contextmanager
def job_lock(folder: Path) -> Iterator[None]:
    """Holds a job, so that no two processes ever work on the same one.

    The operating system gives the lock back when its process ends, however it ends.
    """
    path = folder / LOCK_FILE
    with contextlib.ExitStack() as held:
        while True:
            with writing(path):
                folder.mkdir(parents=True, exist_ok=True)
                file = held.enter_context(open(path, "a"))
            _lock(file, folder)
            if _is_at(file, path):
                break
            file.close()  # the process that had it before has deleted it
        yield
        if (folder / DONE_FILE).exists():
            path.unlink(missing_ok=True)


def _lock(file: IO[str], folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return
    for attempt in range(4):
        try:
            # lockf, unlike flock, is not inherited by the loaders' worker processes, which may live
            # a little longer.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                _logger.warning(
                    "%s cannot be locked (%s); start no second sweep on this folder",
                    folder / LOCK_FILE,
                    error,
                )
                return
            if attempt == 3:
                raise JobBusyError(
                    f"{folder} is in use by another process; wait for it, or give another "
                    "--output_dir"
                ) from None
            time.sleep(0.05)  # `is_locked` of another process holds the lock for an instant


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def delete_job(folder: Path) -> None:
    """Deletes a job's folder with all that is in it.

    Raises:
        JobBusyError: Another process works on the job.
    """
    with job_lock(folder):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK_FILE:
                path.unlink()
        (folder / LOCK_FILE).unlink()
    with contextlib.suppress(OSError):  # another process may have begun the job anew by now
        folder.rmdir()


def is_locked(folder: Path) -> bool:
    """Whether another process works on the job at this moment."""
    try:
        import fcntl

        with open(folder / LOCK_FILE, "r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    except ImportError:
        return False
    return False
