"""Groups of experts: vision and language tokens, or patches and the class token, have experts of
their own (LTDR's table 11).

Shapes: B rows, L tokens per row, T = B * L, D width, E experts of all groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gmoe_ltdr.routers.base import register_router
from gmoe_ltdr.routers.token_choice import TokenChoiceRouter
from gmoe_ltdr.routing import CLOSED, ExpertGroup, Modality, Routing, TokenContext
from gmoe_ltdr.spec import MoESpec


def second_group(context: TokenContext, group_by: str) -> Tensor:
    """Which tokens are of the second group, language or class and register tokens. Bool (T,).

    Raises:
        ValueError: Class tokens are asked for where the context has none.
    """
    if group_by == "modality":
        return (context.modality_BL == int(Modality.LANGUAGE)).reshape(-1)
    if context.is_cls_BL is None:
        raise ValueError(
            "router_options['group_by']='cls' keeps experts for the class token, but this model "
            "has none; use group_by='modality', or a model with a class token"
        )
    return context.is_cls_BL.reshape(-1)


def close_other_groups(logits_TE: Tensor, is_second_T: Tensor, first_size: int) -> Tensor:
    """Logits where a token can choose its group's experts alone: the first ones, or the rest."""
    experts_E = torch.arange(logits_TE.shape[1], device=logits_TE.device)
    is_open_TE = (experts_E >= first_size) == is_second_T.unsqueeze(-1)
    return torch.where(is_open_TE, logits_TE, CLOSED)


@register_router("groups")
class GroupsRouter(TokenChoiceRouter):
    """Token choice within the group of experts that a token's kind has.

    With the linear gate this is one router per group; the cosine gate's projection and scale are
    common to them. Each group's `top_k` is the spec's, and so is its balance weight.

    `MoESpec.router_options` understood here: `group_by` ("modality": vision and language; "cls":
    all other tokens, and class and register tokens), `group_sizes` (experts of the one and of the
    other, halves), `balanced_groups` ("both", or "second": language, or class tokens), and
    `second_expert` and `padding` as in token choice. No capacity: groups differ in size.
    """

    options: Mapping[str, Sequence[Any] | None] = {
        "group_by": ("modality", "cls"),
        "group_sizes": None,
        "balanced_groups": ("both", "second"),
        "second_expert": ("argmax", "gumbel"),
        "padding": ("exclude", "language"),
    }

    def __init__(self, dim: int, spec: MoESpec):
        super().__init__(dim, spec)
        if spec.capacity_factor is not None:
            raise ValueError(
                f"router 'groups' drops no token, but capacity_factor={spec.capacity_factor}; "
                "pass None"
            )
        self.group_by = spec.router_options.get("group_by", "modality")
        self.first_size = _group_sizes(spec)[0]

    def forward(self, tokens_TD: Tensor, context: TokenContext) -> Routing:
        routing = super().forward(tokens_TD, context)
        real_T = ~routing.of(Modality.PADDING)
        # what it can choose says of which group a token is
        is_second_T = routing.open_TE[:, self.first_size]
        groups: tuple[ExpertGroup, ...] = (
            ExpertGroup(real_T & ~is_second_T, range(self.first_size)),
            ExpertGroup(real_T & is_second_T, range(self.first_size, self.spec.num_experts)),
        )
        if self.spec.router_options.get("balanced_groups") == "second":
            groups = groups[1:]
        return replace(routing, balance_groups=groups)

    def score(self, tokens_TD: Tensor, context: TokenContext) -> Tensor:
        is_second_T = second_group(context, self.group_by)
        return close_other_groups(self.gate(tokens_TD), is_second_T, self.first_size)


def _group_sizes(spec: MoESpec) -> tuple[int, int]:
    half = spec.num_experts // 2
    sizes = tuple(spec.router_options.get("group_sizes", (spec.num_experts - half, half)))
    if len(sizes) != 2 or sum(sizes) != spec.num_experts or min(sizes) < spec.top_k:
        raise ValueError(
            f"router_options['group_sizes']={list(sizes)} must be two numbers of at least "
            f"top_k={spec.top_k} that sum to num_experts={spec.num_experts}"
        )
    return sizes
