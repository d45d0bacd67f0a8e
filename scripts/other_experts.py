"""Other libraries' experts, for `bench_dispatch.py`: same weights, same plan, their kernels.

They take a plan as k expert ids and k weights per token. A plan in which tokens differ in how many
experts they have, LTDR's, cannot be said so. Neither library is needed by anything else here.

Shapes: T tokens, K experts per token, E experts, D model width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gmoe_ltdr.experts import StackedExperts
from gmoe_ltdr.routing import Routing

# (experts, tokens_TD, ids_TK, weights_TK) -> (T, D)
Compute = Callable[[StackedExperts, Tensor, Tensor, Tensor], Tensor]


class NotExpressibleError(ValueError):
    """A plan has no such form."""


def num_experts_of_every_token(routing: Routing) -> int:
    """K.

    Raises:
        NotExpressibleError: Tokens differ in it.
    """
    counts = routing.experts_per_token_T.unique().tolist()
    if len(counts) > 1:
        raise NotExpressibleError(
            f"n/a: its plan is k experts for every token, not {min(counts)} to {max(counts)}"
        )
    return int(counts[0])


def ids_and_weights(mask_TE: Tensor, weights_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A plan of k experts per token in the form that other libraries take."""
    ids_TK = mask_TE.byte().topk(k).indices
    return ids_TK, weights_TE.gather(1, ids_TK)


def scattermoe() -> Compute:
    """ScatterMoE (github.com/shawntan/scattermoe): two Triton products that read and write
    scattered rows."""
    from scattermoe import flatten_sort_count, parallel_linear

    def compute(
        experts: StackedExperts, tokens_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        dtype = _dtype_of(tokens_TD)
        order = flatten_sort_count(ids_TK, num_experts=experts.num_experts)
        hidden = parallel_linear(
            tokens_TD.to(dtype),
            experts.fc1_weight.to(dtype).transpose(1, 2),
            ids_TK.shape[1],
            *order,
            expert_biases=_cast(experts.fc1_bias, dtype),
            grouped_out=True,
        )
        return parallel_linear(
            experts.act(hidden),
            experts.fc2_weight.to(dtype).transpose(1, 2),
            1,
            *order,
            expert_biases=_cast(experts.fc2_bias, dtype),
            gates=weights_TK.to(dtype),
            grouped_in=True,
        )

    return compute


def megablocks() -> Compute:
    """MegaBlocks (github.com/databricks/megablocks), as its dropless layer with grouped products
    computes: bfloat16, experts without biases, row counts on the host."""
    from megablocks import grouped_gemm_util, ops

    grouped_gemm_util.assert_grouped_gemm_is_available()

    def compute(
        experts: StackedExperts, tokens_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        dtype = _dtype_of(tokens_TD)
        num_experts, k = experts.num_experts, ids_TK.shape[1]
        with torch.no_grad():
            ids_N = ids_TK.flatten().int()
            bin_ids, indices = ops.sort(ids_N, max((num_experts - 1).bit_length(), 1))
            counts_E = ops.histogram(ids_N, num_experts)
            bins = ops.inclusive_cumsum(counts_E, 0)
            on_host_E = counts_E.cpu().long()
        rows = ops.gather(tokens_TD.to(dtype), indices, bin_ids, bins, k)
        fc2_weight_EFD = experts.fc2_weight.to(dtype).transpose(1, 2).contiguous()
        gmm = grouped_gemm_util.ops.gmm
        hidden = experts.act(gmm(rows, experts.fc1_weight.to(dtype), on_host_E, trans_b=True))
        out = gmm(hidden, fc2_weight_EFD, on_host_E)
        return ops.scatter(out, indices, bin_ids, weights_TK.flatten().to(dtype), bins, k)

    return compute


OTHERS: dict[str, Callable[[], Compute]] = {"scattermoe": scattermoe, "megablocks": megablocks}
WITHOUT_BIASES = ("megablocks",)


def _dtype_of(tokens_TD: Tensor) -> torch.dtype:
    """What autocast would choose: their kernels do not know it."""
    device = tokens_TD.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tokens_TD.dtype


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)
