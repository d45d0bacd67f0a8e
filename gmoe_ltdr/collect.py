"""Gather what the routers of a model decided, from outside.

Modules keep nothing of a forward: a graph tensor left on a module breaks `copy.deepcopy` (and with
it weight averaging), and counts kept in a module double under activation checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gmoe_ltdr.moe import MoE
from gmoe_ltdr.routers.base import Router, is_recomputed
from gmoe_ltdr.routing import Routing


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """The model's MoE layers by name, in depth order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


def routed_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Whatever has a `router` by name, in depth order: a `MoE`, or a host's own layer or gate that
    routes by one of ours."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "router", None), Router)
    }


@contextmanager
def collect_routing(model: nn.Module) -> Iterator[dict[str, Routing]]:
    """Collect every layer's `Routing` of one forward, keyed by layer name, in depth order.

    A layer is any of `routed_modules`. Leave the context before `backward()`.

        with collect_routing(model) as routings:
            logits = model(images)
        loss = cross_entropy(logits, labels) + balance_loss(routings, spec)

    Raises:
        RuntimeError: On a second forward inside one context, or when a layer runs inside a
            reentrant activation checkpoint, whose collected tensors would carry no gradient.
    """
    routings: dict[str, Routing] = {}
    grad_was_enabled = torch.is_grad_enabled()

    def hook_of(name: str):
        def keep(router: Router, _inputs, routing: Routing) -> None:
            if is_recomputed():
                return
            if router.training and grad_was_enabled and not torch.is_grad_enabled():
                raise RuntimeError(
                    f"layer {name!r} ran without gradients although collect_routing was entered "
                    "with them: use activation checkpointing with use_reentrant=False, or enter "
                    "torch.no_grad() before collect_routing"
                )
            if name in routings:
                raise RuntimeError(
                    f"layer {name!r} routed twice inside one collect_routing; collect one forward "
                    "at a time"
                )
            routings[name] = routing

        return keep

    handles = [
        module.router.register_forward_hook(hook_of(name))  # type: ignore[union-attr]
        for name, module in routed_modules(model).items()
    ]
    try:
        yield routings
    finally:
        for handle in handles:
            handle.remove()
