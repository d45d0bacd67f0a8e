"""Experts: E feed-forward networks of equal shape, their weights stacked.

Shapes: E experts here (e of them on this rank), N rows ordered expert by expert, D width, F hidden
width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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
        hidden_NF = grouped_linear(tokens_ND, self.fc1_weight, self.fc1_bias, counts)
        hidden_NF = self.drop(self.act(hidden_NF))
        return grouped_linear(hidden_NF, self.fc2_weight, self.fc2_bias, counts)


def grouped_linear(
    rows_NI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, counts: Sequence[int]
) -> Tensor:
    """Linear layer e on the e-th group of rows.

    Results are written in place group by group; nothing is concatenated, forward or backward.

    Args:
        rows_NI: Rows ordered group by group.
        weight_EOI: One weight per group.
        bias_EO: One bias per group, or None.
        counts: Rows of each group; sums to N.
    """
    device = rows_NI.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        rows_NI, weight_EOI = rows_NI.to(dtype), weight_EOI.to(dtype)
        bias_EO = None if bias_EO is None else bias_EO.to(dtype)
    return _GroupedLinear.apply(rows_NI, weight_EOI, bias_EO, tuple(counts))


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_NI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, counts):
        ctx.save_for_backward(rows_NI, weight_EOI)
        ctx.counts, ctx.has_bias = counts, bias_EO is not None
        out_NO = rows_NI.new_empty(rows_NI.shape[0], weight_EOI.shape[1])
        groups = zip(rows_NI.split(counts), out_NO.split(counts), strict=True)
        for group, (rows_nI, out_nO) in enumerate(groups):
            if bias_EO is None:
                torch.mm(rows_nI, weight_EOI[group].t(), out=out_nO)
            else:
                torch.addmm(bias_EO[group], rows_nI, weight_EOI[group].t(), out=out_nO)
        return out_NO

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NO: Tensor):
        rows_NI, weight_EOI = ctx.saved_tensors
        counts = ctx.counts
        needs_rows, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_groups = grad_NO.contiguous().split(counts)
        grad_rows_NI = grad_weight_EOI = grad_bias_EO = None
        if needs_rows:
            grad_rows_NI = torch.empty_like(rows_NI)
            for group, grad_rows_nI in enumerate(grad_rows_NI.split(counts)):
                torch.mm(grad_groups[group], weight_EOI[group], out=grad_rows_nI)
        if needs_weight:
            grad_weight_EOI = torch.empty_like(weight_EOI)
            for group, rows_nI in enumerate(rows_NI.split(counts)):
                torch.mm(grad_groups[group].t(), rows_nI, out=grad_weight_EOI[group])
        if ctx.has_bias and needs_bias:
            grad_bias_EO = torch.stack([grad_nO.sum(0) for grad_nO in grad_groups])
        return grad_rows_NI, grad_weight_EOI, grad_bias_EO, None
