"""Rows whose number does not depend on the data: nothing waits for the device.

The buffer has room for T * (most experts a token may have) rows. Rows stand expert by expert from
its head; what lies behind the last one is allocated and never computed, so its content is
undefined. Readers go through `rows_TE`, which names rows that exist and nothing else.

Shapes: T tokens, D width, E experts, N rows of the buffer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gmoe_ltdr.dispatch.base import Dispatched
from gmoe_ltdr.routing import Routing


@dataclass(frozen=True)
class StaticTicket:
    """Where every row came from and where it goes back to.

    Attributes:
        rows_TE: Row of each assignment; -1 where the token does not use the expert.
        source_N: t * E + e of each row; 0 for rows nobody uses.
        num_rows: int64 scalar tensor, how many rows are used.
        weights_TE: Combine weights, zero where `rows_TE` is -1.
        triton: Whether Triton kernels carry the rows.
    """

    rows_TE: Tensor
    source_N: Tensor
    num_rows: Tensor
    weights_TE: Tensor
    triton: bool = False


def dispatch_static(tokens_TD: Tensor, routing: Routing, *, triton: bool = False) -> Dispatched:
    """Copy each token once per expert, into a buffer of fixed size.

    Args:
        tokens_TD: The layer's tokens.
        routing: Who goes where.
        triton: Carry rows with our Triton kernels instead of plain expressions.
    """
    mask_TE = routing.dispatch_mask_TE
    num_tokens, num_experts = mask_TE.shape
    most = routing.max_experts_per_token or num_experts
    capacity = num_tokens * min(most, num_experts)

    # numbering the assignments of the transposed mask orders them by expert: no sort. As one flat
    # scan, which a GPU does in parallel; E scans along a column it would do step by step.
    mask_ET = mask_TE.T.contiguous()
    row_ET = mask_ET.view(-1).cumsum(0).view(num_experts, num_tokens) - 1
    tokens_per_expert_E = mask_ET.sum(1)
    index_ET = torch.arange(num_tokens * num_experts, device=mask_TE.device)
    index_ET = index_ET.view(num_tokens, num_experts).T
    # what is not assigned goes to one spare place behind the buffer
    source_N = row_ET.new_zeros(capacity + 1)
    place_ET = torch.where(mask_ET, row_ET, capacity)
    source_N = source_N.scatter(0, place_ET.reshape(-1), index_ET.reshape(-1))[:capacity]
    ticket = StaticTicket(
        rows_TE=torch.where(mask_ET, row_ET, -1).T.contiguous(),
        source_N=source_N,
        num_rows=tokens_per_expert_E.sum(),
        weights_TE=torch.where(mask_TE, routing.combine_weights_TE, 0.0),
        triton=triton,
    )
    tokens_ND = _CopyToRows.apply(
        tokens_TD, ticket.rows_TE, ticket.source_N, ticket.num_rows, triton
    )
    return Dispatched(tokens_ND, tokens_per_expert_E, ticket)


def combine_static(expert_out_ND: Tensor, ticket: StaticTicket) -> Tensor:
    """Weighted sum of each token's rows, added up in at least float32. (T, D)."""
    return _WeightedSum.apply(
        expert_out_ND,
        ticket.weights_TE,
        ticket.rows_TE,
        ticket.source_N,
        ticket.num_rows,
        ticket.triton,
    )


def sum_rows(rows_ND: Tensor, rows_TE: Tensor, weights_TE: Tensor | None) -> Tensor:
    """Each token's (weighted) sum of its rows, in the rows' type."""
    sum_dtype = torch.promote_types(rows_ND.dtype, torch.float32)
    if not rows_ND.shape[0]:
        return rows_ND.new_zeros(rows_TE.shape[0], rows_ND.shape[1])
    exists_TE1 = (rows_TE >= 0).unsqueeze(-1)
    # where() and not a product with zero: unused rows may hold NaN
    rows_TED = torch.where(exists_TE1, rows_ND[rows_TE.clamp(min=0)], 0.0).to(sum_dtype)
    if weights_TE is not None:
        rows_TED = rows_TED * weights_TE.to(sum_dtype).unsqueeze(-1)
    return rows_TED.sum(1).to(rows_ND.dtype)


def copy_rows(tokens_TD: Tensor, source_N: Tensor, num_experts: int) -> Tensor:
    """Row n is a copy of the token it came from."""
    return tokens_TD[source_N // num_experts]


def spread_gradient(
    grad_TD: Tensor, rows_ND: Tensor, weights_TE: Tensor, rows_TE: Tensor, source_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of a weighted sum: of the rows, and of the weights."""
    if not rows_ND.shape[0]:
        return torch.zeros_like(rows_ND), torch.zeros_like(weights_TE)
    sum_dtype = torch.promote_types(rows_ND.dtype, torch.float32)
    grad_rows_ND = grad_TD[source_N // rows_TE.shape[1]].to(sum_dtype)
    products_N = (grad_rows_ND * rows_ND).sum(-1)
    grad_weights_TE = torch.where(rows_TE >= 0, products_N[rows_TE.clamp(min=0)], 0.0)
    row_weights_N1 = weights_TE.reshape(-1)[source_N].to(sum_dtype).unsqueeze(-1)
    return (grad_rows_ND * row_weights_N1).to(rows_ND.dtype), grad_weights_TE.to(weights_TE.dtype)


class _CopyToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens_TD, rows_TE, source_N, num_rows, triton):
        ctx.save_for_backward(rows_TE)
        ctx.triton = triton
        if triton:
            from gmoe_ltdr.triton_rows import copy_rows_triton

            return copy_rows_triton(tokens_TD, source_N, num_rows, rows_TE.shape[1])
        return copy_rows(tokens_TD, source_N, rows_TE.shape[1])

    @staticmethod
    def backward(ctx, grad_ND: Tensor):
        (rows_TE,) = ctx.saved_tensors
        grad_TD = _sum(ctx.triton, grad_ND.contiguous(), rows_TE, None)
        return grad_TD, None, None, None, None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_ND, weights_TE, rows_TE, source_N, num_rows, triton):
        ctx.save_for_backward(rows_ND, weights_TE, rows_TE, source_N, num_rows)
        ctx.triton = triton
        return _sum(triton, rows_ND, rows_TE, weights_TE)

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        rows_ND, weights_TE, rows_TE, source_N, num_rows = ctx.saved_tensors
        grad_TD = grad_TD.contiguous()
        if ctx.triton:
            from gmoe_ltdr.triton_rows import spread_gradient_triton

            grads = spread_gradient_triton(grad_TD, rows_ND, weights_TE, source_N, num_rows)
        else:
            grads = spread_gradient(grad_TD, rows_ND, weights_TE, rows_TE, source_N)
        return *grads, None, None, None, None


def _sum(triton: bool, rows_ND: Tensor, rows_TE: Tensor, weights_TE: Tensor | None) -> Tensor:
    if triton:
        from gmoe_ltdr.triton_rows import sum_rows_triton

        return sum_rows_triton(rows_ND, rows_TE, weights_TE)
    return sum_rows(rows_ND, rows_TE, weights_TE)
