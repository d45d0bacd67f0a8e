"""Experts: E feed-forward networks of equal shape, their weights stacked.

Shapes: E experts here (e of them on this rank), N rows ordered expert by expert, D width, F hidden
width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StackedExperts(nn.Module):
    """Linear, activation, dropout, linear: once per expert.

    Args:
        num_experts: E.
        dim: D.
        hidden_dim: F.
        dropout: Between the two linear layers, in training (GMoE: 0.1).
        act_layer: Activation between them.
        bias: Whether the two linear layers have biases.

    Attributes:
        fc1_weight: (E, F, D), the axis order of nn.Linear with experts in front.
        fc1_bias: (E, F).
        fc2_weight: (E, D, F).
        fc2_bias: (E, D).
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        *,
        dropout: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        bias: tuple[bool, bool] = (True, True),
    ):
        super().__init__()
        self.fc1_weight = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.fc2_weight = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.fc1_bias = nn.Parameter(torch.empty(num_experts, hidden_dim)) if bias[0] else None
        self.fc2_bias = nn.Parameter(torch.empty(num_experts, dim)) if bias[1] else None
        self.act = act_layer()
        self.drop = nn.Dropout(dropout)
        self.reset_parameters()

    @property
    def num_experts(self) -> int:
        return self.fc1_weight.shape[0]

    def reset_parameters(self) -> None:
        """Initialise each expert as nn.Linear would."""
        for weight, bias in ((self.fc1_weight, self.fc1_bias), (self.fc2_weight, self.fc2_bias)):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    @torch.no_grad()
    def copy_from_dense_(self, fc1: nn.Linear, fc2: nn.Linear) -> None:
        """Make every expert a copy of one dense feed-forward network (upcycling)."""
        for stacked, dense in (
            (self.fc1_weight, fc1.weight),
            (self.fc1_bias, fc1.bias),
            (self.fc2_weight, fc2.weight),
            (self.fc2_bias, fc2.bias),
        ):
            if stacked is not None:
                stacked.copy_(dense.expand_as(stacked))

    def forward(self, tokens_ND: Tensor, tokens_per_expert_e: Tensor | Sequence[int]) -> Tensor:
        """Each expert computes its own rows.

        Args:
            tokens_ND: Rows ordered expert by expert.
            tokens_per_expert_e: How many rows belong to each; sums to N.
        """
        counts = (
            tokens_per_expert_e.tolist()
            if isinstance(tokens_per_expert_e, Tensor)
            else list(tokens_per_expert_e)
        )
        outputs = [
            self._expert(expert, rows_nD) for expert, rows_nD in enumerate(tokens_ND.split(counts))
        ]
        return torch.cat(outputs)

    def _expert(self, expert: int, rows_nD: Tensor) -> Tensor:
        fc1_bias = None if self.fc1_bias is None else self.fc1_bias[expert]
        fc2_bias = None if self.fc2_bias is None else self.fc2_bias[expert]
        hidden_nF = self.drop(self.act(F.linear(rows_nD, self.fc1_weight[expert], fc1_bias)))
        return F.linear(hidden_nF, self.fc2_weight[expert], fc2_bias)
