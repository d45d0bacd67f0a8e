"""Clusters of the tokens that a dense ViT's blocks see, for the routers of DISTRIBUTION.

fit_token_clusters_(model, batches_of_images)    # once, before training
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gmoe_ltdr.clustering import POINTS_PER_CLUSTER, PointSample, fit_kmeans
from gmoe_ltdr.collect import moe_layers
from gmoe_ltdr.routers.distribution import DistributionRouter
from gmoe_ltdr.upcycle import dense_copy


def fit_token_clusters_(
    model: nn.Module, image_batches: Iterable[Tensor], *, seed: int = 0
) -> None:
    """Give every sparse layer the clusters of the tokens it sees, before anything is trained.

    Args:
        model: An upcycled ViT with `MoESpec(router="distribution")`.
        image_batches: Images (B, C, H, W) that the model is going to be trained on.
        seed: Of the sample of tokens and of k-means.
    """
    routers = distribution_routers(model)
    for name, tokens_ND in sample_tokens(model, image_batches, seed=seed).items():
        router = routers[name]
        router.set_centroids_(fit_kmeans(tokens_ND, router.num_clusters, seed=seed))


def distribution_routers(model: nn.Module) -> dict[str, DistributionRouter]:
    """The routers that want token clusters, by the name of their layer."""
    layers = moe_layers(model).items()
    return {n: m.router for n, m in layers if isinstance(m.router, DistributionRouter)}


@torch.no_grad()
def sample_tokens(
    model: nn.Module, image_batches: Iterable[Tensor], *, seed: int = 0
) -> dict[str, Tensor]:
    """A random sample of the tokens that the dense model has where sparse layers are, (N, D) each.

    Args:
        model: An upcycled ViT that has not been trained; it is left alone.
        image_batches: All of them are looked at.
        seed: Of the sample.
    """
    dense = dense_copy(model).eval()
    device = next(dense.parameters()).device
    samples: dict[str, PointSample] = {}
    for name, router in distribution_routers(model).items():
        samples[name] = PointSample(router.num_clusters * POINTS_PER_CLUSTER, seed=seed)
        dense.get_submodule(name).register_forward_pre_hook(
            lambda _mlp, inputs, sample=samples[name]: sample.add(inputs[0].flatten(0, -2))
        )
    for images in image_batches:
        dense(images.to(device))
    return {name: sample.points_ND for name, sample in samples.items()}
