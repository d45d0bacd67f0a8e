"""EvoMoE: one expert is trained, the others evolve from it, and only then a router learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from domainbed_ext.algorithms.base import register_algorithm
from domainbed_ext.algorithms.router_health import RouterHealth
from domainbed_ext.algorithms.sparse import SparseViT
from domainbed_ext.backbones import (
    check_class_token,
    expert_parallel_group,
    spec_from_hparams,
)
from domainbed_ext.distributed import current_ranks
from domainbed_ext.errors import UsageError
from gmoe_ltdr import moe_layers
from gmoe_ltdr.evolution import (
    cloned_parameters,
    copy_first_expert_,
    draw_betas,
    evolve_experts_,
)
from gmoe_ltdr.routers.dtr import DynamicTokenAwareRouter

DENSE, EVOLUTION, ROUTING = 1, 2, 3


@dataclass(frozen=True)
class Stages:
    """Which steps of a run belong to which of EvoMoE's three stages.

    Attributes:
        evolution_start: First step of the second stage.
        routing_start: First step of the third.
    """

    evolution_start: int
    routing_start: int

    @classmethod
    def of_run(cls, num_steps: int, dense_share: float, evolution_share: float) -> Stages:
        return cls(
            round(num_steps * dense_share), round(num_steps * (dense_share + evolution_share))
        )

    def at(self, step: int) -> int:
        if step < self.evolution_start:
            return DENSE
        return EVOLUTION if step < self.routing_start else ROUTING


@register_algorithm
class EVOMOE(SparseViT):
    """Expert evolution and a dynamic token-aware router (EvoMoE, arXiv 2505.23830) in three stages.

    1. Dense: all tokens go to the first expert, and the others stay copies of it; everything but
       the routers is trained.
    2. Evolution: the first expert alone is used and trained, and the others follow it.
    3. Routing: experts and all else are frozen; the routers alone are trained.
    """

    steps_taken: Tensor

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        if hparams["schedule_steps"] < 1:
            raise UsageError(
                "EVOMOE divides a run into stages and needs the hparam schedule_steps, the number "
                f"of steps of the run, but it is {hparams['schedule_steps']}"
            )
        self._stages = Stages.of_run(
            hparams["schedule_steps"],
            hparams["evomoe_dense_share"],
            hparams["evomoe_evolution_share"],
        )
        self.register_buffer("steps_taken", torch.tensor(0))
        self._stage = self._distributed_in_stage = 0
        self._enter_stage(0)

    def create_spec(self):
        if expert_parallel_group(self.hparams) is not None:
            raise UsageError(
                f"hparam moe_dispatcher={self.hparams['moe_dispatcher']!r}: EVOMOE derives all "
                "experts from one, which expert parallelism would keep on one rank; use 'local', "
                "which trains on several ranks too"
            )
        return spec_from_hparams(
            "evomoe",
            self.hparams,
            router_options={
                "hypernetworks": self.hparams["evomoe_hypernetworks"],
                "hidden_dim": self.hparams["evomoe_hidden_dim"],
                "rank": self.hparams["evomoe_rank"],
            },
        )

    def create_network(self, input_shape, num_classes):
        network = super().create_network(input_shape, num_classes)
        if self.hparams["evomoe_hypernetworks"] == "cls":
            what = "hparam evomoe_hypernetworks='cls' keeps a network"
            check_class_token(network, self.hparams, what, instead="shared")
        return network

    def update(self, minibatches, unlabeled=None):
        # not at the end of a step, so that a stage's last evaluation is of what it has trained
        self._enter_stage(int(self.steps_taken))
        values = super().update(minibatches, unlabeled)
        self.steps_taken += 1
        return values

    def _enter_stage(self, step: int) -> None:
        """What training needs at this step, whichever stage the last one or a checkpoint was in."""
        self._stage = self._stages.at(step)
        if self._stage == ROUTING and step and self._stages.at(step - 1) < ROUTING:
            # what is counted from here on says nothing of the time before there was a choice
            self._router_health = RouterHealth(self._arguments[2])
        for router in self._routers():
            router.first_expert_only.fill_(self._stage < ROUTING)
        trained = self._trained_in(self._stage)
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name in trained)
        if self._parallel and self._distributed_in_stage != self._stage:
            self.distribute_()  # it waits for the gradients of what was trainable when it was made

    def distribute_(self):
        self._distributed_in_stage = self._stage
        super().distribute_()

    def _trained_in(self, stage: int) -> set[str]:
        """Names of the network's parameters that a stage trains."""
        network: Any = self.network
        layers = tuple(moe_layers(network))
        names = [name for name, _ in network.named_parameters()]
        of_routers = {
            n for n in names if n.startswith(tuple(f"{layer}.router." for layer in layers))
        }
        if stage == DENSE:
            return set(names) - of_routers
        of_experts = {
            n for n in names if n.startswith(tuple(f"{layer}.experts." for layer in layers))
        }
        trained = of_experts if stage == EVOLUTION else of_routers
        if self.hparams["evomoe_train_head"]:
            head = {id(p) for p in network.get_classifier().parameters()}
            trained |= {n for n, p in network.named_parameters() if id(p) in head}
        return trained

    def _routers(self) -> list[DynamicTokenAwareRouter]:
        routers = [layer.router for layer in moe_layers(self.network).values()]
        return [router for router in routers if isinstance(router, DynamicTokenAwareRouter)]

    def take_step(self):
        layers = [layer.experts for layer in moe_layers(self.network).values()]
        if self._stage == EVOLUTION:
            before = [cloned_parameters(experts) for experts in layers]
        super().take_step()
        if self._stage == DENSE:
            for experts in layers:  # so that averages of the weights know of one network only
                copy_first_expert_(experts)
        elif self._stage == EVOLUTION:
            for experts, old, betas in zip(
                layers, before, self._draw_betas(len(layers)), strict=True
            ):
                evolve_experts_(experts, old, betas, self.hparams["evomoe_evolution"])

    def _draw_betas(self, num_layers: int) -> Tensor:
        """The same on all ranks: each has a generator of its own."""
        betas = draw_betas(num_layers, self.spec.num_experts).to(self.steps_taken.device)
        if current_ranks().size > 1:
            torch.distributed.broadcast(betas, src=0)
        return betas

    def balance(self, routings):
        if self._stage < ROUTING:  # nothing is routed
            return torch.zeros((), device=self.steps_taken.device)
        return super().balance(routings)

    def loss(self, x, y, domains):
        loss, numbers = super().loss(x, y, domains)
        return loss, {**numbers, "stage": float(self._stage)}
