"""Tutel's dispatch kernels and all-to-all as an engine, for any number of experts per token.

Built on Tutel's primitives: `fast_encode` puts tokens into an (E, C, D) buffer of C slots per
expert, an all-to-all trades blocks of it, `fast_decode` brings weighted results home. Tutel's own
`moe_layer` routes every token to the same number of experts, so it is not used. Here a token has as
many routing slots as the token with the most experts, and an unused slot has location C, which the
kernels leave out.

What to know: every expert computes as many rows as the fullest one of all ranks, so cost follows
imbalance. Tokens travel and add up in float32 (float64 has float32 accuracy); float16 is refused.

Shapes: T tokens of this rank, D width, E experts, R ranks, e = E / R experts of this rank, S
routing slots per token, C slots per expert.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from gmoe_ltdr.dispatch.base import Dispatched
from gmoe_ltdr.routing import Routing

_INSTALL = """Tutel is not installed, or was built for another torch. It takes two steps:
  pip install setuptools wheel ninja
  pip install --no-build-isolation --no-deps git+https://github.com/microsoft/tutel@main
(without CUDA: NO_CUDA=1 in front of the second.) dispatcher='all_to_all' needs no Tutel"""


@dataclass(frozen=True)
class _Ticket:
    """Tutel's plan: (E, expert of each slot, location, weight, C, unused), and who travels."""

    plan: tuple[Any, ...]
    at_home: bool


@dataclass(frozen=True)
class _Overlapped(Dispatched):
    """Rows still at home: they travel in parts, while the experts work on other parts."""

    dispatcher: TutelDispatcher

    def run(self, experts: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        dispatcher, width = self.dispatcher, self.tokens_ND.shape[-1]
        ticket = cast(_Ticket, self.ticket)

        def run_part(part_eND: Tensor) -> Tensor:
            num_local, num_rows, _ = part_eND.shape
            counts_e = torch.full((num_local,), num_rows, device=part_eND.device)
            return experts(part_eND.reshape(-1, width), counts_e).view_as(part_eND)

        blocks_ECD = dispatcher._tutel.a2a_ffn_overlap_forward(
            self.tokens_ND.view(ticket.plan[0], -1, width),
            expert_fn=run_part,
            a2a_ffn_overlap_degree=dispatcher.overlap,
            use_2dh=dispatcher.ranks_per_node > 1,
            group=dispatcher.group,
        )
        return blocks_ECD.reshape(-1, width)


class TutelDispatcher:
    """Tokens to experts and back through Tutel.

    Args:
        group: The ranks that share the experts; None for one device.
        num_experts: Experts of the layer, to refuse a number that the ranks do not divide.
        ranks_per_node: More than 1 lets the all-to-all go in two levels, first between nodes, then
            within a node (Tutel's 2D all-to-all). Only where the group is the whole world.
        overlap: In how many parts rows travel, the experts working on one part while the next is on
            its way (`a2a_ffn_overlap_degree`). CUDA and NCCL only, over the whole world; elsewhere
            it is ignored, as Tutel does.

    Raises:
        ImportError: Tutel is not installed.
        ValueError: Numbers that Tutel cannot place.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        num_experts: int | None = None,
        ranks_per_node: int = 1,
        overlap: int = 1,
    ):
        self._tutel = import_tutel()
        self.group = group
        self.num_ranks = 1 if group is None else group.size()
        self.ranks_per_node = ranks_per_node
        self.overlap = overlap
        if num_experts is not None:
            _check_experts(num_experts, self.num_ranks)
        if not 1 <= overlap <= 32:
            raise ValueError(f"overlap={overlap} must lie between 1 and 32, Tutel's limit")
        if ranks_per_node > 1 or overlap > 1:
            if group is None or self.num_ranks != dist.get_world_size():
                raise ValueError(
                    "Tutel's 2D all-to-all and its overlap always run over all ranks; use "
                    "ranks_per_node=1 and overlap=1 for a smaller expert-parallel group"
                )
            if self.num_ranks % ranks_per_node:
                raise ValueError(
                    f"ranks_per_node={ranks_per_node} does not divide {self.num_ranks} ranks"
                )

    def dispatch(self, tokens_TD: Tensor, routing: Routing) -> Dispatched:
        if tokens_TD.dtype == torch.float16:
            raise ValueError(
                "dispatcher='tutel' does not take float16: Tutel's kernels mix it up with float32 "
                "in one process. Use bfloat16, or dispatcher='all_to_all'"
            )
        _check_experts(routing.num_experts, self.num_ranks)
        overlapped = self.overlap > 1 and self._can_overlap(tokens_TD)
        plan = self._plan(routing, multiple_of=self.overlap if overlapped else 1)
        blocks_ECD = self._tutel.fast_encode(tokens_TD.contiguous(), plan)
        if self.num_ranks > 1 and not overlapped:
            blocks_ECD = self._to_experts(blocks_ECD)
        num_local, rows_per_expert, width = blocks_ECD.shape
        counts_e = torch.full((num_local,), rows_per_expert, device=tokens_TD.device)
        rows_ND = blocks_ECD.reshape(-1, width)
        if overlapped:
            return _Overlapped(rows_ND, counts_e, _Ticket(plan, at_home=True), self)
        return Dispatched(rows_ND, counts_e, _Ticket(plan, at_home=self.num_ranks == 1))

    def combine(self, expert_out_ND: Tensor, dispatched: Dispatched) -> Tensor:
        ticket = cast(_Ticket, dispatched.ticket)
        num_experts, capacity = ticket.plan[0], ticket.plan[4]
        width = expert_out_ND.shape[-1]
        blocks = expert_out_ND
        if not ticket.at_home:
            blocks = self._to_tokens(blocks.view(num_experts // self.num_ranks, -1, width))
        blocks_ECD = blocks.reshape(num_experts, capacity, width).contiguous()
        return self._tutel.fast_decode(blocks_ECD, ticket.plan)

    def _can_overlap(self, tokens_TD: Tensor) -> bool:
        return tokens_TD.is_cuda and self.num_ranks > 1

    def _plan(self, routing: Routing, *, multiple_of: int) -> tuple[Any, ...]:
        """Tutel's description of a routing. Every tensor of it is contiguous, or Tutel fails."""
        mask_TE = routing.dispatch_mask_TE
        num_experts = mask_TE.shape[1]
        with torch.no_grad():
            experts_per_token_T = mask_TE.sum(1)
            location_TE = mask_TE.cumsum(0) - 1
            # the largest of each: slots per token here, slots per expert on any rank
            zero_1 = experts_per_token_T.new_zeros(1)
            num_slots_1 = torch.cat([experts_per_token_T, zero_1]).max()
            capacity_1 = mask_TE.sum(0).max()
            if self.num_ranks > 1:
                # Tutel's kernels and all-to-all need one C on all ranks
                dist.all_reduce(capacity_1, op=dist.ReduceOp.MAX, group=self.group)
            num_slots, capacity = (
                max(n, 1) for n in torch.stack([num_slots_1, capacity_1]).tolist()
            )
            capacity = -(-capacity // multiple_of) * multiple_of
            order_TE = mask_TE.int().argsort(dim=1, descending=True, stable=True)
            experts_TS = order_TE[:, :num_slots]
            used_TS = torch.arange(num_slots, device=mask_TE.device) < experts_per_token_T[:, None]
            location_TS = torch.where(used_TS, location_TE.gather(1, experts_TS), capacity)
            # the kernels check no bounds: a wrong index would corrupt memory
            assert bool(((location_TS >= 0) & (location_TS <= capacity)).all())
            assert bool(((experts_TS >= 0) & (experts_TS < num_experts)).all())
        weights_TS = routing.combine_weights_TE.gather(1, experts_TS) * used_TS
        return (
            num_experts,
            [slot_T.int().contiguous() for slot_T in experts_TS.unbind(1)],
            [slot_T.int().contiguous() for slot_T in location_TS.unbind(1)],
            [slot_T.contiguous() for slot_T in weights_TS.unbind(1)],
            capacity,
            None,
        )

    def _to_experts(self, blocks_ECD: Tensor) -> Tensor:
        """(E, C, D) of this rank's tokens to (e, R * C, D) of this rank's experts."""
        if self.ranks_per_node > 1:
            return self._two_level(blocks_ECD, 1, 0)
        num_experts, capacity, width = blocks_ECD.shape
        blocks = self._tutel.all_to_all_single(blocks_ECD.contiguous(), self.group)
        blocks = blocks.view(self.num_ranks, num_experts // self.num_ranks, capacity, width)
        return blocks.transpose(0, 1).reshape(num_experts // self.num_ranks, -1, width)

    def _to_tokens(self, blocks_eND: Tensor) -> Tensor:
        """The inverse."""
        if self.ranks_per_node > 1:
            return self._two_level(blocks_eND, 0, 1)
        num_local, _, width = blocks_eND.shape
        blocks = blocks_eND.view(num_local, self.num_ranks, -1, width).transpose(0, 1)
        blocks = blocks.reshape(num_local * self.num_ranks, -1, width).contiguous()
        return self._tutel.all_to_all_single(blocks, self.group)

    def _two_level(self, blocks: Tensor, gathered_dim: int, split_dim: int) -> Tensor:
        # Tutel reads the size of a node from this variable, once
        os.environ.setdefault("LOCAL_SIZE", str(self.ranks_per_node))
        return self._tutel.all_to_all(blocks.contiguous(), gathered_dim, split_dim, use_2dh=True)

    def __deepcopy__(self, memo: dict) -> TutelDispatcher:
        return self

    def __reduce__(self):
        raise TypeError(
            "a model with Tutel's dispatcher cannot be pickled; save_model and gather_state_dict "
            "write it without"
        )


def import_tutel() -> SimpleNamespace:
    """The primitives used here.

    Raises:
        ImportError: Tutel is missing, or its extension is; says how to install it.
    """
    try:
        from tutel.impls.overlap import a2a_ffn_overlap_forward
        from tutel.moe import fast_decode, fast_encode
        from tutel.net import all_to_all, all_to_all_single
    except ImportError as error:  # without its compiled part, Tutel raises a plain ImportError
        raise ImportError(f"{_INSTALL} ({error})") from error
    return SimpleNamespace(
        fast_encode=fast_encode,
        fast_decode=fast_decode,
        all_to_all=all_to_all,
        all_to_all_single=all_to_all_single,
        a2a_ffn_overlap_forward=a2a_ffn_overlap_forward,
    )


def _check_experts(num_experts: int, num_ranks: int) -> None:
    if num_experts % num_ranks:
        raise ValueError(
            f"Tutel cannot place {num_experts} experts on {num_ranks} ranks: the ranks must divide "
            "the experts. Use dispatcher='all_to_all', which places any number on up to as many "
            "ranks"
        )
