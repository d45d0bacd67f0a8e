"""The dense ViT, and what all ViT algorithms share: optimisation, averaging, several ranks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_ext.algorithms.base import Algorithm, domains_of, join, register_algorithm
from domainbed_ext.backbones import hparams_are_to_blame, timm_arguments, weights_tag
from domainbed_ext.compilation import compile_blocks_, share_graphs_, without_compiler
from domainbed_ext.distributed import current_ranks
from domainbed_ext.optimization import (
    as_input,
    autocast,
    create_optimizer,
    learning_rate_factor,
    use_fused_kernels_,
)
from domainbed_ext.weight_averaging import create_average
from gmoe_ltdr.expert_parallel import (
    average_expert_gradients_,
    clip_grad_norm_,
    expert_parameters,
    ignore_experts_in_ddp_,
)
from gmoe_ltdr.models import create_dense_vit
from gmoe_ltdr.sharding import gather_optimizer_state, gather_state_dict, shard_optimizer_state


@register_algorithm
class ERM_ViT(Algorithm):  # noqa: N801  the name of the algorithm in sweeps and tables
    """Empirical risk minimisation with a dense timm ViT.

    Adam or AdamW, a constant, cosine or one-cycle learning rate, optional averaging of the
    network's weights.
    """

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.network = self.create_network(input_shape, num_classes)
        self._is_compiled = hparams.get("compile") == "blocks"
        if self._is_compiled:
            share_graphs_(self.network)
        self.weights_tag = weights_tag(hparams)
        self.optimizer = create_optimizer(self.network, hparams)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, learning_rate_factor(hparams)
        )
        self._parallel: list[nn.Module] = []  # a list, to be no part of the state
        self.average = create_average({"network": self.network}, hparams)

    def create_network(self, input_shape, num_classes: int) -> nn.Module:
        arguments = timm_arguments(input_shape, num_classes, self.hparams)
        with hparams_are_to_blame(self.hparams):
            return create_dense_vit(self.hparams["backbone"], **arguments)

    def loss(
        self, x: Tensor, y: Tensor, domains: Tensor
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The step's loss and further numbers to record.

        Args:
            x: Images of all training domains.
            y: Their labels (B,).
            domains: Which training domain each is from, int64 (B,).
        """
        return self.task_loss(self.run_network(x), y), {}

    def take_step(self) -> None:
        """Update the parameters with their gradients."""
        self.optimizer.step()

    def after_step(self) -> None:
        """Called when the parameters have been updated, before they are averaged."""

    def run_network(self, x: Tensor) -> Tensor:
        """Logits in training."""
        x = as_input(x, self.hparams)
        return self._parallel[0](x) if self._parallel else self.network(x)

    def distribute_(self) -> None:
        """Train on all ranks of the process group: the dense part is kept equal, experts that a
        rank alone holds get the gradients of all ranks' images."""
        ignore_experts_in_ddp_(self.network)
        self._parallel = [nn.parallel.DistributedDataParallel(self.network)]

    def task_loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), y, label_smoothing=self.hparams["label_smoothing"])

    def update(self, minibatches, unlabeled=None):
        x, y = join(minibatches)
        # here, because where the network will be is not known when it is made
        use_fused_kernels_(self.optimizer, self.hparams)
        if self._is_compiled:
            compile_blocks_(self.network, x.device)
        with autocast(x.device, self.hparams["precision"]):
            loss, numbers = self.loss(x, y, domains_of(minibatches))
        self.optimizer.zero_grad()
        if self._parallel:
            # ranks average their gradients; those with more images count for more
            num_images = self.hparams["batch_size"] * self._arguments[2]
            (loss * (len(x) * current_ranks().size / num_images)).backward()
            average_expert_gradients_(self.network)
        else:
            loss.backward()
        if self.hparams["grad_clip"] > 0:
            clip_grad_norm_(self.network, self.hparams["grad_clip"])
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.take_step()
        self.scheduler.step()
        self.after_step()
        if self.average is not None:
            self.average.update()
        numbers = {k: v.item() if isinstance(v, Tensor) else v for k, v in numbers.items()}
        return {"loss": loss.item(), "lr": learning_rate, **numbers}

    @property
    def predicting_network(self) -> nn.Module:
        """The network, which in evaluation mode has the averaged weights where there are any."""
        return self.network

    def predict(self, x):
        x = as_input(x, self.hparams)
        compiler = without_compiler() if self._is_compiled else nullcontext()
        with compiler, autocast(x.device, self.hparams["precision"]):
            return self.predicting_network(x).float()

    def training_state(self) -> dict[str, Any]:
        """Everything besides `state_dict()` that a resumed run needs."""
        return {
            "optimizer": gather_optimizer_state(self.optimizer, self.network),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(
            shard_optimizer_state(state["optimizer"], self.optimizer, self.network)
        )
        self.scheduler.load_state_dict(state["scheduler"])

    def full_state_dict(self) -> dict[str, Tensor]:
        """`state_dict()` with the experts of all ranks; all ranks call it."""
        return gather_state_dict(self)

    def unsharded(self) -> ERM_ViT:
        """The same algorithm with all experts, on rank 0; the others get themselves."""
        if not expert_parameters(self):
            return self
        state = self.full_state_dict()
        if not current_ranks().is_first:
            return self
        hparams = {**self.hparams, "pretrained": False, "moe_dispatcher": "local"}
        with torch.random.fork_rng(devices=[]):
            whole = type(self)(*self._arguments, hparams)
        whole.load_state_dict(state)
        return whole
