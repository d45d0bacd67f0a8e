"""The cluster of a token is its combination of experts."""

from __future__ import annotations

from torch import Tensor

from domainbed_ext.algorithms.base import register_algorithm
from domainbed_ext.algorithms.fitted import FittedSparseViT
from domainbed_ext.backbones import spec_from_hparams
from domainbed_ext.distributed import on_first_rank
from domainbed_ext.optimization import autocast
from gmoe_ltdr.clustering import fit_kmeans
from gmoe_ltdr.token_clusters import distribution_routers, sample_tokens


@register_algorithm
class DISTRIBUTION(FittedSparseViT):
    """One combination of experts per k-means cluster of tokens (LTDR v2, named after RIDE)."""

    preset_name = "gmoe_dar"

    def create_spec(self):
        return spec_from_hparams(self.preset_name, self.hparams, router="distribution")

    def prepare(self, environments):
        images = (x for batches in environments for x, _ in batches)
        device = next(self.parameters()).device
        with autocast(device, self.hparams["precision"]):
            samples = sample_tokens(self.network, images)
        routers = distribution_routers(self.network)

        def fit() -> dict[str, Tensor]:
            return {n: fit_kmeans(tokens, routers[n].num_clusters) for n, tokens in samples.items()}

        for name, centroids in on_first_rank(fit).items():
            routers[name].set_centroids_(centroids)
