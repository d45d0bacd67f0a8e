"""Experts as Triton kernels: a linear layer, its bias, GELU and dropout in one pass over the rows.

Between the two linear layers lies the widest tensor of the layer. Plain expressions read and write
it once for the bias, once for the activation and once for dropout, unused rows included; here each
happens while the product's tile is in registers. What every expert has to do is read from the
device: tiles behind an expert's last row do not exist, programs without a tile return at once.

Sums are float32 whatever the inputs are. Dropout draws from a seed that is a tensor, so that CUDA
graphs and activation checkpointing replay it like any other random number.

Shapes: E experts, N rows ordered expert by expert, D width, F hidden width, I and O the inputs and
outputs of one linear layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from gmoe_ltdr.kernels import triton_interprets


def _configs(*shapes: tuple[int, int, int, int, int]) -> list[triton.Config]:
    """Candidates (rows, columns, depth, warps, stages); the interpreter takes the first."""
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=w, num_stages=s)
        for m, n, k, w, s in (shapes[:1] if triton_interprets() else shapes)
    ]


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_slope(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(
        -0.5 * x * x
    )


@triton.jit
def _mix(x):
    """A permutation of 32-bit integers that leaves no visible pattern (lowbias32, C. Wellons)."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _kept(seed_ptr, place, p):
    """What dropout multiplies with: 0, or 1 / (1 - p).

    Hashing place and seed is much less code than Triton's Philox, with which the kernel took ten
    seconds to compile; a mask needs no more.
    """
    seed = _mix(tl.load(seed_ptr).to(tl.uint32))
    uniform = (_mix(_mix(place.to(tl.uint32) ^ seed) + seed) >> 8).to(tl.float32) * 5.9604645e-08
    return tl.where(uniform >= p, 1.0 / (1.0 - p), 0.0)


@triton.autotune(
    configs=_configs((64, 64, 32, 4, 3), (128, 128, 64, 8, 3), (128, 256, 64, 8, 3)),
    key=["num_in", "num_out", "MODE", "TYPE"],
)
@triton.jit
def _linear_kernel(
    rows_ptr, weight_ptr, bias_ptr, ends_ptr, seed_ptr, pre_ptr, out_ptr, hidden_ptr,
    num_in, num_out, stride_e, stride_o, stride_i, p,
    E: tl.constexpr, MODE: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    TYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = rows @ weight[e].T, and by MODE:

    0  + bias;
    1  pre = that + bias, out = dropout(gelu(pre));
    2  out = that * slope of dropout(gelu) at pre, hidden = dropout(gelu(pre)).
    """
    column_tiles = tl.cdiv(num_out, BLOCK_N)
    row_tile = tl.program_id(0) // column_tiles
    column_tile = tl.program_id(0) % column_tiles
    # which expert's tile is this? Tiles are numbered expert by expert.
    expert, first_row, last_row, tiles_before, start = -1, 0, 0, 0, 0
    for e in range(E):
        end = tl.load(ends_ptr + e)
        tiles = tl.cdiv(end - start, BLOCK_M)
        if (row_tile >= tiles_before) & (row_tile < tiles_before + tiles):
            expert = e
            first_row = start + (row_tile - tiles_before) * BLOCK_M
            last_row = end
        tiles_before += tiles
        start = end
    if expert < 0:
        return

    m = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    m_mask, n_mask = m < last_row, n < num_out
    rows_ptrs = rows_ptr + m[:, None] * num_in + k[None, :]
    weight_ptr += expert.to(tl.int64) * stride_e
    weight_ptrs = weight_ptr + n[None, :] * stride_o + k[:, None] * stride_i
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, num_in, BLOCK_K):
        k_mask = k + k0 < num_in
        a = tl.load(rows_ptrs, mask=m_mask[:, None] & k_mask[None, :], other=0.0)
        b = tl.load(weight_ptrs, mask=k_mask[:, None] & n_mask[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        rows_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K * stride_i

    place = m[:, None] * num_out + n[None, :]
    mask = m_mask[:, None] & n_mask[None, :]
    element = out_ptr.dtype.element_ty
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert * num_out + n, mask=n_mask, other=0.0)
        total += bias.to(tl.float32)[None, :]
    if MODE == 1:
        tl.store(pre_ptr + place, total.to(element), mask=mask)
        total = _gelu(total)
        if DROPOUT:
            total = total * _kept(seed_ptr, place, p)
    if MODE == 2:
        pre = tl.load(pre_ptr + place, mask=mask, other=0.0).to(tl.float32)
        hidden = _gelu(pre)
        total = total * _gelu_slope(pre)
        if DROPOUT:
            kept = _kept(seed_ptr, place, p)
            hidden = hidden * kept
            total = total * kept
        tl.store(hidden_ptr + place, hidden.to(element), mask=mask)
    tl.store(out_ptr + place, total.to(element), mask=mask)


@triton.autotune(
    configs=_configs((64, 64, 32, 4, 3), (128, 128, 64, 8, 3), (128, 64, 64, 4, 4)),
    key=["num_in", "num_out", "TYPE"],
)
@triton.jit
def _weight_gradient_kernel(
    grad_ptr, rows_ptr, ends_ptr, grad_weight_ptr, grad_bias_ptr, num_in, num_out,
    HAS_BIAS: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_weight[e] = grad.T @ rows and grad_bias[e] = grad.sum(0), over the rows of expert e."""
    expert = tl.program_id(2)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    o = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_mask, i_mask = o < num_out, i < num_in
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    bias_total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for first in range(start, end, BLOCK_K):
        row = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
        row_mask = row < end
        grad = tl.load(
            grad_ptr + row[None, :] * num_out + o[:, None],
            mask=o_mask[:, None] & row_mask[None, :], other=0.0,
        )  # fmt: skip
        rows = tl.load(
            rows_ptr + row[:, None] * num_in + i[None, :],
            mask=row_mask[:, None] & i_mask[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(grad, rows, total, input_precision=PRECISION)
        if HAS_BIAS:
            bias_total += tl.sum(grad.to(tl.float32), axis=1)
    base = expert.to(tl.int64) * num_out
    place = (base + o)[:, None] * num_in + i[None, :]
    element = grad_weight_ptr.dtype.element_ty
    tl.store(grad_weight_ptr + place, total.to(element), mask=o_mask[:, None] & i_mask[None, :])
    if HAS_BIAS:
        if tl.program_id(0) == 0:
            tl.store(grad_bias_ptr + base + o, bias_total.to(element), mask=o_mask)


def triton_experts(
    tokens_ND: Tensor,
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    tokens_per_expert_E: Tensor,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """Linear, exact GELU, dropout, linear: each expert on its own rows.

    Args:
        tokens_ND: Rows ordered expert by expert.
        weights: fc1_weight (E, F, D), fc1_bias (E, F), fc2_weight (E, D, F), fc2_bias (E, D).
        tokens_per_expert_E: Rows of each expert, on the device.
        dropout: Probability of zeroing a hidden value.
    """
    ends_E = tokens_per_expert_E.cumsum(0).to(torch.int32)
    seed = None
    if dropout > 0:
        seed = torch.randint(2**31 - 1, (1,), device=tokens_ND.device, dtype=torch.int32)
    return _TritonExperts.apply(tokens_ND, *weights, ends_E, seed, dropout)


class _TritonExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens_ND, fc1_weight, fc1_bias, fc2_weight, fc2_bias, ends_E, seed, p):
        tokens_ND = tokens_ND.contiguous()
        pre_NF = tokens_ND.new_empty(tokens_ND.shape[0], fc1_weight.shape[1])
        dropout = {"seed": seed, "p": p}
        hidden_NF = _linear(
            tokens_ND, fc1_weight, fc1_bias, ends_E, mode=1, pre_NO=pre_NF, **dropout
        )
        out_ND = _linear(hidden_NF, fc2_weight, fc2_bias, ends_E)
        ctx.save_for_backward(tokens_ND, fc1_weight, fc2_weight, ends_E, seed, pre_NF)
        ctx.p = p
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND: Tensor):
        tokens_ND, fc1_weight, fc2_weight, ends_E, seed, pre_NF = ctx.saved_tensors
        grad_ND = grad_ND.contiguous()
        hidden_NF = torch.empty_like(pre_NF)
        grad_pre_NF = _linear(
            grad_ND, fc2_weight.transpose(1, 2), None, ends_E,
            mode=2, pre_NO=pre_NF, hidden_NO=hidden_NF, seed=seed, p=ctx.p,
        )  # fmt: skip
        needs_tokens, needs_w1, needs_b1, needs_w2, needs_b2 = ctx.needs_input_grad[:5]
        grad_tokens_ND = grad_w1 = grad_b1 = grad_w2 = grad_b2 = None
        if needs_w2 or needs_b2:
            grad_w2, grad_b2 = _weight_gradient(grad_ND, hidden_NF, ends_E, bias=needs_b2)
        if needs_w1 or needs_b1:
            grad_w1, grad_b1 = _weight_gradient(grad_pre_NF, tokens_ND, ends_E, bias=needs_b1)
        if needs_tokens:
            grad_tokens_ND = _linear(grad_pre_NF, fc1_weight.transpose(1, 2), None, ends_E)
        return grad_tokens_ND, grad_w1, grad_b1, grad_w2, grad_b2, None, None, None


def _linear(
    rows_NI: Tensor,
    weight_EOI: Tensor,
    bias_EO: Tensor | None,
    ends_E: Tensor,
    *,
    mode: int = 0,
    pre_NO: Tensor | None = None,
    hidden_NO: Tensor | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """One pass of `_linear_kernel`; see there for the modes."""
    (num_rows, num_in), (num_experts, num_out, _) = rows_NI.shape, weight_EOI.shape
    out_NO = rows_NI.new_empty(num_rows, num_out)
    if not num_rows:
        return out_NO

    def grid(meta):
        # every expert may leave its last tile partly empty
        row_tiles = triton.cdiv(num_rows, meta["BLOCK_M"]) + num_experts
        return (row_tiles * triton.cdiv(num_out, meta["BLOCK_N"]),)

    _linear_kernel[grid](
        rows_NI, weight_EOI, ends_E if bias_EO is None else bias_EO.contiguous(), ends_E,
        ends_E if seed is None else seed, out_NO if pre_NO is None else pre_NO,
        out_NO, out_NO if hidden_NO is None else hidden_NO,
        num_in, num_out, *weight_EOI.stride(), p,
        E=num_experts, MODE=mode, HAS_BIAS=bias_EO is not None, DROPOUT=p > 0,
        TYPE=str(rows_NI.dtype), PRECISION=_precision(),
    )  # fmt: skip
    return out_NO


def _weight_gradient(
    grad_NO: Tensor, rows_NI: Tensor, ends_E: Tensor, *, bias: bool
) -> tuple[Tensor, Tensor | None]:
    num_experts, num_out, num_in = len(ends_E), grad_NO.shape[1], rows_NI.shape[1]
    grad_weight_EOI = rows_NI.new_empty(num_experts, num_out, num_in)
    grad_bias_EO = rows_NI.new_empty(num_experts, num_out) if bias else None

    def grid(meta):
        return (
            triton.cdiv(num_in, meta["BLOCK_N"]),
            triton.cdiv(num_out, meta["BLOCK_M"]),
            num_experts,
        )

    _weight_gradient_kernel[grid](
        grad_NO, rows_NI, ends_E, grad_weight_EOI, grad_bias_EO if bias else ends_E,
        num_in, num_out, HAS_BIAS=bias, TYPE=str(rows_NI.dtype), PRECISION=_precision(),
    )  # fmt: skip
    return grad_weight_EOI, grad_bias_EO


def _precision() -> str:
    """Float32 products follow PyTorch's own switch."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
