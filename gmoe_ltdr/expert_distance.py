"""How far apart the experts of a layer are: whether they have become different from each other.

Upcycled experts start as copies of one network, and some routers leave them so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gmoe_ltdr.moe import MoE
from gmoe_ltdr.sharding import gather_experts


@torch.no_grad()
def expert_distances(layer: MoE) -> Tensor:
    """Distance of each pair of experts, in units of their size. Float32 (E, E).

    d_ij = |w_i - w_j| / sqrt((|w_i|^2 + |w_j|^2) / 2), over all parameters of an expert: 0 for
    equal experts, about sqrt(2) for unrelated ones. With expert parallelism every rank of the group
    calls this, and gets all.
    """
    parameters = [value.flatten(1).float() for value in gather_experts(layer).values()]
    squares_EE = torch.stack([_squared_distances(value) for value in parameters]).sum(0)
    sizes_E = torch.stack([value.square().sum(1) for value in parameters]).sum(0)
    mean_size_EE = (sizes_E.unsqueeze(0) + sizes_E.unsqueeze(1)) / 2
    return (squares_EE / mean_size_EE.clamp(min=torch.finfo(torch.float32).tiny)).sqrt()


def _squared_distances(weights_EW: Tensor) -> Tensor:
    # by differences, not by products: equal experts are at a distance of exactly 0
    return torch.stack([(weights_EW - one_W).square().sum(1) for one_W in weights_EW])


def distances_between(distances_EE: Tensor) -> Tensor:
    """The distances of each pair once; empty for one expert."""
    num_experts = distances_EE.shape[0]
    first, second = torch.triu_indices(num_experts, num_experts, offset=1)
    return distances_EE[first, second]
