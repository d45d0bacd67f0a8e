"""Each token takes as many experts as pass their thresholds: DynMoE's top-any routing.

After DynMoE (arXiv 2405.14297). An expert is active for a token when the sigmoid of their cosine
exceeds the sigmoid of the expert's learned threshold. Which of the allocated experts exist, the
pool, changes while training: `gmoe_ltdr.expert_pool` does that between steps, from what the router
counts here.

Shapes: B images, L tokens per image, T = B * L, D width, E experts allocated.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmoe_ltdr.routers.base import (
    Router,
    check_router_options,
    is_recomputed,
    register_router,
)
from gmoe_ltdr.routers.token_choice import expert_weights
from gmoe_ltdr.routing import CLOSED, Modality, Routing, TokenContext, expert_rank
from gmoe_ltdr.spec import MoESpec

DynamicLoss = Literal["diversity", "gshard", "deepspeed"]

_ROUTER_OPTIONS = {
    "initial_experts": None,
    "cycle": None,
    "loss": ("diversity", "gshard", "deepspeed"),
    "divide_by": ("sum", "count"),
}


def binary_gates(scores_TE: Tensor, thresholds_E: Tensor) -> Tensor:
    """1 where a score exceeds its expert's threshold, else 0. Float32 (T, E).

    The gradient passes as if the gate were score - threshold, where the gate is 1; nothing passes
    where it is 0.
    """
    margin_TE = scores_TE - thresholds_E
    return torch.where(margin_TE > 0, 1.0 + (margin_TE - margin_TE.detach()), 0.0)


def best_expert_if_none(gates_TE: Tensor, scores_TE: Tensor) -> Tensor:
    """Gates where every token has an expert: its best, where it had none."""
    none_T1 = (gates_TE == 0).all(-1, keepdim=True)
    return torch.where(none_T1 & (expert_rank(scores_TE) == 0), 1.0, gates_TE)


def diversity_loss(expert_embed_DE: Tensor, pool_E: Tensor) -> Tensor:
    """Keeps the directions of the pool's experts apart, and all embeddings short.

    The Frobenius norm of the cosines between different experts of the pool, plus the mean length of
    all embeddings.
    """
    direction_DE = F.normalize(expert_embed_DE, dim=0, eps=1e-12)
    identity_EE = torch.eye(len(pool_E), device=pool_E.device)
    overlap_EE = direction_DE.T @ direction_DE - identity_EE
    in_pool_EE = pool_E.unsqueeze(0) & pool_E.unsqueeze(1)
    diversity = torch.linalg.vector_norm(torch.where(in_pool_EE, overlap_EE, 0.0))
    return diversity + torch.linalg.vector_norm(expert_embed_DE, dim=0).mean()


def gate_balance_loss(
    gates_TE: Tensor, scores_TE: Tensor, real_T: Tensor, pool_size: Tensor
) -> Tensor:
    """The load balancing loss on binary gates: pool size * sum_e f_e g_e.

    f_e is the share of tokens whose best active expert is e, without gradient; g_e its mean gate.
    """
    num_tokens = real_T.sum().clamp(min=1)
    with torch.no_grad():
        active_TE = gates_TE > 0
        best_TE = expert_rank(scores_TE.masked_fill(~active_TE, -torch.inf)) == 0
        first_E = (best_TE & active_TE).sum(0) / num_tokens
    return pool_size * (first_E * gates_TE.sum(0) / num_tokens).sum()


def gate_efficiency_loss(gates_TE: Tensor, real_T: Tensor) -> Tensor:
    """What DynMoE's language code adds to the diversity loss: balance over the tokens that have an
    expert, E * sum_e (share of them that use e) * (mean weight of e), plus the mean gate."""
    num_experts = gates_TE.shape[1]
    per_token_T1 = gates_TE.sum(-1, keepdim=True)
    num_used = (per_token_T1 > 0).sum().clamp(min=1)
    share_E = (gates_TE > 0).sum(0) / num_used
    weight_E = (gates_TE / per_token_T1.clamp(min=1.0)).sum(0) / num_used
    mean_gate = gates_TE.sum() / (real_T.sum() * num_experts).clamp(min=1)
    return num_experts * (share_E * weight_E).sum() + mean_gate


class Activity(nn.Module):
    """Counts of what training tokens did with the experts, as buffers.

    Attributes:
        num_tokens: int64, tokens seen.
        activations: int64 (E,), how many of them each expert was active for.
        unserved: float32 (D,), sum of the tokens that no expert was active for.
    """

    num_tokens: Tensor
    activations: Tensor
    unserved: Tensor

    def __init__(self, dim: int, num_experts: int):
        super().__init__()
        self.register_buffer("num_tokens", torch.tensor(0))
        self.register_buffer("activations", torch.zeros(num_experts, dtype=torch.int64))
        self.register_buffer("unserved", torch.zeros(dim))

    @torch.no_grad()
    def add_(self, tokens_TD: Tensor, mask_TE: Tensor, real_T: Tensor) -> None:
        self.num_tokens += real_T.sum()
        self.activations += mask_TE.sum(0)
        unserved_T1 = (real_T & ~mask_TE.any(-1)).unsqueeze(-1)
        self.unserved += torch.where(unserved_T1, tokens_TD, 0.0).sum(0)

    @torch.no_grad()
    def reset_(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()


@register_router("dynamic")
class DynamicRouter(Router):
    """Cosine scores, a threshold per expert, as many experts as exceed theirs.

    In training a token without an active expert gets none; in evaluation it gets its best one. No
    noise, no capacity. `MoESpec.num_experts` experts are allocated, `initial_experts` of them exist
    at the start. `MoESpec.balance_weight` is the weight of the router's own loss.

    `MoESpec.router_options` understood here: `initial_experts` (all), `cycle` (steps between two
    changes of the pool, 1; 0 never changes it; see `gmoe_ltdr.expert_pool`), `loss` ("diversity",
    DynMoE's paper; "gshard", what its vision runs trained with; "deepspeed", what its language code
    adds), `divide_by` ("sum" normalises gates through their sum as its vision code does, "count"
    takes the number of active experts as a constant as its paper does: equal weights, another
    gradient), and those of the losses.

    Attributes:
        pool: bool (E,), which experts exist.
        steps: int64, training steps that `update_expert_pools_` has seen.
        this_step, recorded: Activity in the step under way, and in earlier ones of this cycle.
    """

    pool: Tensor
    steps: Tensor

    def __init__(self, dim: int, spec: MoESpec):
        super().__init__(dim, spec)
        initial = _checked_initial_experts(spec)
        embed_ED = nn.init.orthogonal_(torch.empty(spec.num_experts, dim))
        self.expert_embed = nn.Parameter(embed_ED.T.contiguous())
        self.thresholds = nn.Parameter(torch.zeros(spec.num_experts))
        self.register_buffer("pool", torch.arange(spec.num_experts) < initial)
        self.register_buffer("steps", torch.tensor(0))
        self.this_step = Activity(dim, spec.num_experts)
        self.recorded = Activity(dim, spec.num_experts)

    @property
    def cycle(self) -> int:
        cycle: int = self.spec.router_options.get("cycle", 1)
        return cycle

    def forward(self, tokens_TD: Tensor, context: TokenContext) -> Routing:
        modality_BL = context.modality_BL
        modality_T = modality_BL.reshape(-1)
        real_T = modality_T != int(Modality.PADDING)
        with torch.autocast(tokens_TD.device.type, enabled=False):
            tokens_TD = tokens_TD.float()
            cosine_TE = F.normalize(tokens_TD, dim=1, eps=1e-12) @ F.normalize(
                self.expert_embed.float(), dim=0, eps=1e-12
            )
            scores_TE = torch.where(self.pool, cosine_TE.sigmoid(), 0.0)
            gates_TE = binary_gates(scores_TE, self.thresholds.float().sigmoid())
            if not self.training:
                gates_TE = best_expert_if_none(gates_TE, scores_TE)
            gates_TE = torch.where(real_T.unsqueeze(-1), gates_TE, 0.0)
            mask_TE = gates_TE > 0
            if self.training and self.cycle and not is_recomputed():
                self.this_step.add_(tokens_TD, mask_TE, real_T)
            logits_TE = torch.where(self.pool, cosine_TE, CLOSED)
            return Routing(
                logits_TE=logits_TE,
                probs_TE=logits_TE.softmax(-1),
                dispatch_mask_TE=mask_TE,
                combine_weights_TE=self._weights(gates_TE, mask_TE),
                modality_T=modality_T,
                tail_mask_T=torch.zeros_like(real_T),
                shape_BL=(modality_BL.shape[0], modality_BL.shape[1]),
                router_losses=self._losses(gates_TE, scores_TE, real_T) if self.training else {},
            )

    def _weights(self, gates_TE: Tensor, mask_TE: Tensor) -> Tensor:
        if self.spec.router_options.get("divide_by", "sum") == "count":
            return gates_TE / mask_TE.sum(-1, keepdim=True).clamp(min=1)
        return expert_weights(gates_TE, mask_TE, self.spec.weighting)

    def _losses(self, gates_TE: Tensor, scores_TE: Tensor, real_T: Tensor) -> dict[str, Tensor]:
        kind = self.spec.router_options.get("loss", "diversity")
        if kind == "gshard":
            loss = gate_balance_loss(gates_TE, scores_TE, real_T, self.pool.sum())
        else:
            loss = diversity_loss(self.expert_embed.float(), self.pool)
        if kind == "deepspeed":
            loss = loss + gate_efficiency_loss(gates_TE, real_T)
        return {f"{kind}_loss": self.spec.balance_weight * loss}


def _checked_initial_experts(spec: MoESpec) -> int:
    """Checks the options. Returns how many experts exist at the start."""
    check_router_options(spec, _ROUTER_OPTIONS)
    if spec.capacity_factor is not None:
        raise ValueError(
            f"router 'dynamic' drops nothing, but capacity_factor={spec.capacity_factor}; leave it "
            "at None"
        )
    cycle = spec.router_options.get("cycle", 1)
    if not isinstance(cycle, int) or cycle < 0:
        raise ValueError(
            f"router_options['cycle']={cycle!r} must be a number of steps; 0 never changes the pool"
        )
    initial = spec.router_options.get("initial_experts", spec.num_experts)
    if not isinstance(initial, int) or not 1 <= initial <= spec.num_experts:
        raise ValueError(
            f"router_options['initial_experts']={initial!r} must lie between 1 and "
            f"num_experts={spec.num_experts}, the experts that are allocated"
        )
    return initial
