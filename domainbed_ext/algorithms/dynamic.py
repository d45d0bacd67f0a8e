"""DynMoE's router: any number of experts per token, and a pool of experts that adapts."""

from __future__ import annotations

import torch

from domainbed_ext.algorithms.base import register_algorithm
from domainbed_ext.algorithms.sparse import SparseViT
from domainbed_ext.backbones import spec_from_hparams
from gmoe_ltdr.expert_pool import dynamic_routers, update_expert_pools_


@register_algorithm
class DYNAMIC(SparseViT):
    """DynMoE (arXiv 2405.14297): each token takes the experts whose learned thresholds it passes;
    experts that nobody takes leave, and tokens that nobody serves get a new one."""

    def create_spec(self):
        return spec_from_hparams(
            "dynamic",
            self.hparams,
            num_experts=self.hparams["dynamic_max_experts"],
            router_options={
                "initial_experts": self.hparams["moe_num_experts"],
                "cycle": self.hparams["dynamic_cycle"],
                "loss": self.hparams["dynamic_loss"],
            },
        )

    def loss(self, x, y, domains):
        loss, numbers = super().loss(x, y, domains)
        sizes = [router.pool.float().sum() for router in dynamic_routers(self.network).values()]
        return loss, {**numbers, "pool_size": torch.stack(sizes).mean()}

    def after_step(self):
        averages = [] if self.average is None else [self.average.module]
        update_expert_pools_(self.network, optimizer=self.optimizer, averages=averages)
