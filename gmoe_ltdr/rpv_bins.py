"""How the paper's figures sort tokens: by bins of routing-probability variance (RPV), and by rank.

Shapes: B images, L tokens per image, H bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The paper's three groups: the 13 % of an image's tokens with the highest RPV, the next, the next.
RANK_SHARE = 0.13
NUM_RANK_GROUPS = 3

_BIN_WIDTH = 0.01
_MANY_EXPERTS = 8  # beyond, bins of 0.01 are wider than what there is to see
_NUM_BINS_OF_MANY = 20


def largest_rpv(num_experts: int) -> float:
    """RPV of a token that is certain of one expert."""
    return (1 - 1 / num_experts) / num_experts


def num_rpv_bins(num_experts: int) -> int:
    """How many bins there are: 0.01 wide up to eight experts, else twenty equal ones."""
    if num_experts > _MANY_EXPERTS:
        return _NUM_BINS_OF_MANY
    # an epsilon keeps 0.16 / 0.01 at 16
    return max(1, -int(-(largest_rpv(num_experts) / _BIN_WIDTH - 1e-9) // 1))


def rpv_edges(num_experts: int) -> Tensor:
    """Edges of the bins, float64 (H + 1,). A bin holds its left edge; the last one also its right.

    Below nine experts the last bin may reach beyond the largest RPV there is.
    """
    num_bins = num_rpv_bins(num_experts)
    edges = torch.arange(num_bins + 1, dtype=torch.float64)
    if num_experts > _MANY_EXPERTS:
        return edges * (largest_rpv(num_experts) / num_bins)
    return edges * _BIN_WIDTH


def rpv_bin(rpv: Tensor, num_experts: int) -> Tensor:
    """The bin of each value, int64, of the same shape.

    Edges are rounded to the values' type, so that a float32 0.01 is on the edge 0.01 and not below.
    """
    edges = rpv_edges(num_experts).to(device=rpv.device, dtype=rpv.dtype)
    return (torch.searchsorted(edges, rpv, right=True) - 1).clamp(0, len(edges) - 2)


def rank_group(rpv_BL: Tensor, vision_BL: Tensor, *, share: float = RANK_SHARE) -> Tensor:
    """Which group by RPV a vision token is in: 0 for the highest share of its image, then 1, 2.

    All other tokens get 3. Ties by index. Int64 (B, L).
    """
    order_BL = torch.where(vision_BL, rpv_BL.double(), -torch.inf)
    order_BL = order_BL.sort(dim=-1, descending=True, stable=True).indices
    places_L = torch.arange(rpv_BL.shape[-1], device=rpv_BL.device).expand_as(order_BL)
    rank_BL = torch.empty_like(order_BL).scatter_(-1, order_BL, places_L)
    size_B1 = (vision_BL.sum(-1, keepdim=True).double() * share + 1e-9).floor().clamp(min=1)
    group_BL = (rank_BL // size_B1).long().clamp(max=NUM_RANK_GROUPS)
    return torch.where(vision_BL, group_BL, NUM_RANK_GROUPS)
