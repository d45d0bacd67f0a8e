"""Triton kernels that carry rows: tokens to their experts and results home, each row read once.

Imported only where Triton is there. Programs for rows behind the last used one return at once.

Shapes: T tokens, D width, E experts, N rows of the buffer; see `dispatch/static_rows.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _copy_kernel(
    tokens_ptr, source_ptr, num_rows_ptr, out_ptr, D, E,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    num_rows = tl.load(num_rows_ptr)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS >= num_rows:
        return
    column = tl.arange(0, BLOCK_D)
    token = tl.load(source_ptr + row, mask=row < num_rows, other=0) // E
    mask = (row < num_rows)[:, None] & (column < D)[None, :]
    value = tl.load(tokens_ptr + token[:, None] * D + column[None, :], mask=mask)
    tl.store(out_ptr + row[:, None] * D + column[None, :], value, mask=mask)


@triton.jit
def _sum_kernel(
    rows_ptr, rows_te_ptr, weights_ptr, out_ptr, T, D, E,
    WEIGHTED: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK_D)
    total = tl.zeros((TOKENS, BLOCK_D), dtype=tl.float32)
    for e in range(E):
        row = tl.load(rows_te_ptr + token * E + e, mask=token < T, other=-1)
        mask = (row >= 0)[:, None] & (column < D)[None, :]
        value = tl.load(rows_ptr + row[:, None] * D + column[None, :], mask=mask, other=0.0)
        value = value.to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weights_ptr + token * E + e, mask=token < T, other=0.0)
            value = value * weight.to(tl.float32)[:, None]
        total += value
    mask = (token < T)[:, None] & (column < D)[None, :]
    value = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token[:, None] * D + column[None, :], value, mask=mask)


@triton.jit
def _spread_kernel(
    grad_ptr, rows_ptr, weights_ptr, source_ptr, num_rows_ptr, grad_rows_ptr, grad_weights_ptr,
    D, E, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    num_rows = tl.load(num_rows_ptr)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS >= num_rows:
        return
    column = tl.arange(0, BLOCK_D)
    source = tl.load(source_ptr + row, mask=row < num_rows, other=0)
    weight = tl.load(weights_ptr + source, mask=row < num_rows, other=0.0).to(tl.float32)
    mask = (row < num_rows)[:, None] & (column < D)[None, :]
    place = row[:, None] * D + column[None, :]
    from_token = (source // E)[:, None] * D + column[None, :]
    grad = tl.load(grad_ptr + from_token, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(rows_ptr + place, mask=mask, other=0.0).to(tl.float32)
    product = tl.sum(grad * value, axis=1).to(grad_weights_ptr.dtype.element_ty)
    tl.store(grad_weights_ptr + source, product, mask=row < num_rows)
    grad_row = (grad * weight[:, None]).to(grad_rows_ptr.dtype.element_ty)
    tl.store(grad_rows_ptr + place, grad_row, mask=mask)


def _block(width: int) -> tuple[int, int]:
    """Rows per program and columns, about 2048 values together."""
    block_width = triton.next_power_of_2(width)
    return max(1, 2048 // block_width), block_width


def copy_rows_triton(
    tokens_TD: Tensor, source_N: Tensor, num_rows: Tensor, num_experts: int
) -> Tensor:
    """Row n of the result is token source_N[n] // E."""
    tokens_TD, (capacity, width) = tokens_TD.contiguous(), (len(source_N), tokens_TD.shape[1])
    out_ND = tokens_TD.new_empty(capacity, width)
    rows, block_width = _block(width)
    if capacity:
        _copy_kernel[(triton.cdiv(capacity, rows),)](
            tokens_TD, source_N, num_rows, out_ND, width, num_experts,
            ROWS=rows, BLOCK_D=block_width,
        )  # fmt: skip
    return out_ND


def sum_rows_triton(rows_ND: Tensor, rows_TE: Tensor, weights_TE: Tensor | None) -> Tensor:
    """Each token's (weighted) sum of its rows, added in float32, in the rows' type."""
    (num_tokens, num_experts), width = rows_TE.shape, rows_ND.shape[1]
    out_TD = rows_ND.new_empty(num_tokens, width)
    tokens, block_width = _block(width)
    if num_tokens:
        weighted = weights_TE is not None
        weights = weights_TE.contiguous() if weighted else rows_ND
        _sum_kernel[(triton.cdiv(num_tokens, tokens),)](
            rows_ND.contiguous(), rows_TE, weights, out_TD, num_tokens, width, num_experts,
            WEIGHTED=weighted, TOKENS=tokens, BLOCK_D=block_width,
        )  # fmt: skip
    return out_TD


def spread_gradient_triton(
    grad_TD: Tensor, rows_ND: Tensor, weights_TE: Tensor, source_N: Tensor, num_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the weighted sum: of the used rows, and of all weights."""
    (capacity, width), num_experts = rows_ND.shape, weights_TE.shape[1]
    grad_rows_ND = torch.empty_like(rows_ND)
    grad_weights_TE = torch.zeros_like(weights_TE, memory_format=torch.contiguous_format)
    rows, block_width = _block(width)
    if capacity:
        _spread_kernel[(triton.cdiv(capacity, rows),)](
            grad_TD, rows_ND.contiguous(), weights_TE.contiguous(), source_N, num_rows,
            grad_rows_ND, grad_weights_TE, width, num_experts, ROWS=rows, BLOCK_D=block_width,
        )  # fmt: skip
    return grad_rows_ND, grad_weights_TE
