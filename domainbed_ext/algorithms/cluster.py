"""The cluster of an image, as a frozen copy of the network sees it, chooses its experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from domainbed_ext.algorithms.base import register_algorithm
from domainbed_ext.algorithms.fitted import FittedSparseViT
from domainbed_ext.backbones import spec_from_hparams
from domainbed_ext.distributed import on_first_rank
from domainbed_ext.optimization import autocast
from gmoe_ltdr import moe_layers
from gmoe_ltdr.clustering import POINTS_PER_CLUSTER, PointSample, fit_kmeans
from gmoe_ltdr.upcycle import dense_copy

_IMAGES_PER_CLUSTER = 20


class FrozenFeatures(nn.Module):
    """What a network's head would have seen before any training: class token or mean token.

    Its weights are no parameters of an optimizer and in the checkpoint once, so that a saved model
    predicts by itself.
    """

    def __init__(self, vit):
        super().__init__()
        vit.reset_classifier(0)
        self.vit = vit.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenFeatures:
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.vit(x).float()


@register_algorithm
class CLUSTER(FittedSparseViT):
    """One choice of experts per image, by the k-means cluster of its features (after MoCLE)."""

    preset_name = "gmoe_dar"

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.features = FrozenFeatures(dense_copy(self.network))

    def create_spec(self):
        return spec_from_hparams(
            self.preset_name,
            self.hparams,
            router="cluster",
            router_options={
                "num_clusters": self.hparams["cluster_count"],
                "temperature": self.hparams["cluster_temperature"],
                "universal": self.hparams["cluster_universal"],
            },
        )

    def describe_images(self, x, domains):
        return {"embedding_BD": self.features(x)}

    def prepare(self, environments):
        device = next(self.parameters()).device
        most_clusters = self.hparams["cluster_count"]
        sample = PointSample(most_clusters * POINTS_PER_CLUSTER)
        with autocast(device, self.hparams["precision"]):
            for batches in environments:
                for x, _ in batches:
                    sample.add(self.features(x.to(device)))
        num_clusters = max(1, min(most_clusters, sample.num_seen // _IMAGES_PER_CLUSTER))
        centroids = on_first_rank(lambda: fit_kmeans(sample.points_ND, num_clusters))
        routers: list[Any] = [layer.router for layer in moe_layers(self.network).values()]
        for router in routers:
            router.set_centroids_(centroids)
