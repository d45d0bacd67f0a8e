"""Tokens that pull their expert in another direction than its other tokens do, and a loss that
sends them elsewhere (STGC, "Solving Token Gradient Conflict", arXiv 2406.19905).

    with collect_linear_outputs(model) as outputs, collect_routing(model) as routings:
        task_loss = cross_entropy(model(images), labels)
        conflicts = token_conflicts(task_loss, outputs, routings)
    loss = task_loss + balance_loss(routings, spec)
    loss = loss + sum(conflict_loss(routings[name], conflicts[name]) for name in routings)

A token's gradient at an expert is that of the task loss at the outputs of the expert's two linear
layers, which equals what the token adds to the gradients of their biases. It conflicts when its
mean cosine with the expert's mean gradient is below a threshold.

Shapes: T tokens, E experts, n tokens of one expert, I width of one linear layer's output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gmoe_ltdr.linear_outputs import LinearOutputs
from gmoe_ltdr.routing import Routing


def token_conflicts(
    task_loss: Tensor,
    outputs: Mapping[str, LinearOutputs],
    routings: Mapping[str, Routing],
    *,
    threshold: float = 0.0,
) -> dict[str, Tensor]:
    """Which tokens conflict with which of their experts: for each layer bool (T, E).

    Only the tokens of this process are compared. The graph of `task_loss` is kept, for the backward
    of the step.

    Args:
        task_loss: Scalar, of the forward in which the outputs and routings were collected.
        outputs: What `collect_linear_outputs` gathered; call this inside its context.
        routings: What `collect_routing` gathered.
        threshold: Cosines below it are conflicts.
    """
    watched = [t for name in routings for t in [*outputs[name].fc1, outputs[name].fc2]]
    # backward outside of autocast, which would cast what custom functions compute in it
    with torch.autocast(task_loss.device.type, enabled=False):
        grads = iter(torch.autograd.grad(task_loss, watched, retain_graph=True))
    conflicts = {}
    for name, routing in routings.items():
        first = [next(grads) for _ in outputs[name].fc1]
        counts = [len(rows) for rows in first]
        second = next(grads)[: sum(counts)].split(counts)
        rows_N = torch.cat(
            [conflicting_rows(both, threshold) for both in zip(first, second, strict=True)]
        )
        mask_ET = routing.dispatch_mask_TE.T
        conflicts_ET = torch.zeros_like(mask_ET)
        conflicts_ET[mask_ET] = rows_N
        conflicts[name] = conflicts_ET.T
    return conflicts


def conflicting_rows(grads: Sequence[Tensor], threshold: float = 0.0) -> Tensor:
    """Which of one expert's tokens pull against the others. Bool (n,).

    An expert with a single token has no conflict; a zero gradient has the cosine 0.

    Args:
        grads: The tokens' gradients at each linear layer, (n, I).
        threshold: Mean cosines over the layers below it are conflicts.
    """
    num_tokens = grads[0].shape[0]
    if num_tokens < 2:
        return torch.zeros(num_tokens, dtype=torch.bool, device=grads[0].device)
    cosine_n = torch.stack([_cosine_with_mean(grad_nI) for grad_nI in grads]).mean(0)
    return cosine_n < threshold


def _cosine_with_mean(grad_nI: Tensor) -> Tensor:
    """Cosine of each row with the mean row; gradients of a batch's mean loss are tiny numbers."""
    grad_nI = grad_nI.float()
    grad_nI = grad_nI / grad_nI.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    mean_I = grad_nI.mean(0)
    length_n = torch.linalg.vector_norm(grad_nI, dim=1) * torch.linalg.vector_norm(mean_I)
    return torch.where(length_n > 0, grad_nI @ mean_I / length_n, 0.0)


def conflict_loss(
    routing: Routing, conflicts_TE: Tensor, *, divide_by_experts: bool = True
) -> Tensor:
    """Mean cross-entropy of the negated routing logits with the experts that tokens conflict with.

    Its gradient lowers the logit of such an expert and raises those of the others. A zero that is
    connected to the graph when there is no conflict.

    Args:
        routing: The plan.
        conflicts_TE: Bool.
        divide_by_experts: Divide by E, as a re-implementation does.
    """
    log_away_TE = (-routing.logits_TE).log_softmax(-1)
    loss = -torch.where(conflicts_TE, log_away_TE, 0.0).sum() / conflicts_TE.sum().clamp(min=1)
    return loss / routing.num_experts if divide_by_experts else loss
