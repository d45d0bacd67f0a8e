"""Expert parallelism over `torch.distributed` (gloo, NCCL): each rank holds some of the experts.

Every rank dispatches its own tokens as if all experts were here, which orders rows by expert and so
by rank; counts travel first, then the rows. What arrives is ordered by source rank and becomes
ordered by expert with one stable sort. Results return the same way and are weighted at home, so
that weights and their gradients never travel.

Every rank of the group must call the layer equally often, in forward and in backward, also when it
has no token: the calls are collective.

Shapes: T tokens of this rank, D width, E experts in all, e experts of this rank, R ranks, N rows of
this rank's tokens, M rows for this rank's experts.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gmoe_ltdr.dispatch.base import Dispatched
from gmoe_ltdr.dispatch.local import LocalDispatcher
from gmoe_ltdr.dispatch.placement import experts_per_rank
from gmoe_ltdr.routing import Routing


@dataclass(frozen=True)
class _Ticket:
    """How to undo the journey.

    Attributes:
        home: What the local half made, without its rows; it holds the weights.
        spare: Rows that the local half had allocated behind its last one.
        sent: Rows that went to each rank.
        received: Rows that came from each rank.
        by_expert_M: Order of arrival to order by expert; None where they are the same.
        by_rank_M: The inverse.
    """

    home: Dispatched
    spare: int
    sent: list[int]
    received: list[int]
    by_expert_M: Tensor | None
    by_rank_M: Tensor | None


class AllToAllDispatcher:
    """Sends rows to the ranks that hold their experts.

    Args:
        group: The ranks that share the experts. Shared by copies of a model, and never pickled.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self._local = LocalDispatcher()

    def dispatch(self, tokens_TD: Tensor, routing: Routing) -> Dispatched:
        home = self._local.dispatch(tokens_TD, routing)
        num_ranks, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        held = experts_per_rank(routing.num_experts, num_ranks)

        counts_E = home.tokens_per_expert_e.long()
        counts_RE = _exchange(counts_E, held, [held[rank]] * num_ranks, self.group)
        counts_RE = counts_RE.view(num_ranks, held[rank])
        # the one synchronisation with the host: torch.distributed wants the sizes as numbers
        per_expert, per_source = counts_E.tolist(), counts_RE.tolist()
        starts = [sum(held[:r]) for r in range(num_ranks + 1)]
        sent = [sum(per_expert[a:b]) for a, b in itertools.pairwise(starts)]
        received = [sum(row) for row in per_source]

        # the local half may leave room behind its last row
        rows_MD = _AllToAll.apply(home.tokens_ND[: sum(sent)], sent, received, self.group)
        by_expert_M = by_rank_M = None
        if held[rank] > 1 and num_ranks > 1:
            experts_M = torch.arange(held[rank], device=counts_RE.device).repeat(num_ranks)
            experts_M = experts_M.repeat_interleave(
                counts_RE.reshape(-1), output_size=sum(received)
            )
            by_expert_M = experts_M.argsort(stable=True)
            by_rank_M = torch.empty_like(by_expert_M)
            by_rank_M[by_expert_M] = torch.arange(len(by_expert_M), device=by_expert_M.device)
            rows_MD = _Reorder.apply(rows_MD, by_expert_M, by_rank_M)
        ticket = _Ticket(
            home=replace(home, tokens_ND=home.tokens_ND.new_empty(0)),
            spare=len(home.tokens_ND) - sum(sent),
            sent=sent,
            received=received,
            by_expert_M=by_expert_M,
            by_rank_M=by_rank_M,
        )
        return Dispatched(rows_MD, counts_RE.sum(0), ticket)

    def combine(self, expert_out_ND: Tensor, dispatched: Dispatched) -> Tensor:
        ticket = cast(_Ticket, dispatched.ticket)
        rows_MD = expert_out_ND
        if ticket.by_rank_M is not None:
            rows_MD = _Reorder.apply(rows_MD, ticket.by_rank_M, ticket.by_expert_M)
        rows_ND = _AllToAll.apply(rows_MD, ticket.received, ticket.sent, self.group)
        if ticket.spare:
            rows_ND = F.pad(rows_ND, (0, 0, 0, ticket.spare))
        return self._local.combine(rows_ND, ticket.home)

    def __deepcopy__(self, memo: dict) -> AllToAllDispatcher:
        return self

    def __reduce__(self):
        raise TypeError(
            "an expert-parallel model cannot be pickled: each process holds some of the experts. "
            "save_model and gather_state_dict write all of them"
        )


class _AllToAll(torch.autograd.Function):
    """Uneven all-to-all of rows; its backward is the same journey in reverse."""

    @staticmethod
    def forward(ctx, rows_ND: Tensor, sent: list[int], received: list[int], group) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(rows_ND, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_MD: Tensor):
        return _exchange(grad_MD, ctx.received, ctx.sent, ctx.group), None, None, None


class _Reorder(torch.autograd.Function):
    """Permute rows; the backward gathers with the inverse instead of scattering."""

    @staticmethod
    def forward(ctx, rows_MD: Tensor, order_M: Tensor, inverse_M: Tensor) -> Tensor:
        ctx.inverse_M = inverse_M
        return rows_MD.index_select(0, order_M)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_MD: Tensor):
        return grad_MD.index_select(0, ctx.inverse_M), None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group) -> Tensor:
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived
