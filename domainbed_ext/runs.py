"""What a run consists of before its first step: data, splits, algorithm, device, seeds."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from domainbed_ext.algorithms import get_algorithm_class
from domainbed_ext.datasets import get_dataset_class
from domainbed_ext.datasets.base import EnvSplit
from domainbed_ext.datasets.image_cache import use_image_cache
from domainbed_ext.datasets.image_cache_flags import image_cache_options
from domainbed_ext.display import CACHING, ReportProgress, RunState
from domainbed_ext.distributed import Ranks, current_ranks, first_rank_first
from domainbed_ext.errors import UsageError
from domainbed_ext.launchers.devices import num_cores
from domainbed_ext.provenance import provenance
from domainbed_ext.seeds import seed_hash
from domainbed_ext.train_args import TrainArgs


@dataclass
class Run:
    """Everything a run consists of before its first step.

    Attributes:
        args: What was asked for.
        hparams: All hyper-parameters; the dict that the algorithm gets and records hold.
        dataset: With its transforms.
        splits: By name, in the order of evaluation: all "in", then all "out", then the rest.
        algorithm: On its device.
        num_steps, checkpoint_freq: From the arguments or the data set.
        device: "cpu" or "cuda".
        num_workers: Decoding processes per loader.
        provenance: Goes into every record.
        ranks: The processes that carry it out together.
    """

    args: TrainArgs
    hparams: dict[str, Any]
    dataset: Any
    splits: dict[str, EnvSplit]
    algorithm: Any
    num_steps: int
    checkpoint_freq: int
    device: str
    num_workers: int
    provenance: dict[str, Any] = field(default_factory=dict)
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def folder(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def train_envs(self) -> list[int]:
        """Numbers of the domains that are trained on."""
        return [env for env in range(len(self.dataset)) if env not in self.args.test_envs]

    @property
    def info(self) -> dict[str, Any]:
        """What checkpoints and saved models say about the run."""
        return {
            "args": self.args.record_args(),
            "model_input_shape": list(self.dataset.input_shape),
            "model_num_classes": self.dataset.num_classes,
            "model_num_domains": len(self.dataset) - len(self.args.test_envs),
            "model_hparams": self.hparams,
            "class_names": list(self.dataset.class_names),
            "provenance": self.provenance,
            "file_order": self.dataset.file_order,
        }


def prepare_run(
    args: TrainArgs, hparams: Mapping[str, Any], *, progress: ReportProgress | None = None
) -> Run:
    """Loads the data and makes the algorithm, under the run's seed.

    Args:
        args: Checked arguments.
        hparams: All hyper-parameters, as `domainbed_ext.train_checks.run_hparams` gives them.
        progress: Called while images are decoded into a cache.
    """
    # Every data set takes DomainBed's (root, test_envs, hparams), which is not the base class's.
    dataset_class: Any = get_dataset_class(args.dataset)
    num_steps = args.steps or dataset_class.N_STEPS
    hparams = dict(hparams)
    if hparams.get("schedule_steps") == 0:
        hparams["schedule_steps"] = num_steps
    device = choose_device(args.device)
    seed_everything(args.seed)

    def load() -> Any:
        dataset = dataset_class(args.data_dir, list(args.test_envs), hparams)
        use_image_cache(
            dataset,
            args.dataset,
            image_cache_options(args),
            announce=lambda line: print(line, flush=True),
            progress=None
            if progress is None
            else lambda done, all_: progress(RunState(done, all_, phase=CACHING)),
        )
        return dataset

    dataset = first_rank_first(load)
    splits = evaluation_splits(dataset, args)
    algorithm_class = get_algorithm_class(args.algorithm)
    num_domains = len(dataset) - len(args.test_envs)
    algorithm = first_rank_first(
        lambda: algorithm_class(dataset.input_shape, dataset.num_classes, num_domains, hparams)
    ).to(device)
    ranks = current_ranks()
    origin = provenance(dataset=dataset, algorithm=algorithm, hparams=hparams, device=device)
    if ranks.size > 1:
        _distribute(algorithm, args, hparams, ranks)
        origin["ranks"] = ranks.size
    return Run(
        args=args,
        hparams=hparams,
        dataset=dataset,
        splits=splits,
        algorithm=algorithm,
        num_steps=num_steps,
        checkpoint_freq=args.checkpoint_freq or dataset_class.CHECKPOINT_FREQ,
        device=device,
        num_workers=args.num_workers
        if args.num_workers is not None
        else useful_workers(dataset_class.N_WORKERS, num_loaders=num_domains),
        provenance=origin,
        ranks=ranks,
    )


def useful_workers(most: int, *, num_loaders: int) -> int:
    """Decoding processes per loader: as many as all loaders together have cores for, or one."""
    return min(most, max(1, num_cores() // num_loaders))


def _distribute(algorithm: Any, args: TrainArgs, hparams: Mapping[str, Any], ranks: Ranks) -> None:
    if not hasattr(algorithm, "distribute_"):
        raise UsageError(
            f"--distributed cannot train {args.algorithm}; it can train the algorithms that are a "
            "ViT, ERM_ViT among them"
        )
    if hparams["batch_size"] < ranks.size:
        raise UsageError(
            f"batch_size={hparams['batch_size']} images per domain cannot be shared by "
            f"{ranks.size} ranks; pass --hparams '{{\"batch_size\": {ranks.size}}}' or more, or "
            "start fewer ranks"
        )
    algorithm.distribute_()
    if not ranks.is_first:
        # made equal under one seed; from here on each rank draws its own noise and dropout
        torch.manual_seed(seed_hash("rank", ranks.rank, args.seed))


def evaluation_splits(dataset: Any, args: TrainArgs) -> dict[str, EnvSplit]:
    """All splits by name, in DomainBed's order: all "in", all "out", then the others."""
    per_env = [
        dataset.splits(
            env,
            holdout_fraction=args.holdout_fraction,
            trial_seed=args.trial_seed,
            uda_holdout_fraction=args.uda_holdout_fraction,
            test_envs=args.test_envs,
        )
        for env in range(len(dataset))
    ]
    kinds = list(dict.fromkeys(["in", "out", *(kind for splits in per_env for kind in splits)]))
    named = {
        f"env{env}_{kind}": per_env[env][kind]
        for kind in kinds
        for env in range(len(dataset))
        if kind in per_env[env]
    }
    for name, split in named.items():
        if len(split) == 0 and not name.endswith("_uda"):
            env = split.environment
            raise UsageError(
                f"{name} (environment {env.name}, {len(env)} images) is empty with "
                "--holdout_fraction "
                f"{args.holdout_fraction}; choose a fraction that leaves images on both sides"
            )
    return {name: split for name, split in named.items() if len(split)}


def choose_device(device: str) -> str:
    """The device of "auto", "cpu" or "cuda"."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda: torch finds no CUDA device; pass --device cpu, or see `ltdr doctor`"
        )
    return device


def seed_everything(seed: int) -> None:
    """Seeds the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def reproducible_kernels(device: str) -> Iterator[None]:
    """Same seeds, same device, same numbers. Puts settings back: a worker runs many jobs."""
    if device != "cuda":
        yield
        return
    # cuBLAS reads this when it is first used; without it, its results may depend on stream timing.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn = torch.backends.cudnn
    before = (cudnn.deterministic, cudnn.benchmark, torch.are_deterministic_algorithms_enabled())
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    cudnn.deterministic, cudnn.benchmark = True, False
    # Only a warning: an algorithm from elsewhere may need a kernel that has no deterministic form.
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before[:2]
        torch.use_deterministic_algorithms(before[2], warn_only=warn_only)
        memory.fill_uninitialized_memory = fill
