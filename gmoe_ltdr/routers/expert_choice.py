"""Each expert chooses its tokens, equally many: LTDR's "Dynamic" variant (v2, table XVII).

As in expert-choice routing (arXiv 2202.09368), an expert takes the tokens that give it the highest
probabilities, so loads are equal without any balancing, and a token may be taken by all experts or
by none. With `experts_per_token` 3 an expert takes ceil(3 T / E) of T tokens.

An expert that chooses among all tokens of a batch makes predictions depend on batch mates, so in
evaluation it chooses among the tokens of each image. In a language model it looks ahead: what a
token is given depends on later ones.

Shapes: B images, L tokens per image, T = B * L, E experts; S sets of M tokens each: either the
images, or the batch as one set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gmoe_ltdr.gates import GATES
from gmoe_ltdr.routers.base import Router, check_router_options, register_router
from gmoe_ltdr.routers.token_choice import expert_weights
from gmoe_ltdr.routing import Modality, Routing, TokenContext, place_in_row
from gmoe_ltdr.spec import MoESpec

Scope = Literal["batch", "image"]
_EXPERTS_PER_TOKEN = 3


@torch.no_grad()
def chosen_by_experts(probs_SME: Tensor, real_SM: Tensor, experts_per_token: float) -> Tensor:
    """Which tokens each expert takes: the same number of each set, the best. Bool (S, M, E).

    Args:
        probs_SME: Routing probabilities; of equal ones the lower index wins.
        real_SM: Bool, the tokens to choose from.
        experts_per_token: Mean number of experts that take a token. An expert takes
            ceil(experts_per_token * tokens / E) of a set, but no token twice.
    """
    num_experts = probs_SME.shape[-1]
    num_real_S = real_SM.sum(1).double()
    # an epsilon keeps a whole number whole that comes out as 2.0000000001
    quota_S = (num_real_S * experts_per_token / num_experts - 1e-9).ceil()
    quota_S = torch.minimum(quota_S, num_real_S)
    scores_SME = probs_SME.masked_fill(~real_SM.unsqueeze(-1), -1.0)
    place_SME = place_in_row(scores_SME.transpose(1, 2)).transpose(1, 2)
    return (real_SM.unsqueeze(-1) & (place_SME < quota_S.view(-1, 1, 1))).contiguous()


@register_router("expert_choice")
class ExpertChoiceRouter(Router):
    """Gate, noise, the experts' choice, weights. Nothing is dropped.

    Looks at `gate`, `weighting` and `noise_std` of the spec. Vision tokens that are taken by more
    than `top_k` experts are its tail tokens.

    `MoESpec.router_options` understood here: `experts_per_token` (3), `scope` ("batch": an expert
    chooses among all tokens of this forward and rank; "image": among those of each image) and
    `eval_scope` ("image"), and those of the losses.
    """

    options: Mapping[str, Sequence[Any] | None] = {
        "experts_per_token": None,
        "scope": ("batch", "image"),
        "eval_scope": ("image", "batch"),
    }

    def __init__(self, dim: int, spec: MoESpec):
        super().__init__(dim, spec)
        check_router_options(spec, self.options)
        if spec.capacity_factor is not None:
            raise ValueError(
                "router 'expert_choice' gives every expert equally many tokens, but "
                f"capacity_factor={spec.capacity_factor}; leave it at None"
            )
        mean = spec.router_options.get("experts_per_token", _EXPERTS_PER_TOKEN)
        if isinstance(mean, bool) or not isinstance(mean, (int, float)) or not mean > 0:
            raise ValueError(f"router_options['experts_per_token']={mean!r} must be above 0")
        self.experts_per_token = float(mean)
        self.gate = GATES[spec.gate](dim, spec.num_experts)

    def forward(self, tokens_TD: Tensor, context: TokenContext) -> Routing:
        spec, modality_BL = self.spec, context.modality_BL
        modality_T = modality_BL.reshape(-1)
        real_BL = modality_BL != int(Modality.PADDING)
        with torch.autocast(tokens_TD.device.type, enabled=False):
            logits_TE = self.gate(tokens_TD)
            probs_TE = selection_probs_TE = logits_TE.softmax(-1)
            noisy_TE = None
            if self.training and spec.noise_std > 0:
                std = spec.noise_std / spec.num_experts
                noisy_TE = logits_TE + torch.randn_like(logits_TE) * std
                selection_probs_TE = noisy_TE.softmax(-1)
            real_SM = real_BL if self._scope() == "image" else real_BL.reshape(1, -1)
            probs_SME = selection_probs_TE.view(*real_SM.shape, spec.num_experts)
            mask_TE = chosen_by_experts(probs_SME, real_SM, self.experts_per_token)
            mask_TE = mask_TE.view(logits_TE.shape)
            is_vision_T = modality_T == int(Modality.VISION)
            return Routing(
                logits_TE=logits_TE,
                probs_TE=probs_TE,
                dispatch_mask_TE=mask_TE,
                combine_weights_TE=expert_weights(selection_probs_TE, mask_TE, spec.weighting),
                modality_T=modality_T,
                tail_mask_T=is_vision_T & (mask_TE.sum(-1) > spec.top_k),
                noisy_logits_TE=noisy_TE,
                shape_BL=(modality_BL.shape[0], modality_BL.shape[1]),
            )

    def _scope(self) -> Scope:
        options = self.spec.router_options
        if self.training:
            training_scope: Scope = options.get("scope", "batch")
            return training_scope
        eval_scope: Scope = options.get("eval_scope", "image")
        return eval_scope
