"""One training run, from arguments to a finished folder, resumable at every checkpoint: at each
record, every few minutes, and where a signal asked for an end.

The loop is DomainBed's: one batch per training domain and step; at every `checkpoint_freq`-th step
and at the last one, the splits of all domains are evaluated and one record is appended. Where we
differ: validation images are not augmented, a run goes on where it was stopped, a loss that is not
finite ends it, and with SWAD a last record is that of the averaged weights.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from domainbed_ext.checkpoint import (
    Checkpoint,
    load_last_checkpoint,
    load_rng_state,
    load_training_state,
    save_checkpoint,
)
from domainbed_ext.datasets.base import EnvSplit, balanced_weights
from domainbed_ext.display import ReportProgress, RunState, format_row
from domainbed_ext.distributed import (
    Ranks,
    first_message,
    mean_over_ranks,
    on_any_rank,
    on_first_rank,
    wait_for_ranks,
)
from domainbed_ext.errors import UsageError
from domainbed_ext.evaluation import evaluate
from domainbed_ext.first_look import counted_images
from domainbed_ext.jobs import (
    CHECKPOINT_FILE,
    NEEDED_SPLITS,
    DivergedError,
    check_same_run,
    mark_done,
    run_identity,
    tidy_up,
)
from domainbed_ext.launchers.devices import num_cores
from domainbed_ext.loaders import EvalBatches, TrainBatches
from domainbed_ext.provenance import environment_lines
from domainbed_ext.records import (
    RECORDS_FILE,
    Record,
    append_record,
    first_record,
    read_records,
    restore_records,
)
from domainbed_ext.runs import Run, reproducible_kernels
from domainbed_ext.saved_models import save_algorithm
from domainbed_ext.selection import needed_splits
from domainbed_ext.stop_signals import Stopped, stop_requested, stops_deferred
from domainbed_ext.tracking import tracked
from domainbed_ext.weight_averaging import RAW, ValleyAverage, renew_batch_norm_

_BATCH_NORM_STEPS = 500  # to measure the statistics of averaged weights, as SWAD does

_logger = logging.getLogger(__name__)

SinceRecord = dict[str, list[float]]  # what each step since the last record has measured
Track = Callable[[Record], None]


def execute(run: Run, *, progress: ReportProgress | None = None) -> list[Record]:
    """Takes the steps that are left, and finishes the folder. Returns all records.

    Raises:
        Stopped: A signal asked for it; what was done is in the checkpoint.
    """
    with reproducible_kernels(run.device):
        start, since_record, records = _resume(run)
        _print_header(run)
        if start == 0:
            run.algorithm.prepare(counted_images(_plain_train_images(run), progress))
        if run.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with tracked(run, records) as track:
            with stops_deferred():
                _train(run, start, since_record, records, track, progress)
            _finish_average(run, records, track, progress)
    if progress is not None:
        progress(RunState(run.num_steps, run.num_steps, phase="saving"))
    if not run.args.skip_model_save:
        save_algorithm(run.folder, run.algorithm, run.info)
    if run.ranks.is_first:
        mark_done(run.folder)
        tidy_up(run.folder)
    return records


def _resume(run: Run) -> tuple[int, SinceRecord, list[Record]]:
    """Puts the last checkpoint's state back. Returns the next step, what was measured since the
    last record, and the records so far.
    """
    checkpoint = load_last_checkpoint(run.folder)
    records = on_first_rank(lambda: _records_so_far(run, checkpoint))
    if checkpoint is None:
        return 0, defaultdict(list), records
    load_training_state(run.algorithm, checkpoint.training_state)
    state = checkpoint.rng_state_of(run.ranks.rank)
    if state is not None:
        load_rng_state(state)
    return checkpoint.step + 1, defaultdict(list, checkpoint.since_record), records


def _records_so_far(run: Run, checkpoint: Checkpoint | None) -> list[Record]:
    """The records up to the checkpoint, after a check that both are of this run."""
    path = run.folder / RECORDS_FILE
    if checkpoint is not None:
        first = first_record(path)
    else:
        first = next(iter(read_records(path)), None) if path.exists() else None
    wanted = {
        **run_identity(run.args.record_args(), run.hparams),
        "data": run.provenance["data_fingerprint"],
    }
    for where in ([_of_checkpoint(checkpoint)] if checkpoint else []) + (
        [_of_record(first)] if first else []
    ):
        check_same_run(
            run.folder,
            found=where,
            wanted={name: v for name, v in wanted.items() if name != "data" or "data" in where},
        )
    # A record whose checkpoint was not written any more is made again; so is that of an average,
    # whose checkpoint is of the run before it.
    kept = [] if checkpoint is None else checkpoint.records
    if restore_records(path, kept):
        print(f"{path} was damaged: its {len(kept)} records are restored from the checkpoint")
    if checkpoint is not None:
        print(f"Going on after step {checkpoint.step}, from {checkpoint.path}")
    elif first is not None:
        print(f"No checkpoint in {run.folder}: starting again from the first step")
    return kept


def _of_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    info = checkpoint.info
    identity = run_identity(info["args"], info["model_hparams"])
    return {**identity, "data": info["provenance"]["data_fingerprint"]}


def _of_record(record: Record) -> dict[str, Any]:
    return run_identity(record["args"], record.get("hparams") or {})


def _train(
    run: Run,
    start: int,
    since_record: SinceRecord,
    records: list[Record],
    track: Track,
    progress: ReportProgress | None,
) -> None:
    """Takes the steps that are left, adding to the records."""
    train_batches = zip(*_train_loaders(run, start), strict=True)
    uda_batches = _uda_batches(run, start)
    evaluators = _evaluators(run)
    batch_size = run.hparams["batch_size"]
    # DomainBed counts epochs by its smallest domain, test domains included.
    steps_per_epoch = min(
        len(s) / batch_size for name, s in run.splits.items() if name.endswith("_in")
    )

    last_finite: dict[str, float] = {}
    shown_keys: list[str] = []
    saved_at = time.monotonic()

    def save(step: int) -> None:
        nonlocal saved_at
        save_checkpoint(
            run.folder / CHECKPOINT_FILE,
            step=step,
            algorithm=run.algorithm,
            info=run.info,
            since_record=since_record,
            records=records,
        )
        saved_at = time.monotonic()

    def record_at(step: int) -> None:
        nonlocal shown_keys
        loss = since_record["loss"][-1] if "loss" in since_record else None

        def show() -> None:
            if progress is not None:
                progress(RunState(step + 1, run.num_steps, loss, phase="evaluating"))

        def before_batch() -> None:
            show()  # an evaluation may be long: it is not to look like a run that is stuck
            _stop_if_requested(step)

        show()
        results: dict[str, Any] = {"step": step, "epoch": step / steps_per_epoch}
        results.update({key: float(np.mean(column)) for key, column in since_record.items()})
        try:
            results.update(_evaluate(run, evaluators, before_batch))
        except Stopped:  # the record is made when the run goes on
            save(step)
            wait_for_ranks()
            raise
        shown_keys = _print_results(results, shown_keys)
        _append_record(run, records, track, {**results, **run.algorithm.diagnostics()})
        since_record.clear()
        save(step)
        if run.args.save_model_every_checkpoint and not run.args.skip_model_save:
            save_algorithm(run.folder, run.algorithm, run.info, name=f"model_step{step}")

    if since_record and _has_record(run, start - 1):
        record_at(start - 1)
    for step in range(start, run.num_steps):
        if _is_over(run):
            break
        began = time.time()
        minibatches = [_to_device(batch, run.device) for batch in next(train_batches)]
        unlabeled = (
            None if uda_batches is None else [x.to(run.device) for x, _ in next(uda_batches)]
        )
        values = run.algorithm.update(minibatches, unlabeled)
        if run.ranks.size > 1:
            num_images = sum(len(y) for _, y in minibatches)
            values = mean_over_ranks(values, num_images, device=run.device)
        since_record["step_time"].append(time.time() - began)
        _check_finite(values, step, last_finite)
        last_finite = values
        for key, value in values.items():
            since_record[key].append(float(value))
        if progress is not None:
            progress(RunState(step + 1, run.num_steps, values.get("loss")))

        save_due = time.monotonic() - saved_at >= 60 * run.args.checkpoint_minutes
        stop, save_due = on_any_rank(stop_requested(), save_due)
        if stop or save_due or _has_record(run, step):
            _check_parameters(run.algorithm, step, last_finite)
        if stop or save_due:
            save(step)
        if stop:
            wait_for_ranks()
            raise Stopped(step)
        if _has_record(run, step):
            record_at(step)


def _has_record(run: Run, step: int) -> bool:
    return step % run.checkpoint_freq == 0 or step == run.num_steps - 1


def _stop_if_requested(step: int) -> None:
    (stop,) = on_any_rank(stop_requested())
    if stop:
        raise Stopped(step)


def _evaluate(
    run: Run,
    evaluators: Mapping[str, EvalBatches],
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The accuracies of a record; where SWAD averages weights, it hears of the loss."""
    average = run.algorithm.average
    observes = isinstance(average, ValleyAverage) and not average.ready
    validation = [f"env{env}_out" for env in _train_envs(run)]
    options: dict[str, Any] = {
        "device": run.device,
        "num_classes": run.dataset.num_classes,
        "ranks": run.ranks,
        "before_batch": before_batch,
    }
    results = evaluate(run.algorithm, evaluators, **options, loss_of=validation if observes else ())
    if observes:
        average.observe(float(np.mean([results[f"{name}_loss"] for name in validation])))
    elif run.hparams.get("evaluate_raw") and run.algorithm.weights_in_evaluation != RAW:
        with average.withheld():
            raw = {f"{name}_raw": batches for name, batches in evaluators.items()}
            results.update(evaluate(run.algorithm, raw, **options))
    results["mem_gb"] = torch.cuda.max_memory_allocated() / 2**30 if run.device == "cuda" else 0.0
    return results


def _append_record(
    run: Run, records: list[Record], track: Track, results: Mapping[str, Any]
) -> None:
    record = {
        **results,
        "hparams": run.hparams,
        "args": run.args.record_args(),
        "provenance": {**run.provenance, "weights": run.algorithm.weights_in_evaluation},
    }
    records.append(record)
    if run.ranks.is_first:
        append_record(run.folder / RECORDS_FILE, record)
    track(record)


def _is_over(run: Run) -> bool:
    """Whether no further step can change the model that the run ends with."""
    average = run.algorithm.average
    return isinstance(average, ValleyAverage) and average.valley.is_over


def _finish_average(
    run: Run, records: list[Record], track: Track, progress: ReportProgress | None
) -> None:
    """With SWAD: average the weights, and add the record of the average."""
    average, last = run.algorithm.average, records[-1]
    if not isinstance(average, ValleyAverage):
        return
    if progress is not None:
        progress(RunState(run.num_steps, run.num_steps, phase="evaluating"))
    average.finish()
    renew_batch_norm_(run.algorithm, _further_images(run))
    print(average.describe())
    steps = {"swad_first_step": average.steps.start, "swad_last_step": average.steps.stop - 1}
    results: dict[str, Any] = {"step": last["step"], "epoch": last["epoch"], **steps}
    results.update(_evaluate(run, _evaluators(run)))
    _print_results(results, [])
    _append_record(run, records, track, results)


def _further_images(run: Run) -> Iterator[torch.Tensor]:
    """Those of the steps after the last one."""
    batches = zip(*_train_loaders(run, run.num_steps), strict=True)
    for minibatches in itertools.islice(batches, min(_BATCH_NORM_STEPS, run.num_steps)):
        yield torch.cat([_to_device(batch, run.device)[0] for batch in minibatches])


def _evaluators(run: Run) -> dict[str, EvalBatches]:
    names = list(run.splits)
    if run.args.eval_splits == NEEDED_SPLITS:
        names = needed_splits(names, run.args.test_envs)
    return {name: _eval_batches(run, run.splits[name]) for name in names}


def _train_loaders(run: Run, start: int) -> list[TrainBatches]:
    return [_train_batches(run, split, start) for split in _train_splits(run)]


def _plain_train_images(run: Run) -> list[EvalBatches]:
    """What the algorithm may look at before its first step; on each rank all of it."""
    return [_eval_batches(run, split, ranks=Ranks()) for split in _train_splits(run)]


def _train_splits(run: Run) -> list[EnvSplit]:
    return [run.splits[f"env{env}_in"] for env in _train_envs(run)]


def _train_envs(run: Run) -> list[int]:
    return [env for env in range(len(run.dataset)) if env not in run.args.test_envs]


def _eval_batches(run: Run, split: EnvSplit, ranks: Ranks | None = None) -> EvalBatches:
    # The processes that decode for training wait meanwhile: as many may work here.
    num_workers = run.num_workers * len(_train_envs(run))
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


def _uda_batches(run: Run, start: int) -> Iterator[Any] | None:
    if run.args.task != "domain_adaptation":
        return None
    splits = [split for name, split in run.splits.items() if name.endswith("_uda")]
    if not splits:
        raise UsageError(
            "--task domain_adaptation needs unlabelled images of the test domains; pass "
            "--uda_holdout_fraction, 0.5 say"
        )
    return zip(*(_train_batches(run, split, start) for split in splits), strict=True)


def _train_batches(run: Run, split: EnvSplit, start: int) -> TrainBatches:
    return TrainBatches(
        split,
        batch_size=run.hparams["batch_size"],
        seed=run.args.seed,
        transform=run.dataset.train_transform,
        num_workers=run.num_workers,
        pin_memory=run.device == "cuda",
        device=run.device,
        start_step=start,
        share=run.ranks.share(run.hparams["batch_size"]),
        weights=balanced_weights(split) if run.hparams.get("class_balanced") else None,
    )


def _to_device(
    batch: tuple[torch.Tensor, torch.Tensor], device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = batch
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def _check_finite(values: Mapping[str, float], step: int, last_finite: Mapping[str, float]) -> None:
    bad = [key for key, value in values.items() if "loss" in key and not math.isfinite(value)]
    if bad:
        raise DivergedError(
            f"{bad[0]} is {values[bad[0]]} at step {step}; {_last_finite(last_finite)}", step
        )


def _check_parameters(
    algorithm: torch.nn.Module, step: int, last_finite: Mapping[str, float]
) -> None:
    bad = (name for name, value in algorithm.named_parameters() if not torch.isfinite(value).all())
    # a rank may have experts that no other has
    name = first_message(next(bad, None))
    if name is not None:
        raise DivergedError(
            f"parameter {name} is not finite after step {step}; {_last_finite(last_finite)}", step
        )


def _last_finite(values: Mapping[str, float]) -> str:
    shown = ", ".join(f"{key} {value:.6g}" for key, value in values.items())
    return f"last finite metrics: {shown}" if shown else "no step before it was finite"


def _print_header(run: Run) -> None:
    sections = {
        "Environment": [*environment_lines(), f"Device: {run.provenance['device']}"],
        "Args": [f"{key}: {value}" for key, value in sorted(run.args.record_args().items())],
        "HParams": [f"{key}: {value}" for key, value in sorted(run.hparams.items())],
        "Provenance": [
            f"{key}: {json.dumps(value)}" for key, value in sorted(run.provenance.items())
        ],
    }
    for title, lines in sections.items():
        print(f"{title}:")
        for line in lines:
            print(f"\t{line}")


def _print_results(results: Mapping[str, Any], shown_keys: list[str]) -> list[str]:
    # Mean accuracies per class are in the records; here they would double the width.
    keys = sorted(key for key in results if not key.endswith("_class_acc"))
    if keys != shown_keys:
        print(format_row(keys))
    print(format_row([results[key] for key in keys]))
    return keys
