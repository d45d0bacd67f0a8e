"""The ways to compute stacked experts, interchangeable: same values, same gradients.

loop      one expert after the other, in plain expressions. The reference.
blocked   the same, in one autograd function that keeps its temporaries small. For the CPU. Not for
          gated experts.
grouped   one `grouped_mm` per linear layer. bfloat16 on a GPU; never waits for the device.
dense     one batched product; needs the same number of rows for every expert, which
          `DenseDispatcher` gives it (`use_expert_backend` sets both). For export and compilers.
triton    kernels of our own: linear layer, bias, activation and dropout in one pass; never waits
          for the device either. Has to be asked for.

A back end takes `(experts, tokens_ND, tokens_per_expert_E)` and returns rows (N, D); what it makes
of rows behind the last expert's is undefined.

Shapes: E experts, N rows ordered expert by expert, D width, F hidden width, I and O the inputs and
outputs of one linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmoe_ltdr.kernels import triton_takes

if TYPE_CHECKING:
    from gmoe_ltdr.experts import StackedExperts

Weights = tuple[Tensor, "Tensor | None", Tensor, "Tensor | None"]


class UnfitBackendError(ValueError):
    """A back end that was asked for by name cannot compute these experts here."""


def compute_experts(
    experts: StackedExperts, tokens_ND: Tensor, tokens_per_expert_E: Tensor | Sequence[int]
) -> Tensor:
    """Run the back end that `experts.backend` names.

    Args:
        experts: Weights, activation, dropout.
        tokens_ND: Rows ordered expert by expert.
        tokens_per_expert_E: Rows of each expert. Equal numbers known to the host (a list) need no
            grouping, and go to the dense back end.
    """
    kind = tokens_ND.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if dtype is not None:
        tokens_ND = tokens_ND.to(dtype)
    name = experts.backend
    if not isinstance(tokens_per_expert_E, Tensor):
        counts, device = list(tokens_per_expert_E), tokens_ND.device
        # compared and not hashed: export with an open batch size needs the symbols
        if all(count == counts[0] for count in counts):
            name = "dense"
            tokens_per_expert_E = torch.full((len(counts),), counts[0], device=device)
        else:
            tokens_per_expert_E = torch.tensor(counts, device=device)
    if name == "auto":
        name = choose_backend(experts, tokens_ND)
    return EXPERT_BACKENDS[name](experts, tokens_ND, tokens_per_expert_E)


def choose_backend(experts: StackedExperts, tokens_ND: Tensor) -> str:
    """What "auto" stands for: by device, type and sizes. docs/engines.md has the measurements."""
    if tokens_ND.is_cuda or torch.compiler.is_compiling():
        return "grouped" if grouped_fits(experts, tokens_ND) else "loop"
    has_parameters = any(True for _ in experts.act.parameters())
    return "loop" if has_parameters or experts.gated else "blocked"


def grouped_possible(experts: StackedExperts, tokens_ND: Tensor) -> bool:
    """Whether there is a `grouped_mm`, and rows of the 16 bytes at a time that it loads."""
    row_bytes = [size * tokens_ND.element_size() for size in experts.fc2_weight.shape[1:]]
    return hasattr(F, "grouped_mm") and not any(size % 16 for size in row_bytes)


def grouped_fits(experts: StackedExperts, tokens_ND: Tensor) -> bool:
    """Whether `grouped_mm` takes these rows without falling back to a slow path."""
    if tokens_ND.dtype != torch.bfloat16 or not grouped_possible(experts, tokens_ND):
        return False
    return not tokens_ND.is_cuda or torch.cuda.get_device_capability(tokens_ND.device) >= (8, 0)


def triton_fits(experts: StackedExperts, tokens_ND: Tensor) -> bool:
    """Whether our kernels know this device, activation and type."""
    return (
        triton_takes(tokens_ND)
        and tokens_ND.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and type(experts.act) is nn.GELU
        and experts.act.approximate == "none"
    )


def weights_like(experts: StackedExperts, tokens_ND: Tensor) -> Weights:
    """The experts' weights in the rows' type: they differ under autocast."""
    dtype = tokens_ND.dtype
    return (
        experts.fc1_weight.to(dtype),
        None if experts.fc1_bias is None else experts.fc1_bias.to(dtype),
        experts.fc2_weight.to(dtype),
        None if experts.fc2_bias is None else experts.fc2_bias.to(dtype),
    )


def loop(experts: StackedExperts, tokens_ND: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    """One expert after the other. Waits for the device to learn how many rows each has."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights_like(experts, tokens_ND)
    counts = tokens_per_expert_E.tolist()
    unused = tokens_ND.shape[0] - sum(counts)
    *groups, _ = tokens_ND.split([*counts, unused])
    out = []
    for e, rows_nD in enumerate(groups):
        hidden_nF = F.linear(rows_nD, fc1_weight[e], None if fc1_bias is None else fc1_bias[e])
        hidden_nF = experts.drop(experts.act(hidden_nF))
        out.append(F.linear(hidden_nF, fc2_weight[e], None if fc2_bias is None else fc2_bias[e]))
    out.append(out[0].new_zeros(unused, fc2_weight.shape[1]))
    return torch.cat(out)


def blocked(experts: StackedExperts, tokens_ND: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    """See `blocked_experts.py`."""
    from gmoe_ltdr.blocked_experts import blocked_experts

    if experts.gated:
        raise ValueError(
            "the blocked back end computes plain experts only, and these are gated; use 'auto'"
        )
    return blocked_experts(
        tokens_ND,
        weights_like(experts, tokens_ND),
        tokens_per_expert_E.tolist(),
        act=experts.act,
        dropout=experts.drop.p if experts.training else 0.0,
    )


def dense(experts: StackedExperts, tokens_ND: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    """Batched products over experts that all have N / E rows."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights_like(experts, tokens_ND)
    tokens_EnD = tokens_ND.view(experts.num_experts, -1, tokens_ND.shape[-1])
    hidden_EnF = _batched_linear(tokens_EnD, fc1_weight, fc1_bias)
    hidden_EnF = experts.drop(experts.act(hidden_EnF))
    return _batched_linear(hidden_EnF, fc2_weight, fc2_bias).flatten(0, 1)


def _batched_linear(rows_EnI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
    if bias_EO is None:
        return torch.bmm(rows_EnI, weight_EOI.transpose(1, 2))
    return torch.baddbmm(bias_EO.unsqueeze(1), rows_EnI, weight_EOI.transpose(1, 2))


def grouped(experts: StackedExperts, tokens_ND: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    """`grouped_mm` on rows and offsets; the number of rows per expert stays on the device."""
    if not grouped_possible(experts, tokens_ND):
        _, dim, hidden_dim = experts.fc2_weight.shape
        raise UnfitBackendError(
            "the grouped back end needs torch.nn.functional.grouped_mm and rows of a multiple of "
            f"16 bytes; PyTorch is {torch.__version__}, rows are {dim} and {hidden_dim} values of "
            f"{tokens_ND.dtype}; use the back end 'auto'"
        )
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights_like(experts, tokens_ND)
    ends_E = tokens_per_expert_E.cumsum(0).to(torch.int32)
    hidden_NF = _grouped_linear(tokens_ND, fc1_weight, fc1_bias, ends_E)
    hidden_NF = experts.drop(experts.act(hidden_NF))
    return _grouped_linear(hidden_NF, fc2_weight, fc2_bias, ends_E)


def _grouped_linear(
    rows_NI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, ends_E: Tensor
) -> Tensor:
    out_NO = _GroupedProduct.apply(rows_NI, weight_EOI, ends_E)
    return out_NO if bias_EO is None else _AddGroupedBias.apply(out_NO, bias_EO, ends_E)


class _GroupedProduct(torch.autograd.Function):
    """Its own backward, for the layouts: autograd hands `grouped_mm` expanded gradients, which it
    refuses."""

    @staticmethod
    def forward(ctx, rows_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(rows_NI, weight_EOI, ends_E)
        return F.grouped_mm(rows_NI, weight_EOI.transpose(1, 2), offs=ends_E)

    @staticmethod
    def backward(ctx, grad_NO: Tensor):
        rows_NI, weight_EOI, ends_E = ctx.saved_tensors
        grad_NO = grad_NO.contiguous()
        grad_rows_NI = grad_weight_EOI = None
        if ctx.needs_input_grad[0]:
            grad_rows_NI = F.grouped_mm(grad_NO, weight_EOI, offs=ends_E)
        if ctx.needs_input_grad[1]:
            grad_weight_EOI = F.grouped_mm(grad_NO.t(), rows_NI, offs=ends_E)
        return grad_rows_NI, grad_weight_EOI, None


class _AddGroupedBias(torch.autograd.Function):
    """Adds each expert's bias to its rows. Backward is a product with ones, which leaves out the
    unused rows whatever they hold."""

    @staticmethod
    def forward(ctx, rows_NO: Tensor, bias_EO: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(ends_E)
        row_N = torch.arange(rows_NO.shape[0], device=rows_NO.device, dtype=torch.int32)
        expert_N = torch.searchsorted(ends_E, row_N, right=True).clamp(max=bias_EO.shape[0] - 1)
        return rows_NO + bias_EO[expert_N]

    @staticmethod
    def backward(ctx, grad_NO: Tensor):
        (ends_E,) = ctx.saved_tensors
        grad_NO = grad_NO.contiguous()
        # eight columns of ones, 16 bytes, so that an expert's first row is always aligned
        ones_N8 = grad_NO.new_ones(grad_NO.shape[0], 8)
        return grad_NO, F.grouped_mm(grad_NO.t(), ones_N8, offs=ends_E)[:, :, 0], None


def triton(experts: StackedExperts, tokens_ND: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    """See `triton_experts.py`."""
    from gmoe_ltdr.triton_experts import triton_experts

    if not triton_fits(experts, tokens_ND):
        raise UnfitBackendError(
            f"the triton back end needs Triton, a GPU of compute capability 8.0, exact GELU and "
            f"float32, bfloat16 or float16; these experts have {experts.act} and "
            f"{tokens_ND.dtype} rows on {tokens_ND.device}; use the back end 'auto'"
        )
    return triton_experts(
        tokens_ND,
        weights_like(experts, tokens_ND),
        tokens_per_expert_E,
        dropout=experts.drop.p if experts.training else 0.0,
    )


EXPERT_BACKENDS: dict[str, Callable[[StackedExperts, Tensor, Tensor], Tensor]] = {
    "loop": loop,
    "blocked": blocked,
    "grouped": grouped,
    "dense": dense,
    "triton": triton,
}
