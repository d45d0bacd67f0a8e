"""Accuracy of an algorithm on splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from domainbed_ext.distributed import Ranks
from domainbed_ext.loaders import EvalBatches


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

    Returns:
        For each name "{name}_acc", and "{name}_class_acc": the mean of the accuracies of the
        classes that occur.
    """
    was_training = algorithm.training
    algorithm.eval()
    try:
        accuracies: dict[str, float] = {}
        for name, loader in loaders.items():
            right, total = _class_counts(algorithm, loader, device, num_classes, before_batch)
            if ranks is not None and ranks.size > 1:
                torch.distributed.all_reduce(right)
                torch.distributed.all_reduce(total)
            if total.sum() == 0:
                continue
            occurs = total > 0
            accuracies[f"{name}_acc"] = (right.sum() / total.sum()).item()
            accuracies[f"{name}_class_acc"] = (right[occurs] / total[occurs]).mean().item()
        return accuracies
    finally:
        algorithm.train(was_training)


def _class_counts(
    algorithm: Any,
    loader: EvalBatches,
    device: torch.device | str,
    num_classes: int,
    before_batch: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """How many images of each class were right, and how many there were; float64 on the CPU."""
    # Summed on the device: reading a number per batch would wait for it each time.
    right = torch.zeros(num_classes, dtype=torch.int64, device=device)
    total = torch.zeros_like(right)
    classes = torch.arange(num_classes, device=device)
    for x, y in loader:
        before_batch()
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        correct = predicted_classes(algorithm.predict(x)) == y
        # Not bincount, which deterministic algorithms forbid on CUDA.
        is_class_BC = y[:, None] == classes
        total += is_class_BC.sum(0)
        right += (is_class_BC & correct[:, None]).sum(0)
    return right.double().cpu(), total.double().cpu()
