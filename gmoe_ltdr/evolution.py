"""Expert evolution: one expert is trained, the others follow it, each at a pace of its own (EvoMoE,
arXiv 2505.23830).

    before = cloned_parameters(layer.experts)
    optimizer.step()                                  # trains the first expert
    evolve_experts_(layer.experts, before, betas, "scaled_update")

The paper prints an update that adds a gradient to parameters, which cannot be meant. Three readings
of its text and tables, with theta the first expert, theta_n one of the others:

    scaled_update   theta_n + (1 - beta) (new theta - old theta)     a share of each update
    ema             beta theta_n + (1 - beta) new theta              a moving average
    one_step        beta old theta + (1 - beta) new theta            between two steps

The last two end at theta when the learning rate does; the first keeps experts apart.

Shapes: E experts, ... the shape of one expert's parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from gmoe_ltdr.experts import StackedExperts

Evolution = Literal["scaled_update", "ema", "one_step"]
EVOLUTIONS: tuple[Evolution, ...] = ("scaled_update", "ema", "one_step")


def beta_ranges(num_experts: int) -> Tensor:
    """From where to where the betas of experts 2 to E are drawn, float32 (E - 1, 2).

    As published for four experts: [.9, .99], [.8, .89], [.7, .79]; further ones go on downwards.
    """
    tenths = 9.0 - torch.arange(num_experts - 1, dtype=torch.float32)
    low = tenths.clamp(min=0.0) / 10
    return torch.stack([low, low + 0.09], dim=1)


def draw_betas(num_layers: int, num_experts: int) -> Tensor:
    """One beta per layer and expert, from torch's global generator. Float32 (layers, E - 1)."""
    low, high = beta_ranges(num_experts).unbind(1)
    return low + (high - low) * torch.rand(num_layers, num_experts - 1)


def evolved(
    others: Tensor, old_first: Tensor, new_first: Tensor, betas: Tensor, evolution: Evolution
) -> Tensor:
    """The other experts' parameter after a step of the first one's, in float32. (E - 1, ...).

    Args:
        others: Theirs before, (E - 1, ...).
        old_first: The first expert's before the step, (...).
        new_first: And after it.
        betas: (E - 1,).
        evolution: The reading.
    """
    others, old, new = others.float(), old_first.float(), new_first.float()
    beta = betas.to(others.device).view(-1, *[1] * old.dim())
    if evolution == "scaled_update":
        return others + (1 - beta) * (new - old)
    if evolution == "ema":
        return beta * others + (1 - beta) * new
    return beta * old + (1 - beta) * new


def cloned_parameters(experts: StackedExperts) -> dict[str, Tensor]:
    """A copy of the experts' parameters, for `evolve_experts_`."""
    return {name: p.detach().clone() for name, p in experts.named_parameters()}


@torch.no_grad()
def evolve_experts_(
    experts: StackedExperts, before: Mapping[str, Tensor], betas: Tensor, evolution: Evolution
) -> None:
    """Let all experts but the first follow its step.

    Whatever the optimizer did to the others (weight decay reaches them, and with Adam it is no
    small thing) is undone.

    Args:
        experts: After the optimizer's step.
        before: What they were before it.
        betas: One per other expert, (E - 1,).
        evolution: How they follow.
    """
    for name, parameter in experts.named_parameters():
        old = before[name]
        parameter[1:] = evolved(old[1:], old[0], parameter[0], betas, evolution).to(parameter.dtype)


@torch.no_grad()
def copy_first_expert_(experts: StackedExperts) -> None:
    """Make all experts copies of the first one."""
    for parameter in experts.parameters():
        parameter[1:] = parameter[:1]
