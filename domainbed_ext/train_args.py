"""The arguments of one training run, and which of them make two runs the same run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from domainbed_ext.datasets import DEFAULT_DATA_DIR
from domainbed_ext.errors import UsageError

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
        object.__setattr__(self, "dataset", dataset_spelling(self.dataset))
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


def dataset_spelling(name: str) -> str:
    """The name of a data set as jobs have it.

    ``folder:PATH`` and ``manifest:FILE`` lose what a shell's completion adds, "./" before and "/"
    behind; names and seeds of jobs are made of the rest as it stands.
    """
    kind, colon, path = name.partition(":")
    if kind not in ("folder", "manifest") or not colon:
        return name
    while path.startswith("./") and path.strip("./"):
        path = path[2:].lstrip("/")
    return f"{kind}:{path.rstrip('/') or path[:1]}"


def job_label(args: TrainArgs) -> str:
    """A few words for displays: "LTDR on RotatedDigits, test 0"."""
    tested = " ".join(map(str, args.test_envs)) if args.test_envs else "none (all domains trained)"
    seeds = f", hparams {args.hparams_seed}, trial {args.trial_seed}"
    return f"{args.algorithm} on {args.dataset}, test {tested}{seeds}"


def run_identity(args: Mapping[str, Any], hparams: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two runs the same run, from a record's "args" and "hparams"."""
    identity = {name: value for name, value in args.items() if name not in _NOT_IDENTITY}
    if isinstance(identity.get("dataset"), str):  # of a run from before spellings were made equal
        identity["dataset"] = dataset_spelling(identity["dataset"])
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
