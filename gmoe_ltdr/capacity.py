"""Expert capacity: how many tokens an expert may take, and which choices are dropped beyond it.

A plan-to-plan function: no dispatcher knows about capacity. Shapes: T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from gmoe_ltdr.routing import Modality, Routing, expert_rank
from gmoe_ltdr.spec import MoESpec

# What `MoESpec.router_options` may say of it, for every router that calls `limit_as_specified`.
CAPACITY_OPTIONS = {
    "eval_capacity": ("none", "batch"),
    "prioritised": (True, False),
    "renormalize_after_capacity": (True, False),
    "capacity_convention": ("tutel", "vmoe", "deepspeed"),
    "min_capacity": None,
}


def expert_capacity(
    num_tokens: Tensor | int,
    num_experts: int,
    top_k: int,
    capacity_factor: float,
    *,
    convention: Literal["tutel", "vmoe", "deepspeed"] = "tutel",
    min_capacity: int = 0,
) -> Tensor:
    """Slots per expert, an int64 scalar. It stays on the device, so that nobody waits for it.

    Args:
        num_tokens: Tokens that are routed; padding is not.
        num_experts: Experts they are routed to.
        top_k: Experts per ordinary token; extra experts of tail tokens do not enlarge the buffers.
        capacity_factor: 1 leaves just enough slots for perfectly balanced routing.
        convention: "tutel" is GMoE's, k * int(cf * ceil(T/E)); "vmoe" is ceil(cf * T * k / E)
            rounded up to a multiple of 4; "deepspeed" is ceil(T/E * k * cf) or `min_capacity`.
        min_capacity: Lower bound, for "deepspeed".

    Raises:
        ValueError: Not a positive factor.
    """
    if capacity_factor <= 0:
        raise ValueError(f"capacity_factor={capacity_factor} must be positive; None drops nothing")
    num_tokens = torch.as_tensor(num_tokens)
    if convention == "tutel":
        share = (num_tokens + num_experts - 1) // num_experts
        return (share.double() * capacity_factor).long() * top_k
    share = num_tokens.double()
    # by a tensor: a GPU divides by a number as it multiplies by its rounded reciprocal
    share = share / torch.full_like(share, num_experts)
    slots = (share * top_k * capacity_factor).ceil().long()
    if convention == "deepspeed":
        return slots.clamp(min=min_capacity)
    return (slots + 3) // 4 * 4


def limit_as_specified(routing: Routing, spec: MoESpec, *, training: bool) -> Routing:
    """The plan within the capacity that a spec asks for; unchanged when it asks for none.

    Options: `prioritised` (batch-prioritised dropping, on), `eval_capacity` ("none": evaluation
    drops nothing, so that an image's logits do not depend on its batch mates; "batch": as in
    training, GMoE read literally), `renormalize_after_capacity` (DeepSpeed), `capacity_convention`
    and `min_capacity`.
    """
    options = spec.router_options
    if spec.capacity_factor is None:
        return routing
    if not training and options.get("eval_capacity", "none") == "none":
        return routing
    capacity = expert_capacity(
        (~routing.of(Modality.PADDING)).sum(),
        spec.num_experts,
        spec.top_k,
        spec.capacity_factor,
        convention=options.get("capacity_convention", "tutel"),
        min_capacity=options.get("min_capacity", 0),
    )
    return limit_to_capacity(
        routing,
        capacity,
        prioritised=options.get("prioritised", True),
        renormalize=options.get("renormalize_after_capacity", False),
    )


def limit_to_capacity(
    routing: Routing,
    capacity: Tensor | int,
    *,
    prioritised: bool = True,
    renormalize: bool = False,
) -> Routing:
    """Drop the choices that find their expert full.

    Slots are filled choice by choice: all first choices, then all second choices, and so on; the
    extra choices of tail tokens form the last levels. A dropped choice contributes nothing; a token
    that lost all its choices leaves the layer as zero.

    Args:
        routing: The plan before capacity.
        capacity: Slots per expert.
        prioritised: Within a level, tokens with the highest top probability first
            (batch-prioritised routing, V-MoE); otherwise in token order.
        renormalize: Weights of the surviving choices sum to 1 again (DeepSpeed). Tutel leaves them.

    Returns:
        A plan whose `requested_mask_TE` is the mask that came in.
    """
    mask_TE = routing.dispatch_mask_TE
    with torch.no_grad():
        slot_TE = _slot(
            mask_TE,
            routing.selection_logits_TE,
            prioritised=prioritised,
            num_levels=routing.max_experts_per_token or mask_TE.shape[1],
        )
        kept_TE = mask_TE & (slot_TE < capacity)
    weights_TE = routing.combine_weights_TE * kept_TE
    if renormalize:
        total_T1 = weights_TE.sum(-1, keepdim=True)
        weights_TE = weights_TE / total_T1.clamp(min=torch.finfo(torch.float32).eps)
    return replace(
        routing,
        dispatch_mask_TE=kept_TE,
        combine_weights_TE=weights_TE,
        requested_mask_TE=routing.selected_mask_TE,
    )


def _slot(mask_TE: Tensor, selection_TE: Tensor, *, prioritised: bool, num_levels: int) -> Tensor:
    """Position of every choice in its expert's queue, int64 (T, E)."""
    num_tokens, num_experts = mask_TE.shape
    # first choice, second choice, ... of each token: its place among the chosen, which is not its
    # place among all when the second expert was drawn
    choice_TE = expert_rank(selection_TE.masked_fill(~mask_TE, -torch.inf))
    if prioritised:
        top_prob_T = selection_TE.softmax(-1).amax(-1)
        order_T = top_prob_T.argsort(descending=True, stable=True)
    else:
        order_T = torch.arange(num_tokens, device=mask_TE.device)
    mask_TE, choice_TE = mask_TE[order_T], choice_TE[order_T]
    slot_TE = torch.zeros_like(choice_TE)
    taken_E = choice_TE.new_zeros(num_experts)
    for level in range(num_levels):
        level_TE = mask_TE & (choice_TE == level)
        # along the contiguous axis, which a GPU scans in parallel
        queue_TE = level_TE.T.contiguous().cumsum(1).T - 1 + taken_E
        slot_TE = torch.where(level_TE, queue_TE, slot_TE)
        taken_E = taken_E + level_TE.sum(0)
    restored_TE = torch.empty_like(slot_TE)
    restored_TE[order_T] = slot_TE
    return restored_TE
