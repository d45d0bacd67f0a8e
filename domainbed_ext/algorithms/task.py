"""The training domain of an image teaches, or says, which experts it gets."""

from __future__ import annotations

import torch

from domainbed_ext.algorithms.base import register_algorithm
from domainbed_ext.algorithms.sparse import SparseViT
from domainbed_ext.backbones import spec_from_hparams
from domainbed_ext.distributed import current_ranks
from gmoe_ltdr import moe_layers
from gmoe_ltdr.routers.task import HardTaskRouter


@register_algorithm
class TASK(SparseViT):
    """Routing by training domain (after MoLA, DAMEX, DEMix): as supervision of the router, as a
    contrastive loss on it, or as the choice itself."""

    preset_name = "gmoe_dar"

    def create_spec(self):
        mode, num_domains = self.hparams["task_mode"], self._arguments[2]
        options = {
            "supervised": {"task_weight": self.hparams["task_weight"]},
            "contrastive": {
                "task_weight": self.hparams["task_weight"],
                "task_temperature": self.hparams["task_temperature"],
            },
            "hard": {"num_tasks": num_domains, "unseen": self.hparams["task_unseen"]},
        }
        return spec_from_hparams(
            self.preset_name, self.hparams, router=f"task_{mode}", router_options=options[mode]
        )

    def describe_images(self, x, domains):
        return {} if domains is None else {"domain_B": domains}

    @torch.no_grad()
    def after_step(self):
        """Ranks moved the prototypes by their own images; make them the mean over all images."""
        ranks, batch_size = current_ranks(), self.hparams["batch_size"]
        if ranks.size == 1:
            return
        share = len(range(batch_size)[ranks.share(batch_size)]) / batch_size
        for layer in moe_layers(self.network).values():
            if isinstance(layer.router, HardTaskRouter) and layer.router.by_prototype:
                layer.router.prototypes.mul_(share)
                torch.distributed.all_reduce(layer.router.prototypes)
