"""How a network is optimised: optimizer, learning-rate schedule, precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
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


def use_fused_kernels_(optimizer: torch.optim.Optimizer, hparams: Mapping[str, Any]) -> None:
    """Have Adam or AdamW take a step in one kernel, where that is wanted; "auto": on CUDA.

    Called before a step: where the parameters will be is not known when an optimizer is made.
    """
    choice = hparams.get("fused_optimizer", "auto")
    for group in optimizer.param_groups:
        on_cuda = any(parameter.is_cuda for parameter in group["params"])
        fused = True if choice == "on" or (choice == "auto" and on_cuda) else None
        if group.get("fused") == fused:
            continue
        group["fused"] = fused
        for parameter in group["params"]:  # of a run that began on another device
            if fused and parameter in optimizer.state:
                state = optimizer.state[parameter]
                state["step"] = state["step"].to(parameter.device)


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


def as_input(x: Tensor, hparams: Mapping[str, Any]) -> Tensor:
    """Images as the network is to get them: their channels last in memory, where that is wanted.

    Convolutions go along with their input. The weights stay as they are, and with them all that is
    saved.
    """
    if hparams.get("channels_last", False):
        return x.contiguous(memory_format=torch.channels_last)
    return x


def autocast(device: torch.device, precision: str):
    """bfloat16 autocast for "bf16", nothing for "fp32"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
