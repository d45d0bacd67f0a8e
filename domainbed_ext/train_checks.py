"""What is refused before a run begins: impossible arguments, and a folder of another run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainbed_ext.datasets import environment_names, get_dataset_class
from domainbed_ext.datasets.image_cache_flags import image_cache_options
from domainbed_ext.errors import UsageError
from domainbed_ext.hparam_conflicts import check_together
from domainbed_ext.hparams import (
    default_hparams,
    parse_hparams,
    random_hparams,
    with_overrides,
)
from domainbed_ext.job_files import (
    DONE_FILE,
)
from domainbed_ext.seeds import seed_hash
from domainbed_ext.tracking import check_tracker_flags
from domainbed_ext.train_args import (
    EVAL_SPLITS,
    HPARAMS_PER_TRIAL,
    TASKS,
    TrainArgs,
    check_same_run,
    run_identity,
)

if TYPE_CHECKING:
    from domainbed_ext.records import Record


def run_hparams(args: TrainArgs) -> dict[str, Any]:
    """The hyper-parameters of a run: the defaults or a draw, then what --hparams changes."""
    text = None if args.hparams is None else str(args.hparams)
    overrides = parse_hparams(text, args.algorithm, args.dataset)
    if args.hparams_seed == 0:
        hparams = default_hparams(args.algorithm, args.dataset)
    else:
        seed = seed_hash(args.hparams_seed, 0 if args.shares_draw else args.trial_seed)
        hparams = random_hparams(args.algorithm, args.dataset, seed)
    hparams = with_overrides(hparams, overrides, args.algorithm, args.dataset)
    check_together(hparams)
    return hparams


def check_args(args: TrainArgs) -> dict[str, Any]:
    """Refuses impossible arguments, before anything is written. Returns all hyper-parameters."""
    hparams = run_hparams(args)
    image_cache_options(args)
    check_tracker_flags(args)
    get_dataset_class(args.dataset)
    names = environment_names(args.dataset)
    listing = ", ".join(f"{number} {name}" for number, name in enumerate(names))
    for env in args.test_envs:
        if not 0 <= env < len(names):
            raise UsageError(
                f"--test_envs {env} is out of range for {args.dataset}; choose among {listing}"
            )
    if len(set(args.test_envs)) < len(args.test_envs):
        raise UsageError(f"--test_envs names a domain twice: {' '.join(map(str, args.test_envs))}")
    if len(args.test_envs) == len(names):
        raise UsageError(
            f"--test_envs leaves no domain of {args.dataset} to train on; leave one out of "
            f"{listing}"
        )
    if args.task not in TASKS:
        raise UsageError(f"--task {args.task} is unknown; choose one of {', '.join(TASKS)}")
    if args.eval_splits not in EVAL_SPLITS:
        raise UsageError(
            f"--eval_splits {args.eval_splits} is unknown; choose one of {', '.join(EVAL_SPLITS)}"
        )
    if args.hparams_per_trial not in HPARAMS_PER_TRIAL:
        raise UsageError(
            f"--hparams_per_trial {args.hparams_per_trial} is unknown; choose one of "
            f"{', '.join(HPARAMS_PER_TRIAL)}"
        )
    for name, least in (("steps", 1), ("checkpoint_freq", 1), ("num_workers", 0), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UsageError(f"--{name} {value} is too small; choose {least} or more")
    if not args.checkpoint_minutes >= 0:
        raise UsageError(
            f"--checkpoint_minutes {args.checkpoint_minutes} is impossible; choose 0 or more"
        )
    if not 0 < args.holdout_fraction < 1:
        raise UsageError(
            f"--holdout_fraction {args.holdout_fraction} is impossible; choose one between 0 and 1"
        )
    if not 0 <= args.uda_holdout_fraction < 1:
        raise UsageError(
            f"--uda_holdout_fraction {args.uda_holdout_fraction} is impossible; choose one from 0 "
            "to below 1"
        )
    if args.algorithm == "DISTILL" and not (Path(args.output_dir) / DONE_FILE).exists():
        from domainbed_ext.algorithms.distill import check_teacher

        check_teacher(hparams, args.record_args())
    return hparams


def check_finished(
    folder: Path, args: TrainArgs, hparams: dict[str, Any], records: list[Record]
) -> None:
    if not records:
        raise UsageError(
            f"{folder} is marked as done and holds no record; delete that folder to run the job "
            "again"
        )
    found = run_identity(records[-1]["args"], records[-1].get("hparams") or {})
    wanted = run_identity(args.record_args(), hparams)
    if wanted.get("hparams.schedule_steps") == 0:  # 0 stands for the run's number of steps
        wanted["hparams.schedule_steps"] = found.get("hparams.schedule_steps")
    check_same_run(folder, found=found, wanted=wanted)
    last = (args.steps or get_dataset_class(args.dataset).N_STEPS) - 1
    # SWAD may end a run before, as no further step would count
    if records[-1]["step"] != last and found.get("hparams.weight_averaging") != "swad":
        raise UsageError(
            f"{folder} is marked as done and its records end at step {records[-1]['step']}, not "
            f"{last}; delete that folder to run the job again"
        )
