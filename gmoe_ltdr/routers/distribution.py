"""DISTRIBUTION: the cluster of a token is its combination of experts (LTDR v2, named after RIDE).

Shapes: B images, L tokens per image, T = B * L, D width, E experts, C combinations of top_k
experts, one cluster each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gmoe_ltdr.capacity import CAPACITY_OPTIONS, limit_as_specified
from gmoe_ltdr.clustering import Centroids
from gmoe_ltdr.gates import GATES
from gmoe_ltdr.routers.base import Router, check_router_options, register_router
from gmoe_ltdr.routers.token_choice import Weighting, expert_weights
from gmoe_ltdr.routing import Modality, Routing, TokenContext
from gmoe_ltdr.spec import MoESpec

_MOST_CLUSTERS = 1024


def expert_combinations(num_experts: int, top_k: int) -> Tensor:
    """All choices of `top_k` experts in lexicographic order, as a bool mask (C, E) on the CPU."""
    chosen = list(itertools.combinations(range(num_experts), top_k))
    # the CPU by name: a model may be built under another default device, meta included
    mask_CE = torch.zeros(len(chosen), num_experts, dtype=torch.bool, device="cpu")
    return mask_CE.scatter(1, torch.tensor(chosen, device="cpu"), True)


def route_clusters(
    logits_TE: Tensor,
    cluster_T: Tensor,
    modality_BL: Tensor,
    *,
    combinations_CE: Tensor,
    weighting: Weighting,
    noise_TE: Tensor | None = None,
) -> Routing:
    """Every token goes to the experts of its cluster; the gate says with what weights.

    Args:
        logits_TE: Clean gate logits, float32.
        cluster_T: Which combination each token gets, int64.
        modality_BL: Values of `Modality`; padding is not dispatched.
        combinations_CE: What `expert_combinations` gave.
        weighting: How chosen experts are weighted, see `MoESpec.weighting`.
        noise_TE: Gate noise; the weights see it.
    """
    selection_TE = logits_TE if noise_TE is None else logits_TE + noise_TE
    modality_T = modality_BL.reshape(-1)
    real_T1 = (modality_T != int(Modality.PADDING)).unsqueeze(-1)
    mask_TE = combinations_CE[cluster_T] & real_T1
    return Routing(
        logits_TE=logits_TE,
        probs_TE=logits_TE.softmax(-1),
        dispatch_mask_TE=mask_TE,
        combine_weights_TE=expert_weights(selection_TE.softmax(-1), mask_TE, weighting),
        modality_T=modality_T,
        tail_mask_T=torch.zeros_like(modality_T, dtype=torch.bool),
        noisy_logits_TE=None if noise_TE is None else selection_TE,
        shape_BL=(modality_BL.shape[0], modality_BL.shape[1]),
        max_experts_per_token=int(combinations_CE[0].sum()),
    )


@register_router("distribution")
class DistributionRouter(Router):
    """One frozen cluster of tokens per combination of `top_k` experts; weights by an ordinary gate.

    Before the first forward, `set_centroids_` gives every layer its own: see
    `gmoe_ltdr.token_clusters`. Looks at `top_k`, `gate`, `weighting`, `noise_std` (weights only)
    and `capacity_factor`; options are those of capacity and losses.
    """

    options: Mapping[str, Sequence[Any] | None] = CAPACITY_OPTIONS

    def __init__(self, dim: int, spec: MoESpec):
        super().__init__(dim, spec)
        check_router_options(spec, self.options)
        self.num_clusters = math.comb(spec.num_experts, spec.top_k)
        if self.num_clusters > _MOST_CLUSTERS:
            raise ValueError(
                f"router 'distribution' has a cluster for each choice of top_k={spec.top_k} of "
                f"num_experts={spec.num_experts} experts, which are {self.num_clusters}, more than "
                f"{_MOST_CLUSTERS}; lower one of them"
            )
        self.gate = GATES[spec.gate](dim, spec.num_experts)
        self.clusters = Centroids(self.num_clusters, dim)
        # No buffer: no checkpoint holds it, and a loader that builds models on the meta device (as
        # transformers does) would leave a buffer that nobody fills.
        self._combinations_CE = expert_combinations(spec.num_experts, spec.top_k)

    def set_centroids_(self, centroids_CD: Tensor) -> None:
        """Take these centroids, one per combination of experts.

        Raises:
            ValueError: Another number of them.
        """
        if len(centroids_CD) != self.num_clusters:
            raise ValueError(
                f"{len(centroids_CD)} centroids for the {self.num_clusters} combinations of "
                f"{self.spec.top_k} of {self.spec.num_experts} experts"
            )
        self.clusters.set_(centroids_CD)

    def combinations_on(self, device: torch.device) -> Tensor:
        """`expert_combinations` of this layer, on a device; moved there once."""
        if self._combinations_CE.device != device:
            self._combinations_CE = self._combinations_CE.to(device)
        return self._combinations_CE

    def forward(self, tokens_TD: Tensor, context: TokenContext) -> Routing:
        spec = self.spec
        if not self.clusters.is_fitted:
            raise ValueError(
                "router 'distribution' has no centroids: before the first forward, call "
                "gmoe_ltdr.token_clusters.fit_token_clusters_(model, images)"
            )
        with torch.autocast(tokens_TD.device.type, enabled=False):
            logits_TE = self.gate(tokens_TD)
            noise_TE = None
            if self.training and spec.noise_std > 0:
                noise_TE = torch.randn_like(logits_TE) * (spec.noise_std / spec.num_experts)
            with torch.no_grad():
                cluster_T = self.clusters(tokens_TD)
            routing = route_clusters(
                logits_TE,
                cluster_T,
                context.modality_BL,
                combinations_CE=self.combinations_on(tokens_TD.device),
                weighting=spec.weighting,
                noise_TE=noise_TE,
            )
            return limit_as_specified(routing, spec, training=self.training)
