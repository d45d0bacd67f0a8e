"""How a ViT is optimised: optimizer, learning-rate schedule, weight averaging, precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from domainbed_ext.errors import UsageError


def create_optimizer(network: nn.Module, hparams: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Adam with L2 as in DomainBed, or AdamW whose decay spares biases, norms and one-dimensional
    parameters."""
    if hparams["optimizer"] == "adam":
        return torch.optim.Adam(
            network.parameters(), lr=hparams["lr"], weight_decay=hparams["weight_decay"]
        )
    decayed = [p for n, p in network.named_parameters() if not _is_undecayed(n, p)]
    spared = [p for n, p in network.named_parameters() if _is_undecayed(n, p)]
    groups = [
        {"params": decayed, "weight_decay": hparams["weight_decay"]},
        {"params": spared, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=hparams["lr"])


def _is_undecayed(name: str, parameter: nn.Parameter) -> bool:
    # stacked biases of experts are two-dimensional
    return parameter.ndim <= 1 or name.endswith("bias") or name in ("cls_token", "pos_embed")


class learning_rate_factor:  # noqa: N801  used like a function; a class so that it can be copied
    """Factor on the learning rate at each step.

    "constant" and "cosine" (to zero) rise linearly over `warmup_fraction` of the run, if it is
    given; "one_cycle" rises as a cosine from 1/25 over the warm-up, by default 30 % of the run, and
    falls as a cosine to zero.
    """

    def __init__(self, hparams: Mapping[str, Any]):
        self.schedule = hparams["schedule"]
        self.steps = hparams["schedule_steps"]
        self.warmup = hparams["warmup_fraction"]
        if self.schedule == "one_cycle" and not self.warmup:
            self.warmup = 0.3
        if (self.schedule != "constant" or self.warmup) and self.steps < 1:
            raise UsageError(
                f"hparams schedule={self.schedule!r} and warmup_fraction={self.warmup} need "
                f"schedule_steps, the number of steps of the run, but it is {self.steps}"
            )

    def __call__(self, step: int) -> float:
        done = min((step + 1) / max(self.steps, 1), 1.0)
        if done < self.warmup:
            rise = done / self.warmup
            if self.schedule == "one_cycle":
                return 0.04 + 0.96 * (1 - math.cos(math.pi * rise)) / 2
            return rise
        if self.schedule == "constant":
            return 1.0
        fall = (done - self.warmup) / max(1 - self.warmup, 1e-12)
        return (1 + math.cos(math.pi * fall)) / 2


def ema_update(decay: float) -> Callable:
    """Exponential moving average whose memory grows with the run, so that early steps fade."""

    @torch.no_grad()
    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: Tensor) -> None:
        steps = int(num_averaged)
        weight = 1 - min(decay, (1 + steps) / (10 + steps))
        floating = [i for i, value in enumerate(averaged) if value.is_floating_point()]
        if floating:  # it is called for the tensors of each type by themselves
            torch._foreach_lerp_(
                [averaged[i] for i in floating], [current[i].detach() for i in floating], weight
            )
        for i, value in enumerate(averaged):
            if i not in floating:
                value.copy_(current[i])

    return update


def autocast(device: torch.device, precision: str):
    """bfloat16 autocast for "bf16", nothing for "fp32"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
