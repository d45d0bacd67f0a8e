"""Each token gets a small network of its own, which scores the experts: EvoMoE's dynamic
token-aware router (arXiv 2505.23830).

A hypernetwork maps the token z to two matrices, and these map it to

    e = up(z) SwiGLU(down(z) z),      SwiGLU(u) = silu(first half of u) * second half of u,

of the token's width, from which one linear layer makes the logits.

Shapes: T tokens, D width, E experts, H hidden width of the hypernetwork, R rank: the token's own
network has matrices (2R, D) and (D, R).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmoe_ltdr.gates import LinearGate
from gmoe_ltdr.routers.base import register_router
from gmoe_ltdr.routers.token_choice import TokenChoiceRouter
from gmoe_ltdr.routing import CLOSED, Modality, TokenContext
from gmoe_ltdr.spec import MoESpec

_HIDDEN_DIM, _RANK = 16, 8
_INIT_STD = 1e-3  # routing starts near uniform


class HyperNetwork(nn.Module):
    """Two linear layers with nothing between them, from a token to its network's 3RD weights.

    Since they are linear, so is what the token's network does in the weights: its products are
    computed without ever holding a network per token, which would be 3RD numbers for each.

    Args:
        dim: D.
        hidden_dim: H.
        rank: R.
    """

    def __init__(self, dim: int, hidden_dim: int, rank: int):
        super().__init__()
        self.rank = rank
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, 3 * rank * dim)
        nn.init.normal_(self.fc2.weight, std=_INIT_STD)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, tokens_TD: Tensor) -> Tensor:
        """What each token's own network makes of it, (T, D)."""
        rank, hidden_dim, dim = self.rank, self.fc1.out_features, self.fc1.in_features
        num_down = 2 * rank * dim
        hidden_TH = F.linear(tokens_TD, self.fc1.weight.float(), self.fc1.bias.float())
        weight, bias = self.fc2.weight.float(), self.fc2.bias.float()

        # down(z) z, where down(z) = sum over h of hidden_h * (a matrix of h) + a matrix
        down_DXH = weight[:num_down].view(2 * rank, dim, hidden_dim).transpose(0, 1)
        products_TXH = (tokens_TD @ down_DXH.flatten(1)).view(-1, 2 * rank, hidden_dim)
        inner_TX = (products_TXH * hidden_TH.unsqueeze(1)).sum(-1)
        inner_TX = inner_TX + tokens_TD @ bias[:num_down].view(2 * rank, dim).T
        inner_TR = F.silu(inner_TX[:, :rank]) * inner_TX[:, rank:]

        # up(z) inner, likewise
        up_RHD = weight[num_down:].view(dim, rank, hidden_dim).permute(1, 2, 0)
        products_TRH = inner_TR.unsqueeze(2) * hidden_TH.unsqueeze(1)
        out_TD = products_TRH.flatten(1) @ up_RHD.flatten(0, 1)
        return out_TD + inner_TR @ bias[num_down:].view(dim, rank).T


@register_router("dtr")
class DynamicTokenAwareRouter(TokenChoiceRouter):
    """Token choice by the logits that each token's own network leads to.

    `MoESpec.router_options` understood here: `hypernetworks` ("shared": one for all tokens;
    "modality": one for language, one for vision; "cls": one for class and register tokens, one for
    the others), `hidden_dim` (16), `rank` (8), and those of token choice. The linear layer behind
    the tokens' networks is the gate; it has no choice of kind.

    Attributes:
        first_expert_only: bool; while it is set, all tokens go to the first expert with weight 1,
            as in the stages of EvoMoE in which no router is trained.
    """

    options: Mapping[str, Sequence[Any] | None] = {
        **TokenChoiceRouter.options,
        "hypernetworks": ("shared", "modality", "cls"),
        "hidden_dim": None,
        "rank": None,
    }
    first_expert_only: Tensor

    def __init__(self, dim: int, spec: MoESpec):
        super().__init__(dim, spec)
        self.gate = LinearGate(dim, spec.num_experts)
        self.kinds = spec.router_options.get("hypernetworks", "shared")
        hidden_dim = _size(spec, "hidden_dim", _HIDDEN_DIM)
        rank = _size(spec, "rank", _RANK)
        num_networks = 1 if self.kinds == "shared" else 2
        self.hypernetworks = nn.ModuleList(
            HyperNetwork(dim, hidden_dim, rank) for _ in range(num_networks)
        )
        self.register_buffer("first_expert_only", torch.tensor(False))

    def score(self, tokens_TD: Tensor, context: TokenContext) -> Tensor:
        logits_TE = self.gate(self._embed(tokens_TD.float(), context))
        others_E = torch.arange(logits_TE.shape[1], device=logits_TE.device) > 0
        return torch.where(self.first_expert_only & others_E, CLOSED, logits_TE)

    def _embed(self, tokens_TD: Tensor, context: TokenContext) -> Tensor:
        """What the tokens' networks make of them.

        Both hypernetworks run on all tokens: that waits for nobody, and keeps both in the graph
        when a batch has tokens of one kind only.
        """
        embedded_TD: Tensor = self.hypernetworks[0](tokens_TD)
        if self.kinds == "shared":
            return embedded_TD
        if self.kinds == "modality":
            first_BL = context.modality_BL == int(Modality.LANGUAGE)
        elif context.is_cls_BL is None:
            raise ValueError(
                "router_options['hypernetworks']='cls' keeps a network for the class token, but "
                "this model has none; use 'shared', or a model with a class token"
            )
        else:
            first_BL = context.is_cls_BL
        return torch.where(first_BL.reshape(-1, 1), embedded_TD, self.hypernetworks[1](tokens_TD))


def _size(spec: MoESpec, name: str, default: int) -> int:
    size = spec.router_options.get(name, default)
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"router_options[{name!r}]={size!r} must be a whole number of at least 1")
    return size
