"""The algorithms, behind DomainBed's contract: `update(minibatches)` and `predict(x)`.

    algorithm = LTDR(input_shape, num_classes, num_domains, hparams)
    algorithm.update([(x, y) for each training domain])   # -> {"loss": ..., ...}
    algorithm.predict(x)                                  # -> logits (B, num_classes)

ERM_ViT is the dense twin of GMOE and LTDR: same backbone, same weights, same grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from domainbed_ext.backbones import (
    expert_parallel_group,
    hparams_are_to_blame,
    spec_from_hparams,
    timm_arguments,
    weights_tag,
)
from domainbed_ext.distributed import current_ranks
from domainbed_ext.errors import UsageError
from domainbed_ext.networks import create_classifier, create_featurizer
from domainbed_ext.optimization import (
    autocast,
    create_optimizer,
    ema_update,
    learning_rate_factor,
)
from gmoe_ltdr import balance_loss, collect_routing, create_moe_vit
from gmoe_ltdr.expert_parallel import (
    average_expert_gradients_,
    clip_grad_norm_,
    expert_parameters,
    ignore_experts_in_ddp_,
)
from gmoe_ltdr.models import create_dense_vit
from gmoe_ltdr.sharding import gather_optimizer_state, gather_state_dict, shard_optimizer_state

Minibatches = Sequence[tuple[Tensor, Tensor]]

_ALGORITHMS: dict[str, type[Algorithm]] = {}


def register_algorithm(cls: type[Algorithm]) -> type[Algorithm]:
    """Class decorator: make an algorithm available under its class name."""
    _ALGORITHMS[cls.__name__] = cls
    return cls


def get_algorithm_class(name: str) -> type[Algorithm]:
    """The algorithm of that name.

    Raises:
        UsageError: There is none.
    """
    if name not in _ALGORITHMS:
        raise UsageError(f"unknown algorithm {name!r}; there are {', '.join(_ALGORITHMS)}")
    return _ALGORITHMS[name]


class Algorithm(nn.Module):
    """DomainBed's contract.

    Args:
        input_shape: (C, H, W) of the images.
        num_classes: Number of classes.
        num_domains: Number of training domains.
        hparams: Flat hyper-parameters, see `domainbed_ext.hparams`.

    Attributes:
        weights_tag: Which pretrained weights the model started from; "random" for none.
    """

    weights_tag = "random"

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        num_domains: int,
        hparams: Mapping[str, Any],
    ):
        super().__init__()
        self.hparams = hparams
        self._arguments = (input_shape, num_classes, num_domains)

    def update(
        self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None
    ) -> dict[str, float]:
        """One step on one batch per training domain.

        Args:
            minibatches: (images, labels) of each training domain, on the model's device.
            unlabeled: Images of the test domains, for domain adaptation; unused here.

        Returns:
            Numbers to be averaged and recorded.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define update")

    def predict(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        raise NotImplementedError(f"{type(self).__name__} does not define predict")


def join(minibatches: Minibatches) -> tuple[Tensor, Tensor]:
    """All domains' images and labels as one batch."""
    images, labels = zip(*minibatches, strict=True)
    return torch.cat(images), torch.cat(labels)


@register_algorithm
class ERM(Algorithm):
    """Empirical risk minimisation, with DomainBed's networks and hyper-parameters (ResNet-50)."""

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.featurizer = create_featurizer(input_shape, hparams)
        self.classifier = create_classifier(
            self.featurizer.n_outputs, num_classes, nonlinear=hparams["nonlinear_classifier"]
        )
        self.weights_tag = self.featurizer.weights_tag
        self.optimizer = torch.optim.Adam(
            self.parameters(), lr=hparams["lr"], weight_decay=hparams["weight_decay"]
        )

    def update(self, minibatches, unlabeled=None):
        x, y = join(minibatches)
        loss = F.cross_entropy(self.predict(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item()}

    def predict(self, x):
        return self.classifier(self.featurizer(x))


@register_algorithm
class ERM_ViT(Algorithm):  # noqa: N801  the name of the algorithm in sweeps and tables
    """Empirical risk minimisation with a dense timm ViT.

    Adam or AdamW, a constant, cosine or one-cycle learning rate, optional weight averaging (EMA)
    whose weights then make the predictions.
    """

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.network = self.create_network(input_shape, num_classes)
        self.weights_tag = weights_tag(hparams)
        self.optimizer = create_optimizer(self.network, hparams)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, learning_rate_factor(hparams)
        )
        self._parallel: list[nn.Module] = []  # a list, to be no part of the state
        self.average = None
        if hparams["ema_decay"] > 0:
            self.average = AveragedModel(
                self.network, multi_avg_fn=ema_update(hparams["ema_decay"]), use_buffers=True
            )

    def create_network(self, input_shape, num_classes: int) -> nn.Module:
        arguments = timm_arguments(input_shape, num_classes, self.hparams)
        with hparams_are_to_blame(self.hparams):
            return create_dense_vit(self.hparams["backbone"], **arguments)

    def loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The step's loss and further numbers to record."""
        return self.task_loss(self.run_network(x), y), {}

    def run_network(self, x: Tensor) -> Tensor:
        """Logits in training."""
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
        with autocast(x.device, self.hparams["precision"]):
            loss, numbers = self.loss(x, y)
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
        self.optimizer.step()
        self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        numbers = {k: v.item() if isinstance(v, Tensor) else v for k, v in numbers.items()}
        return {"loss": loss.item(), "lr": learning_rate, **numbers}

    def predict(self, x):
        network = self.network if self.average is None or self.training else self.average
        with autocast(x.device, self.hparams["precision"]):
            return network(x).float()

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


class SparseViT(ERM_ViT):
    """A ViT with mixture-of-experts layers: the task loss plus what the spec says of balance."""

    preset_name = "ltdr"

    def create_network(self, input_shape, num_classes: int) -> nn.Module:
        self.spec = spec_from_hparams(self.preset_name, self.hparams)
        arguments = timm_arguments(input_shape, num_classes, self.hparams)
        with hparams_are_to_blame(self.hparams):
            return create_moe_vit(
                self.hparams["backbone"],
                self.spec,
                ep_group=expert_parallel_group(self.hparams),
                **arguments,
            )

    def loss(self, x, y):
        with collect_routing(self.network) as routings:
            task_loss = self.task_loss(self.run_network(x), y)
        balance = balance_loss(routings, self.spec)
        plans = routings.values()
        numbers = {
            "balance_loss": balance.detach(),
            "tail_share": torch.stack([p.tail_mask_T.float().mean() for p in plans]).mean(),
            "experts_per_token": torch.stack(
                [p.experts_per_token_T.float().mean() for p in plans]
            ).mean(),
        }
        return task_loss + balance, numbers


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


ALGORITHMS: list[str] = list(_ALGORITHMS)
