"""TASK: an image's task says, or teaches, which experts it gets (after MoLA, DAMEX, DEMix).

In domain generalization a task is a training domain. Task i belongs to expert i mod E: with more
tasks than experts some share one, with fewer some experts belong to no task.

Shapes: B images, L tokens per image, T = B * L, D width, E experts, K tasks, F features per image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmoe_ltdr.capacity import CAPACITY_OPTIONS, limit_as_specified
from gmoe_ltdr.routers.base import Router, check_router_options, is_recomputed, register_router
from gmoe_ltdr.routers.image_level import image_means, spread_over_tokens
from gmoe_ltdr.routers.token_choice import TokenChoiceRouter
from gmoe_ltdr.routing import CLOSED, Modality, Routing, TokenContext
from gmoe_ltdr.spec import MoESpec

_NUM_FEATURES = 32
_PROTOTYPE_DECAY = 0.99


def supervised_task_loss(logits_TE: Tensor, task_B: Tensor, real_BL: Tensor) -> Tensor:
    """Cross entropy of every real token's logits with the expert of its image's task, its mean.

    Args:
        logits_TE: Clean gate logits.
        task_B: Task of each image, int64.
        real_BL: Bool, the tokens that count.
    """
    label_BL = (task_B % logits_TE.shape[1]).unsqueeze(1).expand_as(real_BL)
    loss_T = F.cross_entropy(logits_TE, label_BL.reshape(-1), reduction="none")
    real_T = real_BL.reshape(-1)
    return torch.where(real_T, loss_T, 0.0).sum() / real_T.sum().clamp(min=1)


def contrastive_task_loss(
    features_BF: Tensor, task_B: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Images of one task attract each other: mean over their ordered pairs (i, j) of
    -log(s_ij / sum over m != i of s_im), where s = exp(cosine / temperature).

    Args:
        features_BF: One vector per image, of any length.
        task_B: Task of each image, int64.
        temperature: Of the softmax.

    Returns:
        A zero that is connected to the features where no task has two images.
    """
    unit_BF = F.normalize(features_BF, dim=1)
    itself_BB = torch.eye(len(task_B), dtype=torch.bool, device=task_B.device)
    logits_BB = (unit_BF @ unit_BF.T / temperature).masked_fill(itself_BB, -torch.inf)
    pairs_BB = (task_B.unsqueeze(0) == task_B.unsqueeze(1)) & ~itself_BB
    # an image alone has nothing to be compared with: its row of logits is all -inf
    loss_BB = torch.where(pairs_BB, -logits_BB.log_softmax(1), 0.0)
    return loss_BB.sum() / pairs_BB.sum().clamp(min=1)


class _TaskLossRouter(TokenChoiceRouter):
    """Every token chooses its experts by itself; in training the images' tasks add a loss."""

    options: Mapping[str, Sequence[Any] | None] = {
        **TokenChoiceRouter.options,
        "task_weight": None,
    }

    def task_loss(self, routing: Routing, task_B: Tensor, real_BL: Tensor) -> Tensor:
        """The loss before its weight."""
        raise NotImplementedError(f"{type(self).__name__} does not define task_loss")

    def forward(self, tokens_TD: Tensor, context: TokenContext) -> Routing:
        routing = super().forward(tokens_TD, context)
        if not self.training:
            return routing
        task_B = _tasks_in_training(self.spec, context)
        real_BL = (routing.modality_T != int(Modality.PADDING)).view_as(context.modality_BL)
        with torch.autocast(tokens_TD.device.type, enabled=False):
            loss = self.task_loss(routing, task_B, real_BL)
        weight = self.spec.router_options.get("task_weight", 0.01)
        losses = {**routing.router_losses, "task_loss": weight * loss}
        return replace(routing, router_losses=losses)


@register_router("task_supervised")
class SupervisedTaskRouter(_TaskLossRouter):
    """Token choice, and a cross entropy that draws an image's tokens to the expert of its task.

    In training it has to be told the tasks: `set_image_info(model, domain_B=...)`. Then it needs
    none. `MoESpec.router_options`: `task_weight` (0.01), and those of token choice.
    """

    def task_loss(self, routing: Routing, task_B: Tensor, real_BL: Tensor) -> Tensor:
        return supervised_task_loss(routing.logits_TE, task_B, real_BL)


@register_router("task_contrastive")
class ContrastiveTaskRouter(_TaskLossRouter):
    """Token choice, and a contrastive loss on the images' mean logits (MoLA), whose tasks are told
    in training alone: `set_image_info(model, domain_B=...)`.

    `MoESpec.router_options`: `task_weight` (0.01), `task_temperature` (1), those of token choice.
    """

    options: Mapping[str, Sequence[Any] | None] = {
        **_TaskLossRouter.options,
        "task_temperature": None,
    }

    def __init__(self, dim: int, spec: MoESpec):
        super().__init__(dim, spec)
        self.temperature = spec.router_options.get("task_temperature", 1.0)
        if self.temperature <= 0:
            raise ValueError(f"task_temperature={self.temperature} must be positive")
        self.projection = nn.Linear(spec.num_experts, _NUM_FEATURES)

    def task_loss(self, routing: Routing, task_B: Tensor, real_BL: Tensor) -> Tensor:
        means_BE = image_means(routing.logits_TE, real_BL)
        weight, bias = self.projection.weight.float(), self.projection.bias.float()
        features_BF = F.linear(means_BE, weight, bias)
        return contrastive_task_loss(features_BF, task_B, temperature=self.temperature)


@register_router("task_hard")
class HardTaskRouter(Router):
    """All tokens of an image go to the expert of its task, with weight 1. Nothing is trained.

    Of an image whose task is not told, `unseen` decides: "uniform" uses all experts that have a
    task, with equal weights; "nearest" the expert of the task whose prototype has the largest
    cosine with the mean of the image's tokens in the layer's input. A prototype is the running mean
    of the training images' means, a buffer.

    `MoESpec.router_options`: `num_tasks` (required), `unseen`, and those of capacity and losses. Of
    the spec only `num_experts` and `capacity_factor` matter.
    """

    options: Mapping[str, Sequence[Any] | None] = {
        **CAPACITY_OPTIONS,
        "num_tasks": None,
        "unseen": ("uniform", "nearest"),
    }
    prototypes: Tensor  # with unseen="nearest"
    num_updates: Tensor

    def __init__(self, dim: int, spec: MoESpec):
        super().__init__(dim, spec)
        check_router_options(spec, self.options)
        self.num_tasks = spec.router_options.get("num_tasks", 0)
        if self.num_tasks < 1:
            raise ValueError(
                "router 'task_hard' needs router_options={'num_tasks': ...}, the number of tasks "
                "(training domains)"
            )
        self.num_trained = min(self.num_tasks, spec.num_experts)
        self.by_prototype = spec.router_options.get("unseen", "uniform") == "nearest"
        if self.by_prototype:
            self.register_buffer("prototypes", torch.zeros(self.num_tasks, dim))
            self.register_buffer("num_updates", torch.zeros(self.num_tasks, dtype=torch.int64))

    def forward(self, tokens_TD: Tensor, context: TokenContext) -> Routing:
        spec, real_BL = self.spec, context.modality_BL != int(Modality.PADDING)
        task_B = _tasks_in_training(spec, context) if self.training else context.domain_B
        with torch.no_grad(), torch.autocast(tokens_TD.device.type, enabled=False):
            if self.by_prototype:
                means_BD = image_means(tokens_TD, real_BL)
                if self.training and not is_recomputed():
                    assert task_B is not None
                    self._move_prototypes(means_BD, task_B, real_BL.any(1))
                if task_B is None:
                    task_B = self._nearest_task(means_BD)
            has_task_E = torch.arange(spec.num_experts, device=tokens_TD.device) < self.num_trained
            if task_B is not None:
                self._check_tasks(task_B)
                probs_BE = F.one_hot(task_B % spec.num_experts, spec.num_experts).float()
            else:
                probs_BE = (has_task_E / self.num_trained).expand(real_BL.shape[0], -1)
            # finite, as losses multiply logits by zero
            logits_BE = probs_BE.clamp(min=torch.finfo(torch.float32).tiny).log()
            routing = spread_over_tokens(
                context.modality_BL,
                logits_BE=torch.where(has_task_E, logits_BE, CLOSED),
                mask_BE=probs_BE > 0,
                weights_BE=probs_BE,
                max_experts_per_token=1 if task_B is not None else self.num_trained,
            )
            return limit_as_specified(routing, spec, training=self.training)

    def _check_tasks(self, task_B: Tensor) -> None:
        # on a GPU this would wait for the device
        if task_B.is_cpu and not torch.compiler.is_compiling() and len(task_B):
            most = int(task_B.max())
            if most >= self.num_tasks:
                raise ValueError(
                    f"an image is of task {most}, and router 'task_hard' knows tasks 0 to "
                    f"{self.num_tasks - 1}; tell no domain_B for images of other domains"
                )

    def _move_prototypes(self, means_BD: Tensor, task_B: Tensor, counts_B: Tensor) -> None:
        """Towards the mean of this batch's images of each task; the first such mean is taken."""
        images_BK = F.one_hot(task_B, self.num_tasks).float() * counts_B.unsqueeze(1)
        num_images_K1 = images_BK.sum(0).unsqueeze(1)
        batch_KD = images_BK.T @ means_BD / num_images_K1.clamp(min=1)
        is_first_K1 = (self.num_updates == 0).unsqueeze(1)
        decay = torch.where(is_first_K1, 0.0, _PROTOTYPE_DECAY)
        moved_KD = decay * self.prototypes + (1 - decay) * batch_KD
        self.prototypes.copy_(torch.where(num_images_K1 > 0, moved_KD, self.prototypes))
        self.num_updates += num_images_K1.squeeze(1) > 0

    def _nearest_task(self, means_BD: Tensor) -> Tensor:
        unit_KD = F.normalize(self.prototypes.float(), dim=1)
        cosine_BK = F.normalize(means_BD, dim=1) @ unit_KD.T
        # a task that no image has shown has no prototype yet
        return cosine_BK.masked_fill(self.num_updates == 0, -torch.inf).argmax(1)


def _tasks_in_training(spec: MoESpec, context: TokenContext) -> Tensor:
    if context.domain_B is None:
        raise ValueError(
            f"router {spec.router!r} has to know the task (training domain) of each image in "
            "training: call set_image_info(model, domain_B=...) before the forward"
        )
    return context.domain_B
