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
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from domainbed_ext.checkpoint import save_checkpoint
from domainbed_ext.display import ReportProgress, RunState, format_row
from domainbed_ext.distributed import mean_over_ranks, on_any_rank, wait_for_ranks
from domainbed_ext.divergence import check_finite, check_parameters, last_values
from domainbed_ext.evaluation import evaluate
from domainbed_ext.first_look import counted_images
from domainbed_ext.job_files import CHECKPOINT_FILE, mark_done, tidy_up
from domainbed_ext.loaders import EvalBatches
from domainbed_ext.provenance import environment_lines
from domainbed_ext.records import RECORDS_FILE, Record, append_record
from domainbed_ext.resuming import SinceRecord, resume
from domainbed_ext.run_batches import (
    eval_batches,
    plain_train_images,
    train_batches,
    unlabeled_batches,
)
from domainbed_ext.runs import Run, reproducible_kernels
from domainbed_ext.saved_models import save_algorithm
from domainbed_ext.stop_signals import Stopped, stop_requested, stops_deferred
from domainbed_ext.tracking import tracked
from domainbed_ext.weight_averaging import RAW, ValleyAverage, renew_batch_norm_

_BATCH_NORM_STEPS = 500  # to measure the statistics of averaged weights, as SWAD does

Track = Callable[[Record], None]


def execute(run: Run, *, progress: ReportProgress | None = None) -> list[Record]:
    """Takes the steps that are left, and finishes the folder. Returns all records.

    Raises:
        Stopped: A signal asked for it; what was done is in the checkpoint.
    """
    with reproducible_kernels(run.device):
        start, since_record, records = resume(run)
        _print_header(run)
        if start == 0:
            run.algorithm.prepare(counted_images(plain_train_images(run), progress))
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


def _train(
    run: Run,
    start: int,
    since_record: SinceRecord,
    records: list[Record],
    track: Track,
    progress: ReportProgress | None,
) -> None:
    """Takes the steps that are left, adding to the records."""
    batches_of_steps = train_batches(run, start)
    unlabeled_of_steps = unlabeled_batches(run, start)
    evaluated = eval_batches(run)
    batch_size = run.hparams["batch_size"]
    # DomainBed counts epochs by its smallest domain, test domains included.
    steps_per_epoch = min(
        len(s) / batch_size for name, s in run.splits.items() if name.endswith("_in")
    )

    last_finite = last_values(since_record, records)
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
            results.update(_evaluate(run, evaluated, before_batch))
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
        minibatches = list(next(batches_of_steps))
        unlabeled = None if unlabeled_of_steps is None else [x for x, _ in next(unlabeled_of_steps)]
        values = run.algorithm.update(minibatches, unlabeled)
        if run.ranks.size > 1:
            num_images = sum(len(y) for _, y in minibatches)
            values = mean_over_ranks(values, num_images, device=run.device)
        since_record["step_time"].append(time.time() - began)
        check_finite(values, step, last_finite)
        last_finite = values
        for key, value in values.items():
            since_record[key].append(float(value))
        if progress is not None:
            progress(RunState(step + 1, run.num_steps, values.get("loss")))

        save_due = time.monotonic() - saved_at >= 60 * run.args.checkpoint_minutes
        stop, save_due = on_any_rank(stop_requested(), save_due)
        if stop or save_due or _has_record(run, step):
            check_parameters(run.algorithm, step, last_finite)
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
    evaluated: Mapping[str, EvalBatches],
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The accuracies of a record; where SWAD averages weights, it hears of the loss."""
    average = run.algorithm.average
    observes = isinstance(average, ValleyAverage) and not average.ready
    validation = [f"env{env}_out" for env in run.train_envs]
    options: dict[str, Any] = {
        "device": run.device,
        "num_classes": run.dataset.num_classes,
        "ranks": run.ranks,
        "before_batch": before_batch,
    }
    results = evaluate(run.algorithm, evaluated, **options, loss_of=validation if observes else ())
    if observes:
        average.observe(float(np.mean([results[f"{name}_loss"] for name in validation])))
    elif run.hparams.get("evaluate_raw") and run.algorithm.weights_in_evaluation != RAW:
        with average.withheld():
            raw = {f"{name}_raw": batches for name, batches in evaluated.items()}
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
    results.update(_evaluate(run, eval_batches(run)))
    _print_results(results, [])
    _append_record(run, records, track, results)


def _further_images(run: Run) -> Iterator[torch.Tensor]:
    """Those of the steps after the last one."""
    num_steps = min(_BATCH_NORM_STEPS, run.num_steps)
    for minibatches in itertools.islice(train_batches(run, run.num_steps), num_steps):
        yield torch.cat([x for x, _ in minibatches])


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
