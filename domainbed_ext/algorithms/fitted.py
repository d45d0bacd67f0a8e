"""Sparse ViTs whose routers are fitted to the training images before the first step."""

from __future__ import annotations

from typing import Any

from domainbed_ext.algorithms.sparse import SparseViT
from domainbed_ext.errors import UsageError
from gmoe_ltdr import moe_layers


class FittedSparseViT(SparseViT):
    """`prepare` gives every router its `clusters`, which the checkpoint holds from then on."""

    def loss(self, x, y, domains):
        routers: list[Any] = [layer.router for layer in moe_layers(self.network).values()]
        if not all(router.clusters.is_fitted for router in routers):
            raise UsageError(
                f"{type(self).__name__} looks at all training images before its first step, which "
                "DomainBed's own training does not offer it; use python -m "
                "domainbed_ext.scripts.train (or sweep) with the same flags"
            )
        return super().loss(x, y, domains)
