"""CLUSTER: the cluster of an image's embedding chooses its experts (after MoCLE).

Shapes: B images, L tokens per image, T = B * L, C clusters, D width of the embeddings, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmoe_ltdr.capacity import CAPACITY_OPTIONS
from gmoe_ltdr.clustering import Centroids
from gmoe_ltdr.gates import GATES
from gmoe_ltdr.routers.base import register_router
from gmoe_ltdr.routers.image_level import ImageLevelRouter, spread_over_tokens
from gmoe_ltdr.routers.token_choice import expert_weights
from gmoe_ltdr.routing import Routing, TokenContext, expert_rank
from gmoe_ltdr.spec import MoESpec

# logit of the expert that is not chosen by logits: finite, as losses multiply it by zero
_NEVER = -1e4


@register_router("cluster")
class ClusterRouter(ImageLevelRouter):
    """softmax(gate(table[c]) / temperature) where c is the centroid next to the image's embedding.

    The centroids are frozen, the table starts as a copy of them and is trained. Before the first
    forward, `set_centroids_` gives both to every layer; before each forward the images' embeddings
    come with `gmoe_ltdr.image_info.set_image_info(model, embedding_BD=...)`.

    `MoESpec.router_options`: `num_clusters` (128, at most so many), `embedding_dim` (the width of
    the tokens), `temperature` (1; MoCLE: 0.05), `universal` (False; True: the last expert is no
    choice of the router, it computes every image with weight 1 - max p), and those of capacity and
    losses. The source's gate is "linear".
    """

    options: Mapping[str, Sequence[Any] | None] = {
        **CAPACITY_OPTIONS,
        "num_clusters": None,
        "embedding_dim": None,
        "temperature": None,
        "universal": (True, False),
    }

    def __init__(self, dim: int, spec: MoESpec):
        super().__init__(dim, spec)
        options = spec.router_options
        num_clusters = options.get("num_clusters", 128)
        embedding_dim = options.get("embedding_dim", dim)
        self.temperature = options.get("temperature", 1.0)
        self.num_choices = spec.num_experts - bool(options.get("universal", False))
        if num_clusters < 1 or self.temperature <= 0:
            raise ValueError(
                f"router 'cluster' needs a cluster and a positive temperature, got "
                f"num_clusters={num_clusters} and temperature={self.temperature}"
            )
        if self.num_choices < spec.num_experts and spec.capacity_factor is not None:
            raise ValueError(
                f"capacity_factor={spec.capacity_factor} would keep images from the universal "
                "expert, which computes every one; leave one of them out"
            )
        if spec.top_k > self.num_choices:
            raise ValueError(
                f"top_k={spec.top_k} exceeds the {self.num_choices} experts that are left beside "
                "the universal one; lower top_k or add experts"
            )
        self.clusters = Centroids(num_clusters, embedding_dim)
        self.table = nn.Parameter(torch.zeros(num_clusters, embedding_dim))
        self.gate = GATES[spec.gate](embedding_dim, self.num_choices)

    @torch.no_grad()
    def set_centroids_(self, centroids_CD: Tensor) -> None:
        """Take these centroids, and start the table at them."""
        self.clusters.set_(centroids_CD)
        self.table.copy_(self.clusters.points)

    def image_logits(self, tokens_TD: Tensor, context: TokenContext) -> Tensor:
        if context.embedding_BD is None:
            raise ValueError(
                "router 'cluster' needs an embedding of each image: call set_image_info(model, "
                "embedding_BD=...) before the forward"
            )
        if not self.clusters.is_fitted:
            raise ValueError(
                "router 'cluster' has no centroids: before the first forward, call "
                "router.set_centroids_(fit_kmeans(embeddings, num_clusters)) on every layer"
            )
        return self.gate(self.table[self.clusters(context.embedding_BD)])

    def decide(self, logits_BE: Tensor, context: TokenContext, noise_BE: Tensor | None) -> Routing:
        if self.num_choices == self.spec.num_experts:
            return super().decide(logits_BE, context, noise_BE)
        # a decision that is used again has the universal expert in it already
        logits_BE = logits_BE[:, : self.num_choices]
        selection_BE = logits_BE
        if noise_BE is not None:
            selection_BE = logits_BE + noise_BE[:, : self.num_choices]
        probs_BE = selection_BE.softmax(-1)
        mask_BE = expert_rank(selection_BE) < self.spec.top_k
        weights_BE = expert_weights(probs_BE, mask_BE, self.spec.weighting)
        universal_B1 = 1 - probs_BE.amax(-1, keepdim=True)
        return spread_over_tokens(
            context.modality_BL,
            logits_BE=F.pad(logits_BE, (0, 1), value=_NEVER),
            mask_BE=F.pad(mask_BE, (0, 1), value=True),
            weights_BE=torch.cat([weights_BE, universal_B1], 1),
            noisy_logits_BE=None if noise_BE is None else F.pad(selection_BE, (0, 1), value=_NEVER),
            max_experts_per_token=self.spec.top_k + 1,
        )
