"""Training with expert parallelism: what is replicated, what is not, and how gradients agree.

Every rank computes the loss of its own images. `DistributedDataParallel` averages the gradients of
what all ranks hold. An expert that lives on one rank has seen the tokens of all of them: its
gradient is the *sum* of the ranks' losses' gradients, and one division makes it agree.

    model = create_moe_vit(name, preset("ltdr", dispatcher="auto"), ep_group=dist.group.WORLD)
    ignore_experts_in_ddp_(model)
    parallel = DistributedDataParallel(model)
    loss_of(parallel(images)).backward()
    average_expert_gradients_(model)
    optimizer.step()
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from gmoe_ltdr.sharding import expert_parallel_group, sharded_parameters


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the experts that only this rank holds (in its group).

    Empty without expert parallelism: then all ranks hold all experts, as they hold all else.
    """
    names = sharded_parameters(model)
    return [p for name, p in model.named_parameters() if name in names]


def replicated_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All other parameters: equal on every rank, their gradients averaged."""
    names = sharded_parameters(model)
    return [p for name, p in model.named_parameters() if name not in names]


def ignore_experts_in_ddp_(model: nn.Module) -> list[str]:
    """Tell `DistributedDataParallel(model)` to leave this rank's experts alone.

    Call it before wrapping this very module. Without it, DDP would copy rank 0's experts over
    everybody's and average gradients of different experts.

    Returns:
        The names that are left alone.
    """
    names = list(sharded_parameters(model))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return names


@torch.no_grad()
def average_expert_gradients_(
    model: nn.Module, *, replica_group: ProcessGroup | None = None
) -> None:
    """Make the experts' gradients those of the mean of the ranks' losses, as DDP's are.

    After `backward()` and before clipping or the optimizer's step.

    Args:
        model: With or without expert parallelism; without, nothing happens.
        replica_group: Where several expert-parallel groups train together: the ranks that hold the
            same experts as this one, one of each group. Their gradients are added up.
    """
    group = expert_parallel_group(model)
    if group is None:
        return
    num_ranks = group.size() * (1 if replica_group is None else replica_group.size())
    for parameter in expert_parameters(model):
        if replica_group is not None:
            # every rank takes part, also one whose experts saw no token
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=replica_group)
        if parameter.grad is not None:
            parameter.grad.div_(num_ranks)


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """`nn.utils.clip_grad_norm_` over the whole model, all ranks' experts included.

    Every rank of the group calls it, after `average_expert_gradients_`, and scales by the same
    factor.

    Returns:
        The norm before clipping.
    """
    group = expert_parallel_group(model)
    norm = nn.utils.get_total_norm(
        [p.grad for p in replicated_parameters(model) if p.grad is not None]
    )
    if group is not None:
        experts = [p.grad for p in expert_parameters(model) if p.grad is not None]
        square = nn.utils.get_total_norm(experts).to(norm.device, torch.float32).square()
        dist.all_reduce(square, group=group)
        norm = (norm.square() + square).sqrt()
    nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm
