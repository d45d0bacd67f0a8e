"""STGC: a top-k router that sends tokens away from experts whose other tokens they contradict."""

from __future__ import annotations

import torch

from domainbed_ext.algorithms.base import register_algorithm
from domainbed_ext.algorithms.sparse import SparseViT, routing_numbers
from domainbed_ext.backbones import expert_parallel_group
from domainbed_ext.errors import UsageError
from gmoe_ltdr.linear_outputs import collect_linear_outputs
from gmoe_ltdr.token_conflicts import conflict_loss, token_conflicts


@register_algorithm
class STGC(SparseViT):
    """Solving token gradient conflict (arXiv 2406.19905), on top of GMoE's balance losses."""

    preset_name = "gmoe_dropless"

    def create_spec(self):
        if expert_parallel_group(self.hparams) is not None:
            raise UsageError(
                f"hparam moe_dispatcher={self.hparams['moe_dispatcher']!r}: STGC compares the "
                "gradients of an expert's tokens, which expert parallelism scatters over the "
                "ranks; use 'local', which trains on several ranks too"
            )
        return super().create_spec()

    def loss(self, x, y, domains):
        hparams = self.hparams
        with (
            collect_linear_outputs(self.network) as outputs,
            self.watched_routing(domains) as routings,
        ):
            task_loss = self.task_loss(self.run_network(x), y)
            conflicts = token_conflicts(
                task_loss, outputs, routings, threshold=hparams["stgc_threshold"]
            )
        balance = self.balance(routings)
        per_layer = [
            conflict_loss(
                routing, conflicts[name], divide_by_experts=hparams["stgc_divide_by_experts"]
            )
            for name, routing in routings.items()
        ]
        conflict = hparams["stgc_weight"] * torch.stack(per_layer).sum()
        shares = [
            conflicts[name].sum() / routing.dispatch_mask_TE.sum().clamp(min=1)
            for name, routing in routings.items()
        ]
        return task_loss + balance + conflict, {
            "balance_loss": balance.detach(),
            "conflict_loss": conflict.detach(),
            "conflict_share": torch.stack(shares).mean(),
            **routing_numbers(routings.values()),
        }
