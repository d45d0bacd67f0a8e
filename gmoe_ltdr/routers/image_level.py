"""Routers that decide once per image: all its tokens get the same experts and weights.

In a language model one sequence takes the place of one image. Routers that choose by the image's
tokens (INSTRUCT) or by what else is known of it (CLUSTER) define `image_logits`.

Shapes: B images, L tokens per image, T = B * L, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gmoe_ltdr.capacity import CAPACITY_OPTIONS, limit_as_specified
from gmoe_ltdr.routers.base import Router, check_router_options
from gmoe_ltdr.routers.token_choice import Weighting, expert_weights
from gmoe_ltdr.routing import Modality, Routing, TokenContext, expert_rank
from gmoe_ltdr.spec import MoESpec


def image_means(tokens_TD: Tensor, chosen_BL: Tensor) -> Tensor:
    """Mean of each image's chosen tokens, float32 (B, D); zero where none is chosen.

    Args:
        tokens_TD: Tokens, image by image.
        chosen_BL: Bool.
    """
    tokens_BLD = tokens_TD.float().view(*chosen_BL.shape, tokens_TD.shape[-1])
    # where() and not a product with zero: an unchosen token may hold NaN
    sum_BD = torch.where(chosen_BL.unsqueeze(-1), tokens_BLD, 0.0).sum(1)
    return sum_BD / chosen_BL.sum(1, keepdim=True).clamp(min=1)


def route_images(
    logits_BE: Tensor,
    modality_BL: Tensor,
    *,
    top_k: int,
    weighting: Weighting,
    noise_BE: Tensor | None = None,
) -> Routing:
    """Every token of an image goes to the image's `top_k` experts.

    Args:
        logits_BE: Clean logits of each image, float32.
        modality_BL: Values of `Modality`; padding is not dispatched.
        top_k: Experts per image.
        weighting: How chosen experts are weighted, see `MoESpec.weighting`.
        noise_BE: Gate noise; selection and weights see it.
    """
    selection_BE = logits_BE if noise_BE is None else logits_BE + noise_BE
    mask_BE = expert_rank(selection_BE) < top_k
    return spread_over_tokens(
        modality_BL,
        logits_BE=logits_BE,
        mask_BE=mask_BE,
        weights_BE=expert_weights(selection_BE.softmax(-1), mask_BE, weighting),
        noisy_logits_BE=None if noise_BE is None else selection_BE,
        max_experts_per_token=top_k,
    )


def spread_over_tokens(
    modality_BL: Tensor,
    *,
    logits_BE: Tensor,
    mask_BE: Tensor,
    weights_BE: Tensor,
    noisy_logits_BE: Tensor | None = None,
    max_experts_per_token: int,
) -> Routing:
    """The plan in which each image's tokens, but for padding, do what is decided for the image."""
    batch, length = modality_BL.shape

    def spread(value_BE: Tensor) -> Tensor:
        num_experts = value_BE.shape[-1]
        return value_BE.unsqueeze(1).expand(-1, length, -1).reshape(-1, num_experts)

    modality_T = modality_BL.reshape(-1)
    real_T1 = (modality_T != int(Modality.PADDING)).unsqueeze(-1)
    logits_TE = spread(logits_BE)
    return Routing(
        logits_TE=logits_TE,
        probs_TE=logits_TE.softmax(-1),
        dispatch_mask_TE=spread(mask_BE) & real_T1,
        combine_weights_TE=spread(weights_BE) * real_T1,
        modality_T=modality_T,
        tail_mask_T=torch.zeros_like(modality_T, dtype=torch.bool),
        noisy_logits_TE=None if noisy_logits_BE is None else spread(noisy_logits_BE),
        shape_BL=(batch, length),
        max_experts_per_token=max_experts_per_token,
    )


class ImageLevelRouter(Router):
    """Logits per image, noise, top-k, weights, capacity.

    Looks at `top_k`, `gate`, `weighting`, `noise_std` and `capacity_factor` of the spec; there are
    no tail tokens.
    """

    options: Mapping[str, Sequence[Any] | None] = CAPACITY_OPTIONS
    temperature = 1.0

    def __init__(self, dim: int, spec: MoESpec):
        super().__init__(dim, spec)
        check_router_options(spec, self.options)

    def image_logits(self, tokens_TD: Tensor, context: TokenContext) -> Tensor:
        """Scores of the experts for each image, before the temperature divides them. (B, E)."""
        raise NotImplementedError(f"{type(self).__name__} does not define image_logits")

    def decide(self, logits_BE: Tensor, context: TokenContext, noise_BE: Tensor | None) -> Routing:
        """The plan that logits lead to."""
        return route_images(
            logits_BE,
            context.modality_BL,
            top_k=self.spec.top_k,
            weighting=self.spec.weighting,
            noise_BE=noise_BE,
        )

    def forward(self, tokens_TD: Tensor, context: TokenContext) -> Routing:
        spec = self.spec
        with torch.autocast(tokens_TD.device.type, enabled=False):
            logits_BE = context.decided_logits_BE
            if logits_BE is None:
                logits_BE = self.image_logits(tokens_TD, context) / self.temperature
            noise_BE = None
            if self.training and spec.noise_std > 0:
                std = spec.noise_std / spec.num_experts / self.temperature
                noise_BE = torch.randn_like(logits_BE) * std
            routing = self.decide(logits_BE, context, noise_BE)
            return limit_as_specified(routing, spec, training=self.training)
