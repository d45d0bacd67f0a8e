"""Balance losses: pure functions of a `Routing`.

Shapes: T tokens, E experts. `tokens` chooses the tokens a loss looks at; None means all that are
not padding. With no token chosen, a loss is a zero that stays connected to the graph.

In distributed training a loss looks at the tokens of its own rank, unless it is given a `group`:
then at those of all its ranks, whose counts and probabilities are added up. Its gradient is then
that of the sum of the ranks' (equal) losses, so that averaging over ranks, as DDP does, gives the
gradient that one process with all tokens would compute.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from gmoe_ltdr.routing import Modality, Routing, expert_rank

if TYPE_CHECKING:
    from gmoe_ltdr.spec import MoESpec


def load_balancing_loss(
    routing: Routing,
    tokens: Tensor | None = None,
    *,
    count: Literal["first", "all"] = "first",
    scale: Literal["experts", "none"] = "experts",
    group: ProcessGroup | None = None,
) -> Tensor:
    """E * sum_e f_e p_e over the chosen tokens (LTDR Eq. 8; Switch = GShard form).

    f_e is expert e's share of the tokens' choices, without gradient; p_e its mean clean
    probability.
    1 at perfect balance, E when all tokens choose one expert.

    Args:
        routing: The plan; choices are counted before capacity.
        tokens: Bool (T,), the tokens to balance; for LTDR the language tokens (Eq. 10).
        count: Only first choices, or all k choices divided by their number.
        scale: "none" leaves the factor E out, as Eq. 10 is printed.
        group: Ranks whose tokens are taken together.
    """
    tokens_T = _default_tokens(routing) if tokens is None else tokens
    num_tokens = _over_ranks(tokens_T.sum(), group)
    with torch.no_grad():
        if count == "first":
            chosen_TE = expert_rank(routing.selection_logits_TE) == 0
        else:
            chosen_TE = routing.selected_mask_TE
        chosen_TE = chosen_TE & tokens_T.unsqueeze(-1)
        count_E = _over_ranks(chosen_TE.sum(0), group)
        share_E = count_E / count_E.sum().clamp(min=1)
    # where() and not a product: an unchosen token may hold NaN
    mean_prob_E = torch.where(tokens_T.unsqueeze(-1), routing.probs_TE, 0.0).sum(0)
    mean_prob_E = _over_ranks(mean_prob_E, group) / num_tokens.clamp(min=1)
    loss = (share_E * mean_prob_E).sum()
    return loss * routing.num_experts if scale == "experts" else loss


def importance_loss(
    routing: Routing,
    tokens: Tensor | None = None,
    *,
    unbiased: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Squared coefficient of variation of the experts' summed clean probabilities (V-MoE).

    Args:
        routing: The plan.
        tokens: Bool (T,).
        unbiased: Sample variance, as Tutel takes it; V-MoE takes the population's.
        group: Ranks whose tokens are taken together.
    """
    tokens_T = _default_tokens(routing) if tokens is None else tokens
    importance_E = torch.where(tokens_T.unsqueeze(-1), routing.probs_TE, 0.0).sum(0)
    return _squared_variation(_over_ranks(importance_E, group), unbiased)


def load_loss(
    routing: Routing,
    tokens: Tensor | None = None,
    *,
    top_k: int,
    noise_std: float,
    variant: Literal["vmoe", "tutel"] = "vmoe",
    unbiased: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Squared coefficient of variation of the experts' expected loads under gate noise (V-MoE).

    Args:
        routing: The plan; its noisy logits give each token's threshold, the k-th largest.
        tokens: Bool (T,).
        top_k: k.
        noise_std: Gate noise of the spec; sigma is noise_std / E.
        variant: "vmoe" compares clean logits with the threshold; "tutel" compares clean
            *probabilities* with it, which is what GMoE was trained with.
        unbiased: Sample variance, as Tutel takes it.
        group: Ranks whose tokens are taken together.

    Raises:
        ValueError: No gate noise: the expected load is then undefined.
    """
    if noise_std <= 0:
        raise ValueError(f"load_loss needs gate noise, but noise_std={noise_std}")
    tokens_T = _default_tokens(routing) if tokens is None else tokens
    noisy_TE = routing.selection_logits_TE
    chosen_TE = expert_rank(noisy_TE) == top_k - 1
    threshold_T1 = torch.where(chosen_TE, noisy_TE, 0.0).sum(-1, keepdim=True)
    clean_TE = routing.logits_TE if variant == "vmoe" else routing.probs_TE
    sigma = noise_std / routing.num_experts
    probability_TE = 0.5 * (1 + torch.erf((clean_TE - threshold_T1) / (sigma * math.sqrt(2.0))))
    load_E = torch.where(tokens_T.unsqueeze(-1), probability_TE, 0.0).sum(0)
    return _squared_variation(_over_ranks(load_E, group), unbiased)


def importance_load_loss(
    routing: Routing,
    tokens: Tensor | None = None,
    *,
    top_k: int,
    noise_std: float,
    variant: Literal["vmoe", "tutel"] = "vmoe",
    unbiased: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor:
    """(importance + load) / 2: what GMoE trains with. Importance alone without gate noise."""
    importance = importance_loss(routing, tokens, unbiased=unbiased, group=group)
    if noise_std <= 0:
        return importance
    load = load_loss(
        routing,
        tokens,
        top_k=top_k,
        noise_std=noise_std,
        variant=variant,
        unbiased=unbiased,
        group=group,
    )
    return (importance + load) / 2


def router_z_loss(routing: Routing, tokens: Tensor | None = None) -> Tensor:
    """Mean squared log-partition of the clean logits (ST-MoE), which keeps logits small."""
    tokens_T = _default_tokens(routing) if tokens is None else tokens
    z_T = routing.logits_TE.logsumexp(-1).square()
    return torch.where(tokens_T, z_T, 0.0).sum() / tokens_T.sum().clamp(min=1)


def balance_loss(routings: Mapping[str, Routing] | Iterable[Routing], spec: MoESpec) -> Tensor:
    """What a training step adds to its task loss: weight * sum of the layers' balance losses.

    Losses that a router has of its own (`Routing.router_losses`) are included.

    For LTDR in a plain ViT there is nothing to balance (every token is a vision token), and the
    result is a zero that is connected to the graph, so that distributed training finds gradients.
    Where a router keeps groups of experts for some tokens each, every group is balanced by itself,
    over its own experts.

    Args:
        routings: What `collect_routing` gathered.
        spec: Says which loss, over which modalities, with which weight. When
            `router_options["balance_weights"]` gives each modality its own weight, each modality is
            balanced by itself; otherwise all balanced tokens are pooled. With
            `router_options["balance_scope"]` "global", the tokens of all ranks are; every rank
            calls this then.

    Raises:
        ValueError: No routing was collected.
    """
    plans = list(routings.values() if isinstance(routings, Mapping) else routings)
    if not plans:
        raise ValueError(
            "balance_loss got no routing: run the model inside `with collect_routing(model) as "
            "routings:` and check that it has MoE layers"
        )
    total = torch.stack([_connected_zero(plan) for plan in plans]).sum()
    for plan in plans:
        for loss in plan.router_losses.values():
            total = total + loss
    if spec.balance == "none":
        return total
    per_modality = spec.router_options.get("balance_weights")
    for part in _balanced_parts(plans):
        if per_modality is None:
            tokens_T = part.of(*spec.balanced_modalities)
            total = total + spec.balance_weight * _layer_loss(part, tokens_T, spec)
            continue
        for name, weight in per_modality.items():
            tokens_T = part.of(Modality[name.upper()])
            total = total + weight * _layer_loss(part, tokens_T, spec)
    return total


def _connected_zero(plan: Routing) -> Tensor:
    # padding may hold NaN, and zero times NaN is NaN
    real_T1 = _default_tokens(plan).unsqueeze(-1)
    return 0.0 * torch.where(real_T1, plan.logits_TE, 0.0).sum()


def _balanced_parts(plans: Iterable[Routing]) -> Iterator[Routing]:
    for plan in plans:
        if plan.balance_groups is None:
            yield plan
        else:
            yield from (plan.of_group(group) for group in plan.balance_groups)


def _layer_loss(routing: Routing, tokens_T: Tensor, spec: MoESpec) -> Tensor:
    group = None
    if spec.router_options.get("balance_scope") == "global" and _is_distributed():
        group = torch.distributed.group.WORLD
    if spec.balance == "switch":
        return load_balancing_loss(
            routing,
            tokens_T,
            count=spec.router_options.get("balance_count", "first"),
            scale=spec.router_options.get("balance_scale", "experts"),
            group=group,
        )
    parity = spec.balance == "importance_load_tutel"
    return importance_load_loss(
        routing,
        tokens_T,
        top_k=spec.top_k,
        noise_std=spec.noise_std,
        variant="tutel" if parity else "vmoe",
        unbiased=parity,
        group=group,
    )


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _over_ranks(amount: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over the ranks; the amount itself without a group."""
    if group is None:
        return amount
    total: Tensor = _SumOverRanks.apply(amount, group)
    return total


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, amount: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = amount.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


def _squared_variation(amount_E: Tensor, unbiased: bool) -> Tensor:
    """Variance over squared mean. Zero for one expert, whose sample variance would be NaN."""
    if amount_E.numel() == 1:
        return 0.0 * amount_E.sum()
    return amount_E.var(unbiased=unbiased) / (amount_E.mean().square() + 1e-10)


def _default_tokens(routing: Routing) -> Tensor:
    return ~routing.of(Modality.PADDING)
