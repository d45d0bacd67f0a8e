"""Going on with a run: its last checkpoint's state, and the records up to there."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from domainbed_ext.checkpoint import (
    Checkpoint,
    load_last_checkpoint,
    load_rng_state,
    load_training_state,
)
from domainbed_ext.distributed import on_first_rank
from domainbed_ext.errors import UsageError
from domainbed_ext.records import (
    RECORDS_FILE,
    Record,
    first_record,
    read_records,
    restore_records,
)
from domainbed_ext.runs import Run
from domainbed_ext.train_args import check_same_run, run_identity

SinceRecord = dict[str, list[float]]  # what each step since the last record has measured


def resume(run: Run) -> tuple[int, SinceRecord, list[Record]]:
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
    order = run.info["file_order"]
    # a checkpoint of an older version does not know it
    if checkpoint is not None and checkpoint.info.get("file_order", order) != order:
        raise UsageError(
            f"the image files of {run.args.dataset} have other names than when the run in "
            f"{run.folder} began, so its splits would be others: restore the files, or delete "
            "that folder to start afresh"
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
