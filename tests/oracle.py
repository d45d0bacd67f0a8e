"""The dense reference: every expert computes every token, a mask does the rest.

out_t = sum_e W[t, e] * expert_e(x_t). What dispatchers and expert back ends are compared with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gmoe_ltdr.experts import StackedExperts
from gmoe_ltdr.routing import Modality, Routing


def dense_moe(tokens_TD: Tensor, routing: Routing, experts: StackedExperts) -> Tensor:
    hidden_TEF = torch.einsum("td,efd->tef", tokens_TD, experts.fc1_weight) + experts.fc1_bias
    if experts.gated:  # SwiGLU, the gate's half first
        half = experts.fc2_weight.shape[-1]
        hidden_TEF = F.silu(hidden_TEF[..., :half]) * hidden_TEF[..., half:]
    else:
        hidden_TEF = F.gelu(hidden_TEF)
    out_TED = torch.einsum("tef,edf->ted", hidden_TEF, experts.fc2_weight) + experts.fc2_bias
    weights_TE = routing.combine_weights_TE * routing.dispatch_mask_TE
    return torch.einsum("te,ted->td", weights_TE.to(out_TED.dtype), out_TED)


def constant_experts(values_E: Tensor, probs_weights_TE: Tensor) -> Tensor:
    """Output of scalar experts that ignore their input: E_e(x) = values[e]."""
    return probs_weights_TE @ values_E


def plan(
    mask_TE: Tensor, weights_TE: Tensor | None = None, logits_TE: Tensor | None = None
) -> Routing:
    """A routing made by hand."""
    logits_TE = torch.zeros(mask_TE.shape) if logits_TE is None else logits_TE
    weights_TE = mask_TE.to(torch.float32) if weights_TE is None else weights_TE
    return Routing(
        logits_TE=logits_TE,
        probs_TE=logits_TE.softmax(-1),
        dispatch_mask_TE=mask_TE,
        combine_weights_TE=weights_TE,
        modality_T=torch.full((mask_TE.shape[0],), int(Modality.VISION), dtype=torch.uint8),
        tail_mask_T=torch.zeros(mask_TE.shape[0], dtype=torch.bool),
        shape_BL=(1, mask_TE.shape[0]),
    )
