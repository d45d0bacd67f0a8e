"""Which jobs a sweep consists of: DomainBed's combinations, arguments and folder names.

A sweep that says by which methods models will be selected has only the jobs that these need.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from domainbed_ext.datasets import num_environments
from domainbed_ext.errors import UsageError
from domainbed_ext.jobs import Job
from domainbed_ext.seeds import seed_hash
from domainbed_ext.selection import SELECTION_METHODS, SelectionMethod, get_selection_method
from domainbed_ext.train_args import (
    ALL_SPLITS,
    DRAWN,
    EVAL_SPLITS,
    HPARAMS_PER_TRIAL,
    NEEDED_SPLITS,
    SHARED,
)

CEILING_DATASETS = ("EmojiDG", "EmojiDG6")


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that DomainBed's sweep has not: what a trial is, and what is not needed."""
    parser.add_argument(
        "--hparams_per_trial",
        default=DRAWN,
        choices=HPARAMS_PER_TRIAL,
        help="drawn: each trial draws its own hyper-parameters, as in DomainBed; shared: all "
        "trials have the draws of the first (default: drawn)",
    )
    parser.add_argument(
        "--selection",
        nargs="+",
        metavar="METHOD",
        help="only what these selection methods need, of "
        f"{', '.join(method.short_name for method in SELECTION_METHODS)} (default: all jobs, all "
        "splits evaluated, for any method)",
    )
    parser.add_argument(
        "--eval_splits",
        choices=EVAL_SPLITS,
        help="what jobs evaluate: all splits of all domains, or only those that selection methods "
        "read, which leaves out the images that were trained on (default: needed with "
        "--selection, else all)",
    )


def make_jobs(
    args: argparse.Namespace, *, num_domains: Mapping[str, int] = MappingProxyType({})
) -> list[Job]:
    """The jobs in DomainBed's order, with DomainBed's arguments and so DomainBed's folder names.

    Args:
        args: The parsed flags of a sweep.
        num_domains: Of data sets that are not here and cannot be asked.
    """
    if args.n_trials < 1 or args.n_hparams <= args.n_hparams_from or args.n_hparams_from < 0:
        raise UsageError(
            f"--n_trials {args.n_trials} --n_hparams_from {args.n_hparams_from} --n_hparams "
            f"{args.n_hparams} "
            "make no job; take at least one trial and n_hparams above n_hparams_from"
        )
    jobs = []
    how = {
        "device": args.device,
        "num_workers": args.num_workers,
        "skip_model_save": args.skip_model_save,
        "checkpoint_minutes": args.checkpoint_minutes,
        "eval_splits": args.eval_splits or (NEEDED_SPLITS if args.selection else ALL_SPLITS),
        "image_cache": args.image_cache,
        "image_cache_dir": args.image_cache_dir,
        "image_cache_gb": args.image_cache_gb,
        "no_tensorboard": args.no_tensorboard,
        "wandb": args.wandb,
    }
    for trial_seed in range(args.n_trials):
        for dataset in dict.fromkeys(args.datasets):
            choices = list(test_env_choices(dataset, args, num_domains.get(dataset)))
            for algorithm in dict.fromkeys(args.algorithms):
                for test_envs in choices:
                    for hparams_seed in range(args.n_hparams_from, args.n_hparams):
                        train_args: dict[str, Any] = {
                            "dataset": dataset,
                            "algorithm": algorithm,
                            "test_envs": test_envs,
                            "holdout_fraction": args.holdout_fraction,
                            "hparams_seed": hparams_seed,
                            "data_dir": args.data_dir,
                            "task": args.task,
                            "trial_seed": trial_seed,
                            "seed": seed_hash(
                                dataset, algorithm, test_envs, hparams_seed, trial_seed
                            ),
                        }
                        # Only when given: they are part of the hash.
                        if args.steps is not None:
                            train_args["steps"] = args.steps
                        if args.hparams is not None:
                            train_args["hparams"] = args.hparams
                        if args.hparams_per_trial == SHARED and hparams_seed != 0:
                            train_args["hparams_per_trial"] = SHARED
                        jobs.append(Job.in_sweep(train_args, args.output_dir, **how))
    return jobs


def test_env_choices(
    dataset: str, args: argparse.Namespace, num_domains: int | None
) -> Iterator[list[int]]:
    """The test domains of each job: each alone, then with each later one; last, none (ceiling)."""
    num = num_domains or num_environments(dataset)
    wanted = set(range(num) if args.test_envs is None else args.test_envs)
    if not wanted <= set(range(num)):
        raise UsageError(
            f"--test_envs {' '.join(map(str, args.test_envs))} is out of range for {dataset}; "
            f"it has domains 0 to {num - 1}"
        )
    with_pairs = has_pairs(args)
    if num < 3 and with_pairs:
        raise UsageError(
            f"{dataset} has {num} domains, too few to hold out pairs; pass --single_test_envs"
        )
    for first in range(num):
        pairs = [[first, second] for second in range(first + 1, num)] if with_pairs else []
        yield from (envs for envs in [[first], *pairs] if wanted & set(envs))
    if args.ceiling or (args.ceiling is None and dataset in CEILING_DATASETS):
        yield []


def has_pairs(args: argparse.Namespace) -> bool:
    """Whether pairs of domains are held out too: unless told otherwise, or no method needs them."""
    methods = _selection_methods(args)
    needing = [method for method in methods if method.needs_pairs]
    if args.single_test_envs and needing:
        raise UsageError(
            f"--single_test_envs leaves out the pairs of test domains that {needing[0].name} needs;"
            " drop it, or choose another --selection"
        )
    return not args.single_test_envs and (not methods or bool(needing))


def pruning_words(args: argparse.Namespace, num_jobs: int) -> list[str]:
    """What --selection saves, in a line each."""
    methods = _selection_methods(args)
    lines = []
    if methods and not args.single_test_envs and not has_pairs(args):
        names = " and ".join(method.name for method in methods)
        every = argparse.Namespace(**{**vars(args), "selection": None})
        try:
            instead = f": {num_jobs} jobs instead of {len(make_jobs(every))}"
        except UsageError:  # pairs could not be held out at all
            instead = ""
        lines.append(f"pairs of test domains are not needed for {names}{instead}")
    if methods and args.eval_splits in (None, NEEDED_SPLITS):
        lines.append(
            "images that are trained on are not evaluated, no selection method needs them "
            f"(--eval_splits {ALL_SPLITS} does)"
        )
    return lines


def _selection_methods(args: argparse.Namespace) -> list[type[SelectionMethod]]:
    return [get_selection_method(name) for name in dict.fromkeys(args.selection or ())]
