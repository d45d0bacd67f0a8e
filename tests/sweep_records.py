"""Hand-made records and sweeps for the tests of selection, tables and their command lines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from domainbed_ext.seeds import job_hash


def make_record(
    test_envs: Sequence[int],
    *,
    step: int = 0,
    in_acc: Sequence[float],
    out_acc: Sequence[float],
    algorithm: str = "ERM",
    dataset: str = "Debug28",
    trial_seed: int = 0,
    hparams_seed: int = 0,
    **extra: Any,
) -> dict[str, Any]:
    """A record with `env{i}_in_acc` and `env{i}_out_acc` from two lists; `extra`: other keys."""
    args = {
        "algorithm": algorithm,
        "dataset": dataset,
        "hparams_seed": hparams_seed,
        "test_envs": list(test_envs),
        "trial_seed": trial_seed,
    }
    args["output_dir"] = f"sweep/{job_hash(args)}"
    accs = {f"env{env}_in_acc": acc for env, acc in enumerate(in_acc)}
    accs |= {f"env{env}_out_acc": acc for env, acc in enumerate(out_acc)}
    return {"args": args, "hparams": {"lr": 0.1 * hparams_seed}, "step": step, **accs, **extra}


def write_sweep(
    folder: Path, records: Sequence[Mapping[str, Any]], *, unfinished: Sequence[str] = ()
) -> Path:
    """Writes each job's records to its own folder, as a sweep does."""
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        job = folder / Path(record["args"]["output_dir"]).name
        job.mkdir(exist_ok=True)
        with open(job / "results.jsonl", "a") as file:
            file.write(json.dumps(record, sort_keys=True) + "\n")
        (job / "done").write_text("done")
    for name in unfinished:
        (folder / name).mkdir()
        (folder / name / "out.txt").write_text("")
    return folder


# Three domains, two trials, worked out by hand. Each line: test_envs, trial, hparams seed, step,
# accuracies on "in", accuracies on "out".
_ROWS = [
    # Trial 0, test domain 0. Draw 0 ties at 0.60 on domains 1 and 2: the first step counts.
    ([0], 0, 0, 0, [0.30, 0, 0], [0.90, 0.50, 0.70]),
    ([0], 0, 0, 10, [0.40, 0, 0], [0.10, 0.60, 0.60]),
    # Draw 1 validates at 0.70, so it counts: 50 %. It also wins the oracle's choice (0.20 > 0.10).
    ([0], 0, 1, 0, [0.45, 0, 0], [0.80, 0.10, 0.10]),
    ([0], 0, 1, 10, [0.50, 0, 0], [0.20, 0.50, 0.90]),
    # Trial 1, test domain 0: both draws validate at 0.80, the later draw counts: 70 %.
    ([0], 1, 0, 10, [0.60, 0, 0], [0.50, 0.80, 0.80]),
    ([0], 1, 1, 10, [0.70, 0, 0], [0.40, 0.70, 0.90]),
    # Trial 0, test domain 1: 20 % by validation (0.75 at step 0), 25 % by the oracle (last step).
    ([1], 0, 0, 0, [0, 0.20, 0], [0.70, 0.30, 0.80]),
    ([1], 0, 0, 10, [0, 0.25, 0], [0.60, 0.30, 0.80]),
    # Trial 0, test domain 2: 90 %.
    ([2], 0, 0, 10, [0, 0, 0.90], [0.50, 0.50, 0.50]),
    # Two test domains, trial 0: what leave-one-domain-out needs for domain 0, at step 10 for both
    # draws. Draw 0: (0.30 + 0.50) / 2 = 0.40. Draw 1: (0.20 + 0.40) / 2 = 0.30. So draw 0: 40 %.
    ([0, 1], 0, 0, 10, [0, 0.30, 0], [0, 0, 0]),
    ([0, 2], 0, 0, 10, [0, 0, 0.50], [0, 0, 0]),
    ([0, 1], 0, 1, 10, [0, 0.20, 0], [0, 0, 0]),
    ([0, 2], 0, 1, 10, [0, 0, 0.40], [0, 0, 0]),
]


def hand_made_records(*, algorithm: str = "ERM", dataset: str = "Debug28") -> list[dict[str, Any]]:
    """The records of `_ROWS`.

    By training-domain validation: domain 0 is 50 and 70, mean 60, standard error
    std(50, 70) / sqrt(2) = 10 / 1.41421 = 7.07; domain 1 is 20, domain 2 is 90; average
    (60 + 20 + 90) / 3 = 56.67. By leave-one-domain-out: domain 0 is 40, the others lack runs.
    By the oracle: domain 0 is 50 (trial 0) and 60 (trial 1, 0.50 > 0.40), mean 55, standard error
    5 / 1.41421 = 3.54; domain 1 is 25, domain 2 is 90.
    """
    return [
        make_record(
            test_envs,
            trial_seed=trial,
            hparams_seed=draw,
            step=step,
            in_acc=in_acc,
            out_acc=out_acc,
            algorithm=algorithm,
            dataset=dataset,
        )
        for test_envs, trial, draw, step, in_acc, out_acc in _ROWS
    ]
