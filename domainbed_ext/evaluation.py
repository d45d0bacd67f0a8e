"""Accuracy of an algorithm on splits, and the loss where it is wanted."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_ext.distributed import Ranks
from domainbed_ext.loaders import EvalBatches, eval_stream


def predicted_classes(predictions: Tensor) -> Tensor:
    """Classes (B,) out of scores (B, C), or out of the sign where C is 1, as in DomainBed."""
    if predictions.shape[1] == 1:
        return (predictions[:, 0] > 0).long()
    return predictions.argmax(dim=1)


@torch.inference_mode()
def evaluate(
    algorithm: Any,
    loaders: Mapping[str, EvalBatches],
    *,
    device: torch.device | str,
    num_classes: int,
    ranks: Ranks | None = None,
    before_batch: Callable[[], None] = lambda: None,
    loss_of: Collection[str] = (),
) -> dict[str, float]:
    """Accuracies of ``algorithm.predict`` in evaluation mode.

    Args:
        algorithm: Left in the mode it came in.
        loaders: By name, such as "env0_in". An empty one yields no accuracy.
        device: Where the algorithm is.
        num_classes: Of the data set.
        ranks: Processes that evaluate together, each its part of every loader's images. All of them
            get the numbers.
        before_batch: Called before each; may raise, to end the evaluation.
        loss_of: Names of loaders whose loss is wanted too.

    Returns:
        For each name "{name}_acc", and "{name}_class_acc": the mean of the accuracies of the
        classes that occur; where asked for, "{name}_loss": the mean cross-entropy.
    """
    was_training = algorithm.training
    algorithm.eval()
    try:
        sums = {name: _ClassSums(num_classes, device) for name in loaders}
        for name, (x, y) in eval_stream(loaders):
            before_batch()
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            sums[name].add(algorithm.predict(x), y, with_loss=name in loss_of)
        accuracies: dict[str, float] = {}
        for name, own in sums.items():
            values = own.values.cpu()
            if ranks is not None and ranks.size > 1:
                torch.distributed.all_reduce(values)
            right, total, loss = values
            if total.sum() == 0:
                continue
            occurs = total > 0
            accuracies[f"{name}_acc"] = (right.sum() / total.sum()).item()
            accuracies[f"{name}_class_acc"] = (right[occurs] / total[occurs]).mean().item()
            if name in loss_of:
                accuracies[f"{name}_loss"] = (loss.sum() / total.sum()).item()
        return accuracies
    finally:
        algorithm.train(was_training)


class _ClassSums:
    """Per class: how many images were right, how many there were, the sum of their losses.

    Attributes:
        values: The three, (3, C), float64. On the device: reading a number per batch would wait
            for it each time.
    """

    def __init__(self, num_classes: int, device: torch.device | str) -> None:
        self.values = torch.zeros(3, num_classes, dtype=torch.float64, device=device)
        self._classes = torch.arange(num_classes, device=device)

    def add(self, predictions: Tensor, y: Tensor, *, with_loss: bool) -> None:
        """Adds a batch."""
        right, total, loss = self.values
        correct = predicted_classes(predictions) == y
        # Not bincount, which deterministic algorithms forbid on CUDA.
        is_class_BC = y[:, None] == self._classes
        total += is_class_BC.sum(0)
        right += (is_class_BC & correct[:, None]).sum(0)
        if with_loss:
            loss += _losses(predictions, y)[:, None].where(is_class_BC, 0).sum(0)


def _losses(predictions: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each image, float64 (B,)."""
    y = y.clamp(min=0)  # the label -1 counts nowhere
    if predictions.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(
            predictions[:, 0].double(), y.double(), reduction="none"
        )
    return F.cross_entropy(predictions.double(), y, reduction="none")
