"""Which images a run trains on, evaluates, and may look at beforehand."""

from __future__ import annotations

from collections.abc import Iterator

from domainbed_ext.datasets.base import EnvSplit, balanced_weights
from domainbed_ext.distributed import Ranks
from domainbed_ext.errors import UsageError
from domainbed_ext.launchers.devices import num_cores
from domainbed_ext.loaders import Batch, EvalBatches, TrainBatches
from domainbed_ext.runs import Run
from domainbed_ext.selection import needed_splits
from domainbed_ext.train_args import NEEDED_SPLITS


def train_batches(run: Run, start_step: int) -> Iterator[tuple[Batch, ...]]:
    """What each step trains on, from a step on: a batch of every training domain."""
    return zip(
        *(_train_batches(run, split, start_step) for split in _train_splits(run)), strict=True
    )


def unlabeled_batches(run: Run, start_step: int) -> Iterator[tuple[Batch, ...]] | None:
    """The same of the test domains' unlabelled parts; None if the task has none."""
    if run.args.task != "domain_adaptation":
        return None
    splits = [split for name, split in run.splits.items() if name.endswith("_uda")]
    if not splits:
        raise UsageError(
            "--task domain_adaptation needs unlabelled images of the test domains; pass "
            "--uda_holdout_fraction, 0.5 say"
        )
    return zip(*(_train_batches(run, split, start_step) for split in splits), strict=True)


def eval_batches(run: Run) -> dict[str, EvalBatches]:
    """What a record is made of, by the names of the splits."""
    names = list(run.splits)
    if run.args.eval_splits == NEEDED_SPLITS:
        names = needed_splits(names, run.args.test_envs)
    return {name: _eval_batches(run, run.splits[name]) for name in names}


def plain_train_images(run: Run) -> list[EvalBatches]:
    """What the algorithm may look at before its first step; on each rank all of it."""
    return [_eval_batches(run, split, ranks=Ranks()) for split in _train_splits(run)]


def _train_splits(run: Run) -> list[EnvSplit]:
    return [run.splits[f"env{env}_in"] for env in run.train_envs]


def _train_batches(run: Run, split: EnvSplit, start_step: int) -> TrainBatches:
    return TrainBatches(
        split,
        batch_size=run.hparams["batch_size"],
        seed=run.args.seed,
        transform=run.dataset.train_transform,
        num_workers=run.num_workers,
        pin_memory=run.device == "cuda",
        device=run.device,
        start_step=start_step,
        share=run.ranks.share(run.hparams["batch_size"]),
        weights=balanced_weights(split) if run.hparams.get("class_balanced") else None,
    )


def _eval_batches(run: Run, split: EnvSplit, ranks: Ranks | None = None) -> EvalBatches:
    # The processes that decode for training wait meanwhile: as many may work here.
    num_workers = run.num_workers * len(run.train_envs)
    most = max(run.num_workers, num_cores() // run.ranks.size)
    return EvalBatches(
        split,
        batch_size=run.hparams.get("eval_batch_size", 64),
        transform=run.dataset.eval_transform,
        num_workers=min(num_workers, most),
        pin_memory=run.device == "cuda",
        device=run.device,
        ranks=ranks or run.ranks,
    )
