"""Ending a run whose loss or parameters are no longer finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from domainbed_ext.distributed import first_message
from domainbed_ext.errors import DivergedError


def check_finite(values: Mapping[str, float], step: int, last_finite: Mapping[str, float]) -> None:
    """Raises a DivergedError if a loss of this step is not finite."""
    bad = [key for key, value in values.items() if "loss" in key and not math.isfinite(value)]
    if bad:
        raise DivergedError(
            f"{bad[0]} is {values[bad[0]]} at step {step}; {_last_finite(last_finite)}", step
        )


def check_parameters(
    algorithm: torch.nn.Module, step: int, last_finite: Mapping[str, float]
) -> None:
    """Raises one if a parameter is not; every rank of a run has to call it."""
    bad = (name for name, value in algorithm.named_parameters() if not torch.isfinite(value).all())
    # a rank may have experts that no other has
    name = first_message(next(bad, None))
    if name is not None:
        raise DivergedError(
            f"parameter {name} is not finite after step {step}; {_last_finite(last_finite)}", step
        )


def last_values(
    since_record: Mapping[str, Sequence[float]], records: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """What a run that goes on has measured last: at its last step, or up to its last record."""
    columns = {name: column for name, column in since_record.items() if name != "step_time"}
    if columns:
        return {name: column[-1] for name, column in columns.items()}
    return {"loss": records[-1]["loss"]} if records and "loss" in records[-1] else {}


def _last_finite(values: Mapping[str, float]) -> str:
    shown = ", ".join(f"{key} {value:.6g}" for key, value in values.items())
    return f"last finite metrics: {shown}" if shown else "no step before it was finite"
