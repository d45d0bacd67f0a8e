"""Every expert computes every token; the weights alone decide what counts.

No shape and no order depends on the data, so that `torch.export`, ONNX and any compiler take it.
Costs E / k times the multiply-adds: for export, and where nearly every expert is chosen anyway.

Shapes: T tokens, D width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gmoe_ltdr.dispatch.base import Dispatched
from gmoe_ltdr.routing import Routing


class DenseDispatcher:
    """Gives each expert all tokens, in order."""

    def dispatch(self, tokens_TD: Tensor, routing: Routing) -> Dispatched:
        device = tokens_TD.device.type
        if torch.is_autocast_enabled(device):
            tokens_TD = tokens_TD.to(torch.get_autocast_dtype(device))
        weights_TE = torch.where(routing.dispatch_mask_TE, routing.combine_weights_TE, 0.0)
        num_tokens, num_experts = weights_TE.shape
        tokens_ND = tokens_TD.repeat(num_experts, 1)
        tokens_per_expert_E = torch.full((num_experts,), num_tokens, device=tokens_TD.device)
        return Dispatched(tokens_ND, tokens_per_expert_E, weights_TE)

    def combine(self, expert_out_ND: Tensor, dispatched: Dispatched) -> Tensor:
        weights_TE = dispatched.ticket
        assert isinstance(weights_TE, Tensor)
        num_tokens, num_experts = weights_TE.shape
        sum_dtype = torch.promote_types(expert_out_ND.dtype, torch.float32)
        out_ETD = expert_out_ND.view(num_experts, num_tokens, expert_out_ND.shape[-1])
        # a sum and not a matrix product, which autocast would run in half precision
        out_TD = (out_ETD.to(sum_dtype) * weights_TE.T.to(sum_dtype).unsqueeze(-1)).sum(0)
        return out_TD.to(expert_out_ND.dtype)

    def __deepcopy__(self, memo: dict) -> DenseDispatcher:
        return self
