"""Checkpoints of expert-parallel models: always unsharded, whatever the number of ranks.

Saving gathers the experts that the ranks hold; loading takes the part of each (E, ...) tensor that
a rank holds, which `MoE` does by itself in `load_state_dict`. So what N ranks wrote, M ranks load.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from gmoe_ltdr.collect import moe_layers
from gmoe_ltdr.dispatch.placement import experts_of_rank
from gmoe_ltdr.moe import MoE


def expert_parallel_group(model: nn.Module) -> ProcessGroup | None:
    """The ranks that share the model's experts; None when every rank has all of them."""
    groups = {layer.ep_group for layer in moe_layers(model).values()} - {None}
    if len(groups) > 1:
        raise ValueError("the model's layers use different expert-parallel groups")
    return groups.pop() if groups else None


def sharded_parameters(model: nn.Module) -> dict[str, MoE]:
    """Names of the parameters of which every rank holds a part, and the layer of each."""
    return {
        f"{prefix}{'.' if prefix else ''}experts.{name}": layer
        for prefix, layer in moe_layers(model).items()
        if layer.ep_group is not None
        for name, _ in layer.experts.named_parameters()
    }


def gather_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """`model.state_dict()` with all experts. Every rank of the group calls it and gets all."""
    return gather_tensors(model.state_dict(), model)


def gather_tensors(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Tensors shaped and named like the model's, with those of all experts. Collective, as above.

    Means of its weights, for instance.
    """
    layers = sharded_parameters(model)
    return {
        name: _gather(value, layers[name]) if name in layers else value
        for name, value in tensors.items()
    }


def shard_tensors(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """What belongs to the experts held here, of what `gather_tensors` gave."""
    layers = sharded_parameters(model)
    return {
        name: _held_part(value, layers[name]) if name in layers else value
        for name, value in tensors.items()
    }


def gather_experts(layer: MoE) -> dict[str, Tensor]:
    """The parameters of all experts of one layer, by name. Collective, as above."""
    named = layer.experts.named_parameters()
    if layer.ep_group is None:
        return {name: value.detach() for name, value in named}
    return {name: _gather(value.detach(), layer) for name, value in named}


def gather_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """`optimizer.state_dict()` with the state of all experts. Collective, as above."""
    return _convert(optimizer.state_dict(), optimizer, model, _gather)


def shard_optimizer_state(
    state: Mapping[str, Any], optimizer: torch.optim.Optimizer, model: nn.Module
) -> dict[str, Any]:
    """The part of an unsharded optimizer state that belongs to the experts held here."""
    return _convert(state, optimizer, model, _held_part)


def _convert(
    state: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    convert: Callable[[Tensor, MoE], Tensor],
) -> dict[str, Any]:
    """Apply `convert` to the per-parameter state (moments, not step counts) of sharded experts."""
    layers = sharded_parameters(model)
    layer_of = {id(p): layers[name] for name, p in model.named_parameters() if name in layers}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # a state dict numbers parameters in the order of the groups
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    layer_of_number = {
        number: layer_of[id(p)]
        for number, p in zip(numbers, parameters, strict=True)
        if id(p) in layer_of
    }
    # ranks must gather in one order
    converted = {
        number: {
            key: convert(value, layer_of_number[number])
            if number in layer_of_number and isinstance(value, Tensor) and value.dim() > 0
            else value
            for key, value in values.items()
        }
        for number, values in sorted(state["state"].items())
    }
    return {**state, "state": converted}


def _held_part(whole: Tensor, layer: MoE) -> Tensor:
    held = layer.held_experts
    return whole[held.start : held.stop].clone()


@torch.no_grad()
def _gather(part: Tensor, layer: MoE) -> Tensor:
    """All experts' rows of a tensor of which each rank holds its experts'."""
    group, num_experts = layer.ep_group, layer.spec.num_experts
    assert group is not None
    whole = part.new_empty(num_experts, *part.shape[1:])
    for rank in range(group.size()):
        held = experts_of_rank(num_experts, group.size(), rank)
        rows = whole[held.start : held.stop]
        if rank == group.rank():
            rows.copy_(part)
        dist.broadcast(rows, src=dist.get_global_rank(group, rank), group=group)
    return whole
