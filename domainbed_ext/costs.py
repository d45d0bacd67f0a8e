"""What the algorithms of a sweep cost beside what they score: active experts, and time per step.

    costs_frame(load_records("sweep"), relative_to="GMOE")

Times are those of the jobs as they ran, beside each other or not, so a ratio of them is a rough
one; `scripts/bench_routers.py` measures steps side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from domainbed_ext.errors import UsageError
from domainbed_ext.records import Record
from domainbed_ext.table_names import algorithm_names, dataset_names

COST_COLUMNS = ("dataset", "algorithm", "experts_per_token", "relative_step_time", "jobs")


def costs_frame(records: Sequence[Record], *, relative_to: str) -> pd.DataFrame:
    """A row per data set and algorithm.

    `experts_per_token` is the mean over training steps and sparse layers, of routed experts (a
    shared expert is no choice); NaN for a dense model. `relative_step_time` is the median time of a
    step over that of `relative_to`, of jobs on the same device; NaN where there are none.

    Raises:
        UsageError: No record is of `relative_to`.
    """
    if not any(record["args"]["algorithm"] == relative_to for record in records):
        raise UsageError(
            f"--costs {relative_to}: no job of that algorithm; choose among "
            f"{', '.join(dict.fromkeys(r['args']['algorithm'] for r in records))}"
        )
    rows = []
    for dataset in dataset_names(records):
        own = [record for record in records if record["args"]["dataset"] == dataset]
        seconds = {
            name: _median_seconds(own, name)
            for name in dict.fromkeys([*algorithm_names(own, dataset), relative_to])
        }
        for name in algorithm_names(own, dataset):
            of_name = [record for record in own if record["args"]["algorithm"] == name]
            experts = [r["experts_per_token"] for r in of_name if "experts_per_token" in r]
            ratios = [
                seconds[name][device] / base
                for device, base in seconds[relative_to].items()
                if device in seconds[name] and base > 0
            ]
            rows.append(
                (
                    dataset,
                    name,
                    float(np.mean(experts)) if experts else np.nan,
                    float(np.mean(ratios)) if ratios else np.nan,
                    len({_job(record) for record in of_name}),
                )
            )
    frame = pd.DataFrame(rows, columns=list(COST_COLUMNS))
    return frame.astype({"experts_per_token": float, "relative_step_time": float})


def _median_seconds(records: Sequence[Record], algorithm: str) -> dict[str, float]:
    """By device. A job's first record is left out: its steps warm up."""
    times: dict[str, list[float]] = {}
    for record in records:
        if record["args"]["algorithm"] == algorithm and record["step"] and "step_time" in record:
            device = str((record.get("provenance") or {}).get("device", "unknown"))
            times.setdefault(device, []).append(record["step_time"])
    return {device: float(np.median(values)) for device, values in times.items()}


def _job(record: Record) -> tuple[object, ...]:
    args = record["args"]
    return (*args["test_envs"], "|", args["hparams_seed"], args["trial_seed"])
