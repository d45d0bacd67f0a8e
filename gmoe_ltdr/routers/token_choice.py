"""Each token chooses its experts: GMoE, LTDR and LTDR's ablations are settings of this router.

The paper's two modules are two arguments of `route`. Vision-specific dynamic expert activation
(VsDEA, "EEA" in v1) is `tail_top_k` and `tail_rule`; the modality-specific distribution-aware
router (MsDaR, "DAR") is not here at all: it is which tokens the balance loss looks at
(`MoESpec.balanced_modalities`).

Shapes: B images, L tokens per image, T = B * L, D width, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmoe_ltdr.capacity import CAPACITY_OPTIONS, limit_as_specified
from gmoe_ltdr.gates import GATES
from gmoe_ltdr.learned_threshold import let_threshold_learn
from gmoe_ltdr.routers.base import (
    Router,
    check_router_options,
    is_recomputed,
    register_router,
)
from gmoe_ltdr.routing import CLOSED, Modality, Routing, TokenContext, expert_rank
from gmoe_ltdr.sharpening import SHARPENING_OPTIONS, Sharpening
from gmoe_ltdr.spec import MoESpec
from gmoe_ltdr.tail import (
    Scope,
    TailRule,
    compared_tokens,
    mean_rpv,
    routing_probability_variance,
    tail_tokens,
)

Weighting = Literal["renormalize", "raw", "softmax_of_probs"]

_EMA_DECAY = 0.99


def route(
    logits_TE: Tensor,
    modality_BL: Tensor,
    *,
    top_k: int,
    tail_top_k: int,
    tail_rule: TailRule,
    weighting: Weighting,
    noise_TE: Tensor | None = None,
    scope: Scope | None = None,
    is_cls_BL: Tensor | None = None,
    attention_BL: Tensor | None = None,
    threshold: Tensor | None = None,
    gumbel_TE: Tensor | None = None,
) -> Routing:
    """One LTDR routing decision (Eq. 6, 7, 9, 11, 12), as a pure function.

    Args:
        logits_TE: Clean gate logits, float32; `CLOSED` where a token cannot choose.
        modality_BL: Values of `Modality`; padding is not dispatched.
        top_k: Experts of an ordinary token.
        tail_top_k: Experts of a tail token; equal to `top_k`, nothing is tail-specific.
        tail_rule: Which tokens are tail tokens.
        weighting: How chosen experts are weighted, see `MoESpec.weighting`.
        noise_TE: Gate noise; selection and weights see it, the tail rule does not (unless it says
            `source="noisy"`).
        scope: Overrides `tail_rule.scope`.
        is_cls_BL: Class and register tokens, for `tail_rule.cls`.
        attention_BL: For `TailRule(kind="attention")`.
        threshold: Ready threshold, instead of the mean over this call's tokens.
        gumbel_TE: Gumbel noise; the second expert is then the best of the rest under
            logits + noise, as in DeepSpeed 0.9.5. For top_k = 2.
    """
    probs_TE = logits_TE.softmax(-1)
    selection_TE = logits_TE if noise_TE is None else logits_TE + noise_TE
    selection_probs_TE = probs_TE if noise_TE is None else selection_TE.softmax(-1)

    with torch.no_grad():
        modality_T = modality_BL.reshape(-1)
        candidates_BL = modality_BL == int(tail_rule.candidate_modality)
        if tail_top_k > top_k and tail_rule.kind != "none":
            rpv_TE = probs_TE if tail_rule.source == "clean" else selection_probs_TE
            rpv_T = routing_probability_variance(rpv_TE, unbiased=tail_rule.unbiased)
            tail_T = tail_tokens(
                rpv_T.view(modality_BL.shape),
                candidates_BL,
                tail_rule,
                scope=scope,
                is_cls_BL=is_cls_BL,
                attention_BL=attention_BL,
                threshold=threshold,
            ).reshape(-1)
        else:
            tail_T = torch.zeros_like(modality_T, dtype=torch.bool)

        rank_TE = choice_rank(selection_TE, gumbel_TE)
        quota_T = torch.where(tail_T, tail_top_k, top_k)
        quota_T = torch.where(modality_T == int(Modality.PADDING), 0, quota_T)
        mask_TE = (rank_TE < quota_T.unsqueeze(-1)) & (logits_TE > CLOSED / 2)

    return Routing(
        logits_TE=logits_TE,
        probs_TE=probs_TE,
        dispatch_mask_TE=mask_TE,
        combine_weights_TE=expert_weights(selection_probs_TE, mask_TE, weighting),
        modality_T=modality_T,
        tail_mask_T=tail_T,
        noisy_logits_TE=None if noise_TE is None else selection_TE,
        shape_BL=(modality_BL.shape[0], modality_BL.shape[1]),
        max_experts_per_token=max(top_k, tail_top_k),
    )


@torch.no_grad()
def choice_rank(selection_TE: Tensor, gumbel_TE: Tensor | None = None) -> Tensor:
    """Place of every expert among its token's choices, 0 first; with noise the second is drawn."""
    rank_TE = expert_rank(selection_TE)
    if gumbel_TE is None:
        return rank_TE
    rest_TE = (selection_TE + gumbel_TE).masked_fill(rank_TE == 0, -torch.inf)
    second_TE = F.one_hot(rest_TE.argmax(-1), rest_TE.shape[-1]).bool()
    second_rank_T1 = torch.where(second_TE, rank_TE, 0).sum(-1, keepdim=True)
    moved_TE = (rank_TE >= 1) & (rank_TE < second_rank_T1)
    return torch.where(second_TE, 1, rank_TE + moved_TE)


def expert_weights(probs_TE: Tensor, mask_TE: Tensor, weighting: Weighting) -> Tensor:
    """Combine weights of the chosen experts, zero elsewhere. Float32 (T, E).

    A token with one expert keeps its raw probability whatever the weighting: a constant 1 would
    leave its router without gradient.
    """
    raw_TE = probs_TE * mask_TE
    if weighting == "raw":
        return raw_TE
    if weighting == "renormalize":
        shared_TE = raw_TE / raw_TE.sum(-1, keepdim=True).clamp(min=torch.finfo(raw_TE.dtype).tiny)
    else:
        exp_TE = probs_TE.exp() * mask_TE
        shared_TE = exp_TE / exp_TE.sum(-1, keepdim=True).clamp(min=1.0)
    several_T1 = mask_TE.sum(-1, keepdim=True) > 1
    return torch.where(several_T1, shared_TE, raw_TE)


@register_router("token_choice")
class TokenChoiceRouter(Router):
    """Gate, noise, tail rule, top-k, weights, capacity.

    `MoESpec.router_options` understood here: `second_expert` ("argmax", "gumbel"), `padding`
    ("language" routes and counts padding as language tokens, which DeepSpeed does), `sharpening`
    and `sharpening_strength` (`gmoe_ltdr.sharpening`), those of capacity
    (`gmoe_ltdr.capacity.limit_as_specified`) and of the losses (`gmoe_ltdr.spec.OPTIONS`).
    """

    options: Mapping[str, Sequence[Any] | None] = {
        **CAPACITY_OPTIONS,
        **SHARPENING_OPTIONS,
        "second_expert": ("argmax", "gumbel"),
        "padding": ("exclude", "language"),
    }
    mean_rpv: Tensor  # where one of the rule's scopes is "ema"

    def __init__(self, dim: int, spec: MoESpec):
        super().__init__(dim, spec)
        check_router_options(spec, self.options)
        if spec.router_options.get("second_expert") == "gumbel" and spec.top_k != 2:
            raise ValueError(
                f"second_expert='gumbel' chooses the second of two experts, but top_k={spec.top_k}"
            )
        self.sharpening = Sharpening.of_options(spec.router_options)
        self.gate = GATES[spec.gate](dim, spec.num_experts)
        rule = spec.tail_rule
        self._keeps_running_mean = spec.activates_tail and "ema" in (rule.scope, rule.eval_scope)
        if self._keeps_running_mean:
            # double, as the threshold is compared in double; NaN until the first training batch
            self.register_buffer("mean_rpv", torch.tensor(math.nan, dtype=torch.float64))
        if spec.activates_tail and rule.kind == "learned":
            # softplus(x) = 1: training starts at the paper's rule
            self.threshold_factor = nn.Parameter(torch.tensor(math.log(math.expm1(1.0))))

    def forward(self, tokens_TD: Tensor, context: TokenContext) -> Routing:
        spec, rule = self.spec, self.spec.tail_rule
        if spec.router_options.get("padding") == "language":
            context = replace(context, modality_BL=_padding_as_language(context.modality_BL))
        with torch.autocast(tokens_TD.device.type, enabled=False):
            vision_T = (context.modality_BL == int(Modality.VISION)).reshape(-1)
            logits_TE = self.sharpening.temper(self.score(tokens_TD, context), vision_T)
            noise_TE = self._noise(logits_TE, vision_T) if self.training else None
            gumbel_TE = None
            if spec.router_options.get("second_expert") == "gumbel":
                gumbel_TE = -torch.empty_like(logits_TE).exponential_().log()

            scope = rule.scope if self.training else rule.eval_scope
            tail_on = spec.activates_tail and (self.training or rule.in_eval)
            threshold = None
            if tail_on:
                compared_TE = logits_TE
                if rule.source == "noisy" and noise_TE is not None:
                    compared_TE = logits_TE + noise_TE
                threshold = self._threshold(compared_TE, context, scope)
                if self.training:
                    self._move_running_mean(logits_TE, context)
            routing = route(
                logits_TE,
                context.modality_BL,
                top_k=spec.top_k,
                tail_top_k=spec.resolved_tail_top_k if tail_on else spec.top_k,
                tail_rule=rule,
                weighting=spec.weighting,
                noise_TE=noise_TE,
                scope="batch" if scope == "ema" else scope,
                is_cls_BL=context.is_cls_BL,
                attention_BL=context.attention_BL,
                threshold=None if threshold is None else threshold.detach(),
                gumbel_TE=gumbel_TE,
            )
            if rule.kind == "learned" and threshold is not None and self.training:
                routing = self._let_threshold_learn(routing, threshold, context, gumbel_TE)
            if self.training:
                losses = self.sharpening.losses(routing.probs_TE, vision_T)
                routing = replace(routing, router_losses=losses)
            return limit_as_specified(routing, spec, training=self.training)

    def score(self, tokens_TD: Tensor, context: TokenContext) -> Tensor:
        """Clean logits (T, E)."""
        return self.gate(tokens_TD)

    def _noise(self, logits_TE: Tensor, vision_T: Tensor) -> Tensor | None:
        """Gate noise, and what sharpening adds to it."""
        spec = self.spec
        sharpening_TE = self.sharpening.noise(logits_TE, vision_T)
        if spec.noise_std <= 0:
            return sharpening_TE
        noise_TE = torch.randn_like(logits_TE) * (spec.noise_std / spec.num_experts)
        return noise_TE if sharpening_TE is None else noise_TE + sharpening_TE

    def _threshold(self, compared_TE: Tensor, context: TokenContext, scope: Scope) -> Tensor | None:
        """Thresholds that need the router's state; None where `tail_tokens` computes its own.

        Args:
            compared_TE: The logits whose RPV will be compared with the threshold.
            context: Which tokens are.
            scope: Of the mean.
        """
        rule = self.spec.tail_rule
        running = scope == "ema" and not self.training
        if rule.kind not in ("mean", "learned") or (rule.kind == "mean" and not running):
            return None
        with torch.no_grad():
            mean = self._mean_rpv(compared_TE, context, "image" if running else scope)
            if running:
                # before any training batch: the image's own, which is nothing of its batch mates
                mean = torch.where(self.mean_rpv.isnan(), mean, self.mean_rpv)
        if rule.kind == "learned":
            # without a candidate there is no mean, and nothing to compare with it: a NaN would
            # only spoil the factor's gradient, which is zero then
            return F.softplus(self.threshold_factor) * mean.nan_to_num(0.0)
        return mean

    @torch.no_grad()
    def _move_running_mean(self, logits_TE: Tensor, context: TokenContext) -> None:
        """Let the running mean, where there is one, follow this batch's mean.

        Of clean probabilities whatever `TailRule.source` says: only evaluation reads the running
        mean, and compares RPV without noise with it.
        """
        rule = self.spec.tail_rule
        if not self._keeps_running_mean or is_recomputed():
            return
        scope: Scope = "global" if rule.scope == "global" else "batch"
        mean = self._mean_rpv(logits_TE, context, scope).reshape(())
        moved = _EMA_DECAY * self.mean_rpv + (1 - _EMA_DECAY) * mean
        moved = torch.where(self.mean_rpv.isnan(), mean, moved)
        self.mean_rpv.copy_(torch.where(mean.isnan(), self.mean_rpv, moved))

    def _mean_rpv(self, logits_TE: Tensor, context: TokenContext, scope: Scope) -> Tensor:
        rule = self.spec.tail_rule
        rpv_T = routing_probability_variance(logits_TE.softmax(-1), unbiased=rule.unbiased)
        rpv_BL = rpv_T.view(context.modality_BL.shape)
        return mean_rpv(rpv_BL, _compared_tokens(context, rule), scope=scope)

    def _let_threshold_learn(
        self, routing: Routing, threshold: Tensor, context: TokenContext, gumbel_TE: Tensor | None
    ) -> Routing:
        """Show the threshold how the weights of head and tail tokens differ."""
        spec, rule = self.spec, self.spec.tail_rule
        with torch.no_grad():
            probs_TE = routing.selection_logits_TE.softmax(-1)
            rank_TE = choice_rank(routing.selection_logits_TE, gumbel_TE)
            head_TE, tail_TE = (
                expert_weights(probs_TE, (rank_TE < count) & routing.open_TE, spec.weighting)
                for count in (spec.top_k, spec.resolved_tail_top_k)
            )
            compared_TE = routing.probs_TE if rule.source == "clean" else probs_TE
            rpv_T = routing_probability_variance(compared_TE, unbiased=rule.unbiased)
        return let_threshold_learn(
            routing,
            threshold,
            rule,
            rpv_BL=rpv_T.view(context.modality_BL.shape),
            compared_BL=_compared_tokens(context, rule),
            head_weights_TE=head_TE,
            tail_weights_TE=tail_TE,
        )


def _compared_tokens(context: TokenContext, rule: TailRule) -> Tensor:
    candidates_BL = context.modality_BL == int(rule.candidate_modality)
    return compared_tokens(candidates_BL, context.is_cls_BL, rule)


def _padding_as_language(modality_BL: Tensor) -> Tensor:
    return modality_BL.masked_fill(modality_BL == int(Modality.PADDING), int(Modality.LANGUAGE))
