"""Stand-ins for ScatterMoE and MegaBlocks: their functions' contracts, in plain expressions."""

from __future__ import annotations

import sys
import types

import torch
from torch import Tensor


def flatten_sort_count(expert_idxs: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Flat assignments ordered by expert, where each came from, and the experts' ends."""
    flat = expert_idxs.flatten()
    in_order, scattered = torch.sort(flat)
    return in_order, scattered, flat.bincount(minlength=num_experts).cumsum(-1)


def parallel_linear(
    inputs,
    expert_weights,
    k,
    sorted_expert_idxs,
    sorted_scattered_idxs,
    expert_offsets,
    expert_biases=None,
    gates=None,
    grouped_in=False,
    grouped_out=False,
):
    """A linear layer per assignment, inputs and outputs in order of expert or of token."""
    rows = inputs if grouped_in else inputs[sorted_scattered_idxs // k]
    weights = expert_weights[sorted_expert_idxs]
    out = torch.einsum("ni,nio->no", rows, weights)
    if expert_biases is not None:
        out = out + expert_biases[sorted_expert_idxs]
    if grouped_out:
        return out
    by_token = torch.empty_like(out).index_copy(0, sorted_scattered_idxs, out)
    if gates is None:
        return by_token
    return (gates.unsqueeze(-1) * by_token.view(*gates.shape, -1)).sum(1)


def gather(x, indices, bin_ids, bins, top_k):
    """Copies of the tokens, in order of expert."""
    assert bins[-1] == len(indices)
    return x[indices // top_k]


def scatter(x, indices, bin_ids, weights, bins, top_k):
    """The weighted sum of each token's rows."""
    back = torch.empty_like(x).index_copy(0, indices.long(), x)
    return (weights.view(-1, top_k, 1) * back.view(-1, top_k, x.shape[-1])).sum(1)


def gmm(a, b, batch_sizes, trans_b=False):
    """A product per group of rows."""
    assert batch_sizes.device.type == "cpu"
    assert batch_sizes.dtype == torch.int64
    rows = a.split(batch_sizes.tolist())
    return torch.cat([r @ (w.T if trans_b else w) for r, w in zip(rows, b, strict=True)])


def sort(x, end_bit):
    assert int(x.max()) < 2**end_bit
    return torch.sort(x)


def install(monkeypatch) -> None:
    """Make both importable."""
    scattermoe = types.ModuleType("scattermoe")
    scattermoe.flatten_sort_count, scattermoe.parallel_linear = flatten_sort_count, parallel_linear
    ops = types.SimpleNamespace(
        sort=sort,
        histogram=lambda x, bins: torch.bincount(x, minlength=bins).int(),
        inclusive_cumsum=lambda x, dim: x.cumsum(dim),
        gather=gather,
        scatter=scatter,
    )
    grouped = types.SimpleNamespace(
        ops=types.SimpleNamespace(gmm=gmm), assert_grouped_gemm_is_available=lambda: None
    )
    megablocks = types.ModuleType("megablocks")
    megablocks.ops, megablocks.grouped_gemm_util = ops, grouped
    monkeypatch.setitem(sys.modules, "scattermoe", scattermoe)
    monkeypatch.setitem(sys.modules, "megablocks", megablocks)
