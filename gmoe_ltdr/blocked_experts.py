"""Experts on a CPU: one autograd function, block by block.

On a CPU the products are as fast as they get; what is left is memory, every fresh page of which
the kernel hands out with a fault and zeroes. So only one tensor of hidden width is kept per row
(the value before the activation), half of what autograd would keep; the activation and the
gradients between the two linear layers live in one block's scratch memory, which is used again.
Products are written in place; nothing is concatenated.

Shapes: E experts, N rows ordered expert by expert, n rows of one block, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Rows that are computed at once. Measured at D=384, F=1536: with 256 or 512 the matrix products are
# too small, beyond 2048 nothing is gained.
BLOCK_ROWS = 2048


def blocked_experts(
    tokens_ND: Tensor,
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    counts: Sequence[int],
    *,
    act: Callable[[Tensor], Tensor],
    dropout: float = 0.0,
) -> Tensor:
    """Linear, activation, dropout, linear: each expert on its own rows.

    Args:
        tokens_ND: Rows ordered expert by expert.
        weights: fc1_weight (E, F, D), fc1_bias (E, F), fc2_weight (E, D, F), fc2_bias (E, D).
        counts: Rows of each expert.
        act: Elementwise, without parameters.
        dropout: Probability of zeroing a hidden value.
    """
    keep = torch.is_grad_enabled()  # not known inside: a function's forward runs without gradients
    return _BlockedExperts.apply(tokens_ND, *weights, tuple(counts), act, dropout, keep)


def blocks(counts: Sequence[int]) -> Iterator[tuple[int, slice, slice, bool]]:
    """Expert, rows, the same rows counted from the block's start, and whether it is the expert's
    first block. Blocks of one expert are of equal size but for rounding."""
    start = 0
    for expert, count in enumerate(counts):
        num_blocks = -(-count // BLOCK_ROWS)
        for block in range(num_blocks):
            first, last = count * block // num_blocks, count * (block + 1) // num_blocks
            yield expert, slice(start + first, start + last), slice(0, last - first), block == 0
        start += count


class _BlockedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens_ND, fc1_weight, fc1_bias, fc2_weight, fc2_bias, counts, act, p, keep):
        num_rows, hidden_dim = tokens_ND.shape[0], fc1_weight.shape[1]
        scratch_nF = tokens_ND.new_empty(_largest_block(counts), hidden_dim)
        # without gradients the values before the activation are scratch too
        pre_NF = tokens_ND.new_empty(num_rows, hidden_dim) if keep else scratch_nF
        kept_NF = None
        if p > 0:
            kept_NF = torch.empty(num_rows, hidden_dim, dtype=torch.bool, device=tokens_ND.device)
            kept_NF.bernoulli_(1 - p)
        out_ND = tokens_ND.new_empty(num_rows, fc2_weight.shape[1])
        for e, rows, block, _ in blocks(counts):
            pre_nF = pre_NF[rows if keep else block]
            _linear(tokens_ND[rows], fc1_weight[e], fc1_bias, e, out=pre_nF)
            hidden_nF = _activate(act, pre_nF, out=scratch_nF[block])
            if kept_NF is not None:
                hidden_nF.mul_(kept_NF[rows]).mul_(1 / (1 - p))
            _linear(hidden_nF, fc2_weight[e], fc2_bias, e, out=out_ND[rows])
        if keep:
            ctx.save_for_backward(tokens_ND, fc1_weight, fc2_weight, pre_NF, kept_NF)
            ctx.counts, ctx.act, ctx.p = counts, act, p
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND: Tensor):
        tokens_ND, fc1_weight, fc2_weight, pre_NF, kept_NF = ctx.saved_tensors
        counts = ctx.counts
        needs_tokens, needs_w1, needs_b1, needs_w2, needs_b2 = ctx.needs_input_grad[:5]
        grad_ND = grad_ND.contiguous()
        scratch_nF = tokens_ND.new_empty(_largest_block(counts), fc1_weight.shape[1])
        grad_scratch_nF = torch.empty_like(scratch_nF)
        grad_tokens_ND = torch.empty_like(tokens_ND) if needs_tokens else None
        grad_w1 = _empty_gradient(fc1_weight, counts) if needs_w1 else None
        grad_w2 = _empty_gradient(fc2_weight, counts) if needs_w2 else None
        grad_b1 = fc1_weight.new_zeros(fc1_weight.shape[:2]) if needs_b1 else None
        grad_b2 = fc2_weight.new_zeros(fc2_weight.shape[:2]) if needs_b2 else None
        for e, rows, block, first in blocks(counts):
            grad_nD, pre_nF = grad_ND[rows], pre_NF[rows]
            grad_nF = torch.mm(grad_nD, fc2_weight[e], out=grad_scratch_nF[block])
            hidden_nF = _activate(ctx.act, pre_nF, out=scratch_nF[block])
            if kept_NF is not None:
                scale = 1 / (1 - ctx.p)
                hidden_nF.mul_(kept_NF[rows]).mul_(scale)
                grad_nF.mul_(kept_NF[rows]).mul_(scale)
            if grad_w2 is not None:
                _add_product(grad_w2[e], grad_nD.t(), hidden_nF, first=first)
            if grad_b2 is not None:
                grad_b2[e] += grad_nD.sum(0)
            grad_nF = _activation_gradient(ctx.act, pre_nF, grad_nF)
            if grad_w1 is not None:
                _add_product(grad_w1[e], grad_nF.t(), tokens_ND[rows], first=first)
            if grad_b1 is not None:
                grad_b1[e] += grad_nF.sum(0)
            if grad_tokens_ND is not None:
                torch.mm(grad_nF, fc1_weight[e], out=grad_tokens_ND[rows])
        return grad_tokens_ND, grad_w1, grad_b1, grad_w2, grad_b2, None, None, None, None


def _largest_block(counts: Sequence[int]) -> int:
    return max((block.stop for _, _, block, _ in blocks(counts)), default=0)


def _linear(rows_nI: Tensor, weight_OI: Tensor, bias_EO: Tensor | None, expert: int, *, out):
    if bias_EO is None:
        return torch.mm(rows_nI, weight_OI.t(), out=out)
    return torch.addmm(bias_EO[expert], rows_nI, weight_OI.t(), out=out)


def _add_product(total_OI: Tensor, left_On: Tensor, right_nI: Tensor, *, first: bool) -> None:
    if first:
        torch.mm(left_On, right_nI, out=total_OI)
    else:
        total_OI.addmm_(left_On, right_nI)


def _empty_gradient(weight: Tensor, counts: Sequence[int]) -> Tensor:
    """Room for a gradient; zero for experts without rows, which nothing else will write."""
    grad = torch.empty_like(weight)
    for expert, count in enumerate(counts):
        if not count:
            grad[expert].zero_()
    return grad


def _activate(act: Callable[[Tensor], Tensor], pre_nF: Tensor, *, out: Tensor) -> Tensor:
    if type(act) is nn.GELU:
        return torch.ops.aten.gelu.out(pre_nF, approximate=act.approximate, out=out)
    return out.copy_(act(pre_nF.clone()))  # a copy, for an activation that works in place


def _activation_gradient(act: Callable, pre_nF: Tensor, grad_nF: Tensor) -> Tensor:
    """Gradient before the activation, written over the one behind it."""
    if type(act) is nn.GELU:
        return torch.ops.aten.gelu_backward.grad_input(
            grad_nF, pre_nF, approximate=act.approximate, grad_input=grad_nF
        )
    with torch.enable_grad():
        leaf_nF = pre_nF.detach().requires_grad_()
        hidden_nF = act(leaf_nF.clone())
    return grad_nF.copy_(torch.autograd.grad(hidden_nF, leaf_nF, grad_nF)[0])
