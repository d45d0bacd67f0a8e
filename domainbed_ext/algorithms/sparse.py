"""Sparse ViTs: GMoE, LTDR and what lies between them.

`SparseViT` is also what every comparison router builds on: a subclass names its preset or overrides
`create_spec`, and has a file of its own here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from domainbed_ext.algorithms.base import register_algorithm
from domainbed_ext.algorithms.router_health import RouterHealth
from domainbed_ext.algorithms.vit import ERM_ViT
from domainbed_ext.backbones import (
    expert_parallel_group,
    hparams_are_to_blame,
    spec_from_hparams,
    timm_arguments,
)
from domainbed_ext.errors import UsageError
from domainbed_ext.optimization import autocast
from gmoe_ltdr import (
    MoESpec,
    Routing,
    balance_loss,
    collect_routing,
    create_moe_vit,
    use_expert_backend,
)
from gmoe_ltdr.expert_backends import UnfitBackendError
from gmoe_ltdr.image_info import set_image_info


class SparseViT(ERM_ViT):
    """A ViT with mixture-of-experts layers: the task loss plus what the spec says of balance."""

    preset_name = "ltdr"

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self._router_health = RouterHealth(num_domains)

    def create_spec(self) -> MoESpec:
        """The sparse model that the hyper-parameters describe."""
        return spec_from_hparams(self.preset_name, self.hparams)

    def create_network(self, input_shape, num_classes: int) -> nn.Module:
        self.spec = self.create_spec()
        arguments = timm_arguments(input_shape, num_classes, self.hparams)
        with hparams_are_to_blame(self.hparams):
            network = create_moe_vit(
                self.hparams["backbone"],
                self.spec,
                ep_group=expert_parallel_group(self.hparams),
                **arguments,
            )
        return use_expert_backend(network, self.hparams.get("moe_backend", "auto"))

    def run_network(self, x: Tensor) -> Tensor:
        try:
            return super().run_network(x)
        except UnfitBackendError as error:
            raise UsageError(
                f"hparam moe_backend={self.hparams['moe_backend']!r}: {error}"
            ) from error

    def describe_images(self, x: Tensor, domains: Tensor | None) -> dict[str, Tensor]:
        """What routers are told of images besides their pixels: arguments of `set_image_info`.

        Args:
            x: Images.
            domains: Which training domain each is from, int64 (B,); None in prediction, where
                nobody knows.
        """
        return {}

    def loss(self, x, y, domains):
        # stays until the next step, since activation checkpointing runs layers again in backward
        set_image_info(self.network, **self.describe_images(x, domains))
        with self.watched_routing(domains) as routings:
            task_loss = self.task_loss(self.run_network(x), y)
        balance = self.balance(routings)
        return task_loss + balance, {
            "balance_loss": balance.detach(),
            **routing_numbers(routings.values()),
        }

    def balance(self, routings: Mapping[str, Routing]) -> Tensor:
        """What the step adds to its task loss: balance, and losses of the router's own."""
        return balance_loss(routings, self.spec)

    def predict(self, x):
        network = self.predicting_network
        with autocast(x.device, self.hparams["precision"]):
            set_image_info(network, **self.describe_images(x, None))
            logits = super().predict(x)
        set_image_info(network)
        return logits

    @contextmanager
    def watched_routing(self, domains: Tensor) -> Iterator[dict[str, Routing]]:
        """`collect_routing` of a training step, which records will tell of.

        Args:
            domains: Which training domain each image of the forward is from.
        """
        with collect_routing(self.network) as routings:
            yield routings
        self._router_health.add(routings, domains)

    def diagnostics(self):
        return {"router": self._router_health.report(self.network)}

    def training_state(self):
        return {**super().training_state(), "router_health": self._router_health.state()}

    def load_training_state(self, state):
        super().load_training_state(state)
        if "router_health" in state:
            self._router_health.load_state(state["router_health"])


def routing_numbers(plans: Iterable[Routing]) -> dict[str, Tensor]:
    """What the routers decided, for the records: means over the layers, sums of their losses."""
    plans = list(plans)
    numbers = {
        "tail_share": torch.stack([p.tail_mask_T.float().mean() for p in plans]).mean(),
        "experts_per_token": torch.stack(
            [p.experts_per_token_T.float().mean() for p in plans]
        ).mean(),
    }
    for plan in plans:
        for name, value in plan.router_losses.items():
            numbers[name] = numbers.get(name, torch.zeros_like(value)) + value.detach()
    return numbers


@register_algorithm
class GMOE(SparseViT):
    """GMoE (arXiv 2206.04046) as released: one expert per token, capacity 1.5, importance and load
    balanced."""

    preset_name = "gmoe"


@register_algorithm
class GMOE_DAR(SparseViT):  # noqa: N801
    """LTDR without its second module: nothing is balanced, tail tokens get no further experts."""

    preset_name = "gmoe_dar"


@register_algorithm
class GMOE_EEA(SparseViT):  # noqa: N801
    """LTDR without its first module: GMoE's balance losses stay, tail tokens get more experts."""

    preset_name = "gmoe_eea"


@register_algorithm
class LTDR(SparseViT):
    """Long-Tailed Distribution-aware Router (arXiv 2507.01351): no balancing of vision tokens, more
    experts for tail tokens."""

    preset_name = "ltdr"

    def create_spec(self):
        if self.hparams.get("ltdr_balance", "language") == "language":
            return super().create_spec()
        weight = self.hparams["moe_balance_weight"]
        weights = {"vision": weight / 10, "language": weight}
        return spec_from_hparams(
            self.preset_name, self.hparams, router_options={"balance_weights": weights}
        )
