"""The adaptive pool of experts of `MoESpec(router="dynamic")`: who exists, decided between steps.

    loss.backward()
    optimizer.step()
    update_expert_pools_(model, optimizer=optimizer)

All experts are allocated from the start; the pool is which of them may be used. Experts that no
token activated leave it. If tokens were left without any expert, the first free place gets an
expert that looks in the direction of their sum (DynMoE, arXiv 2405.14297); its feed-forward
network keeps the weights that it had.

The vision code of DynMoE changes the pool at every step (a cycle of one step); its language code
records the middle third of each cycle of 900 steps and changes the pool at the end of that third.

Shapes: D width, E experts allocated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from gmoe_ltdr.collect import moe_layers
from gmoe_ltdr.routers.dynamic import Activity, DynamicRouter


def dynamic_routers(model: nn.Module) -> dict[str, DynamicRouter]:
    """The routers of the model's layers that have a pool, by the layers' names.

    Raises:
        ValueError: There is none.
    """
    routers = {
        name: layer.router
        for name, layer in moe_layers(model).items()
        if isinstance(layer.router, DynamicRouter)
    }
    if not routers:
        raise ValueError(
            f"{type(model).__name__} has no layer with MoESpec(router='dynamic'), so no pool"
        )
    return routers


def recorded_steps(cycle: int) -> range:
    """Steps of a cycle whose activity counts: its middle third. The pool changes after the last."""
    start = cycle // 3
    return range(start, max(2 * cycle // 3, start + 1))


def next_pool(
    pool_E: Tensor, activations_E: Tensor, unserved_D: Tensor, num_tokens: int
) -> tuple[Tensor, int | None]:
    """The pool after what was recorded, and the expert that is new in it, if there is one.

    Args:
        pool_E: Bool, who exists now.
        activations_E: How many tokens each was active for.
        unserved_D: Sum of the tokens that had no active expert.
        num_tokens: Tokens seen; without any, nothing changes.
    """
    if not num_tokens:
        return pool_E, None
    kept_E = pool_E & (activations_E > 0)
    if not kept_E.any():  # the last one stays
        kept_E[pool_E.nonzero()[0]] = True
    free = (~kept_E).nonzero().flatten().tolist()
    if not free or not unserved_D.any():
        return kept_E, None
    kept_E[free[0]] = True
    return kept_E, free[0]


@torch.no_grad()
def update_expert_pools_(
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    averages: Sequence[nn.Module] = (),
    group: ProcessGroup | None = None,
) -> None:
    """Take note of the step that was made, and change the pools where a cycle says so.

    Call it once after each training step. In distributed training every rank calls it; what they
    counted is added up, so that all keep the same pool.

    Args:
        model: With layers whose router is "dynamic".
        optimizer: Its moments of a new expert's direction and threshold are forgotten.
        averages: Weight averages of the model, which take over a new expert's direction and
            threshold. (The pool itself is a buffer: averages have to copy buffers.)
        group: The ranks that train together; all by default.

    Raises:
        ValueError: No layer has such a router.
    """
    for name, router in dynamic_routers(model).items():
        cycle = router.cycle
        if not cycle:
            continue
        position = int(router.steps) % cycle
        window = recorded_steps(cycle)
        if position in window:
            _add_over_ranks_(router.recorded, router.this_step, group)
        router.this_step.reset_()
        router.steps += 1
        if position != window[-1]:
            continue
        copies = [dynamic_routers(average)[name] for average in averages]
        _adapt_(router, optimizer, copies)
        router.recorded.reset_()


def _add_over_ranks_(total: Activity, this_step: Activity, group: ProcessGroup | None) -> None:
    # one message; float64 holds counts exactly
    amounts = [buffer.double().reshape(-1) for buffer in this_step.buffers()]
    message = torch.cat(amounts)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(message, group=group)
    parts = message.split([len(amount) for amount in amounts])
    for buffer, part in zip(total.buffers(), parts, strict=True):
        buffer += part.view(buffer.shape).to(buffer.dtype)


def _adapt_(
    router: DynamicRouter, optimizer: torch.optim.Optimizer | None, copies: Sequence[DynamicRouter]
) -> None:
    recorded = router.recorded
    unserved_D = recorded.unserved.float()
    pool_E, new = next_pool(
        router.pool.cpu(), recorded.activations.cpu(), unserved_D.cpu(), int(recorded.num_tokens)
    )
    router.pool.copy_(pool_E)
    if new is None:
        return
    direction_D = unserved_D / torch.linalg.vector_norm(unserved_D)
    for owner in (router, *copies):
        owner.expert_embed[:, new] = direction_D.to(owner.expert_embed.dtype)
        owner.thresholds[new] = 0.0
    if optimizer is not None:
        for parameter in (router.expert_embed, router.thresholds):
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value[..., new] = 0.0
