"""Decoding with a cache: the decision that the prompt led to holds for every token after it.

A layer that decodes sees one new token of each sequence, and not the prompt that a router for whole
sequences (INSTRUCT, CLUSTER) chose by. The decision is a value, kept by whoever keeps the cache:

    with collect_routing(model) as routings:
        step = model(prompt)
    decided = sequence_decisions(model, routings)
    while ...:
        with reuse_decisions(model, decided):
            step = model(next_token, cache)

Reordered or expanded sequences (beam search) take their rows of each tensor along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from gmoe_ltdr.collect import routed_modules
from gmoe_ltdr.routers.image_level import ImageLevelRouter
from gmoe_ltdr.routing import Routing


def sequence_routers(model: nn.Module) -> dict[str, ImageLevelRouter]:
    """The routers that choose for whole sequences, by the names of their layers."""
    routers = {name: layer.router for name, layer in routed_modules(model).items()}
    return {name: r for name, r in routers.items() if isinstance(r, ImageLevelRouter)}


def sequence_decisions(model: nn.Module, routings: Mapping[str, Routing]) -> dict[str, Tensor]:
    """What each router for whole sequences decided, (B, E) logits by layer name.

    Args:
        model: A model with MoE layers.
        routings: What `collect_routing` gathered of the prompt's forward.
    """
    decided = {}
    for name in sequence_routers(model):
        plan = routings[name]
        assert plan.shape_BL is not None  # such a router has set it
        # all tokens of a sequence have the same logits
        decided[name] = plan.logits_TE.view(*plan.shape_BL, plan.num_experts)[:, 0].detach()
    return decided


@contextmanager
def reuse_decisions(model: nn.Module, decided: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, the named layers' routers decide as before, whatever tokens they see.

    Args:
        model: A model with MoE layers.
        decided: What `sequence_decisions` gave; a row per sequence.
    """

    def hook_of(logits_BE: Tensor) -> Callable[..., Any]:
        def remind(_router: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            tokens_TD, context = inputs
            return tokens_TD, replace(context, decided_logits_BE=logits_BE)

        return remind

    routers = sequence_routers(model) if decided else {}
    handles = [
        routers[name].register_forward_pre_hook(hook_of(logits_BE))
        for name, logits_BE in decided.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
