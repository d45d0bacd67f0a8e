"""All experts on one device.

Shapes: T tokens, D width, E experts, N = number of (token, expert) assignments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gmoe_ltdr.dispatch.base import Dispatched
from gmoe_ltdr.routing import Routing


@dataclass(frozen=True)
class _Ticket:
    token_ids_N: Tensor
    weights_N: Tensor
    num_tokens: int


class LocalDispatcher:
    """Gather rows expert by expert, add the weighted results back.

    A transposed mask read row by row is already ordered by expert: no sort.
    """

    def dispatch(self, tokens_TD: Tensor, routing: Routing) -> Dispatched:
        expert_ids_N, token_ids_N = routing.dispatch_mask_TE.T.nonzero(as_tuple=True)
        ticket = _Ticket(
            token_ids_N=token_ids_N,
            weights_N=routing.combine_weights_TE[token_ids_N, expert_ids_N],
            num_tokens=tokens_TD.shape[0],
        )
        return Dispatched(
            tokens_ND=tokens_TD.index_select(0, token_ids_N),
            tokens_per_expert_e=routing.tokens_per_expert_E,
            ticket=ticket,
        )

    def combine(self, expert_out_ND: Tensor, dispatched: Dispatched) -> Tensor:
        ticket: _Ticket = dispatched.ticket
        # at least float32, so that the sum of several bf16 experts is rounded once
        sum_dtype = torch.promote_types(expert_out_ND.dtype, torch.float32)
        weighted_ND = expert_out_ND.to(sum_dtype) * ticket.weights_N.unsqueeze(-1)
        out_TD = weighted_ND.new_zeros(ticket.num_tokens, expert_out_ND.shape[-1])
        return out_TD.index_add(0, ticket.token_ids_N, weighted_ND).to(expert_out_ND.dtype)

    def __deepcopy__(self, memo: dict) -> LocalDispatcher:
        return self
