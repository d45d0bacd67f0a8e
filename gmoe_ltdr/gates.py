"""Gates: tokens to routing logits, always in float32.

Shapes: T tokens, D model width, E experts, P width of the cosine projection.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MAX_LOG_SCALE = math.log(100.0)


class LinearGate(nn.Module):
    """Z = X W^T, without bias (LTDR Eq. 6; Switch, GShard, DeepSpeed)."""

    def __init__(self, dim: int, num_experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        # what nn.Linear does, as Tutel and DeepSpeed leave it
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, tokens_TD: Tensor) -> Tensor:
        with torch.autocast(tokens_TD.device.type, enabled=False):
            return F.linear(tokens_TD.float(), self.weight.float())


class CosineGate(nn.Module):
    """Cosine similarity of projected tokens with one embedding per expert, times a learned scale.

    GMoE's default (Tutel's `cosine_top`; GMoE, arXiv 2206.04046). The scale starts at 2 and is
    clamped at 100; logits are bounded by it, and so is the routing-probability variance.

    Args:
        dim: Width of the tokens.
        num_experts: Number of experts.
        proj_dim: Width of the space in which angles are compared.
        init_temperature: 1 / initial scale.
    """

    def __init__(
        self, dim: int, num_experts: int, *, proj_dim: int = 256, init_temperature: float = 0.5
    ):
        super().__init__()
        self.proj = nn.Linear(dim, proj_dim)
        self.expert_embed = nn.Parameter(torch.randn(proj_dim, num_experts) * 0.01)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1.0 / init_temperature)))

    def forward(self, tokens_TD: Tensor) -> Tensor:
        with torch.autocast(tokens_TD.device.type, enabled=False):
            projected_TP = F.linear(
                tokens_TD.float(), self.proj.weight.float(), self.proj.bias.float()
            )
            # eps turns a zero vector into zero logits, hence uniform probabilities
            cosine_TE = F.normalize(projected_TP, dim=1, eps=1e-12) @ F.normalize(
                self.expert_embed.float(), dim=0, eps=1e-12
            )
            return cosine_TE * self.log_scale.float().clamp(max=_MAX_LOG_SCALE).exp()


GATES: dict[str, type[nn.Module]] = {"cosine": CosineGate, "linear": LinearGate}
