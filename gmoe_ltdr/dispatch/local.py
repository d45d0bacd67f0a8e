"""All experts on one device.

Rows travel by gathers in both directions. Copying a token to its experts is a gather whose backward
sums the copies' gradients; combining is that same sum, weighted, whose backward is the gather. Left
to autograd, both sums would be scatters of rows, which cost as much as an expert.

There are two layouts of the rows. Eager code on a CPU makes exactly as many rows as there are
assignments (this file). On a GPU, and wherever a compiler looks on, the number of rows must not
depend on the data, or the host would have to wait for it: see `static_rows.py`.

Shapes: T tokens, D width, E experts, N = number of (token, expert) assignments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gmoe_ltdr.dispatch.base import Dispatched
from gmoe_ltdr.dispatch.static_rows import StaticTicket, combine_static, dispatch_static
from gmoe_ltdr.kernels import triton_takes
from gmoe_ltdr.routing import Routing


@dataclass(frozen=True)
class _Ticket:
    """Where every row came from and where it goes back to.

    Attributes:
        token_ids_N: Token of each row, rows ordered expert by expert.
        row_ids_N: Row of each assignment, assignments ordered token by token.
        starts_T: First assignment of each token in `row_ids_N`.
        weights_N: Combine weights, ordered token by token.
    """

    token_ids_N: Tensor
    row_ids_N: Tensor
    starts_T: Tensor
    weights_N: Tensor


class LocalDispatcher:
    """Copies each token once per expert, and adds the weighted results.

    Args:
        triton: Carry rows with our Triton kernels, where there are any; part of the "triton" expert
            back end.
    """

    def __init__(self, *, triton: bool = False):
        self.triton = triton

    def dispatch(self, tokens_TD: Tensor, routing: Routing) -> Dispatched:
        device = tokens_TD.device.type
        if torch.is_autocast_enabled(device):  # the experts would convert every copy
            tokens_TD = tokens_TD.to(torch.get_autocast_dtype(device))
        triton = self.triton and triton_takes(tokens_TD)
        if tokens_TD.is_cuda or triton or torch.compiler.is_compiling():
            return dispatch_static(tokens_TD, routing, triton=triton)

        mask_TE = routing.dispatch_mask_TE
        tokens_per_expert_E = mask_TE.sum(0)
        # the transposed mask read row by row is ordered by expert: no sort
        token_ids_N = mask_TE.T.nonzero(as_tuple=True)[1]
        row_TE = mask_TE.cumsum(0) + (tokens_per_expert_E.cumsum(0) - tokens_per_expert_E) - 1
        experts_per_token_T = mask_TE.sum(1)
        ticket = _Ticket(
            token_ids_N=token_ids_N,
            row_ids_N=row_TE[mask_TE],
            starts_T=experts_per_token_T.cumsum(0) - experts_per_token_T,
            weights_N=routing.combine_weights_TE[mask_TE],
        )
        tokens_ND = _CopyToRows.apply(tokens_TD, ticket)
        return Dispatched(tokens_ND, tokens_per_expert_E, ticket)

    def combine(self, expert_out_ND: Tensor, dispatched: Dispatched) -> Tensor:
        ticket = dispatched.ticket
        if isinstance(ticket, StaticTicket):
            return combine_static(expert_out_ND, ticket)
        assert isinstance(ticket, _Ticket)
        # at least float32, so that the sum of several bf16 experts is rounded once
        sum_dtype = torch.promote_types(expert_out_ND.dtype, torch.float32)
        out_TD = _WeightedSum.apply(
            expert_out_ND.to(sum_dtype), ticket.weights_N.to(sum_dtype), ticket
        )
        return out_TD.to(expert_out_ND.dtype)

    def __deepcopy__(self, memo: dict) -> LocalDispatcher:
        return self


def _sum_rows(rows_ND: Tensor, ticket: _Ticket, weights_N: Tensor | None = None) -> Tensor:
    """Each token's (weighted) sum of its rows, zero for a token without any. (T, D)."""
    if not len(rows_ND):
        return rows_ND.new_zeros(len(ticket.starts_T), rows_ND.shape[-1])
    return F.embedding_bag(
        ticket.row_ids_N, rows_ND, ticket.starts_T, mode="sum", per_sample_weights=weights_N
    )


class _CopyToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens_TD: Tensor, ticket: _Ticket) -> Tensor:
        ctx.ticket = ticket
        return tokens_TD.index_select(0, ticket.token_ids_N)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND: Tensor):
        sum_dtype = torch.promote_types(grad_ND.dtype, torch.float32)
        return _sum_rows(grad_ND.to(sum_dtype), ctx.ticket).to(grad_ND.dtype), None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_ND: Tensor, weights_N: Tensor, ticket: _Ticket) -> Tensor:
        ctx.ticket = ticket
        ctx.save_for_backward(rows_ND, weights_N)
        return _sum_rows(rows_ND, ticket, weights_N)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD: Tensor):
        rows_ND, weights_N = ctx.saved_tensors
        ticket = ctx.ticket
        grad_rows_ND = grad_TD.index_select(0, ticket.token_ids_N)
        # a batch of dot products: (N, 1, D) @ (N, D, 1), without the products in memory
        products_N = torch.bmm(grad_rows_ND.unsqueeze(1), rows_ND.unsqueeze(2)).view(-1)
        row_weights_N = torch.empty_like(weights_N)
        row_weights_N[ticket.row_ids_N] = weights_N
        grad_rows_ND *= row_weights_N.unsqueeze(-1)
        return grad_rows_ND, products_N[ticket.row_ids_N], None
