"""Sparse layers for MoE-LLaVA's own classes: our routing, the host's experts, names and contract.

A host's layer has the parameters `deepspeed_moe.gate.wg` and
`deepspeed_moe.experts.deepspeed_experts.E.*`, and returns (output, balance loss, counts). Both
stay, so that checkpoints, LoRA, filters by name and the host's loss know nothing of the change.

Shapes: B rows, S tokens per row, T = B * S tokens, D width, E experts, N rows ordered expert by
expert, C slots per expert, K choices per token.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmoe_ltdr.dispatch import LocalDispatcher
from gmoe_ltdr.gates import LinearGate
from gmoe_ltdr.losses import balance_loss
from gmoe_ltdr.moe import MoE
from gmoe_ltdr.routers import Router, create_router
from gmoe_ltdr.routing import Modality, Routing, expert_rank
from gmoe_ltdr.spec import MoESpec
from gmoe_ltdr.vlm.modality import TokenModality

_log = logging.getLogger(__name__)


class HostExperts(nn.Module):
    """Experts that stay the modules they are, LoRA adapters included, computed one by one.

    Every expert runs in every forward, on no row if need be: so each has a gradient on every rank.

    Args:
        experts: Modules from (n, D) to (n, D).
    """

    def __init__(self, experts: Sequence[nn.Module]):
        super().__init__()
        self.deepspeed_experts = nn.ModuleList(experts)

    @property
    def num_experts(self) -> int:
        return len(self.deepspeed_experts)

    @property
    def backend(self) -> str:
        return "loop"

    @backend.setter
    def backend(self, name: str) -> None:
        if name not in ("auto", "loop", "dense"):
            raise ValueError(
                f"expert back end {name!r} needs experts whose weights are stacked, but these are "
                "modules of the host; use 'auto', or from_moe_llava, which stacks them"
            )

    def forward(self, tokens_ND: Tensor, tokens_per_expert_E: Tensor | Sequence[int]) -> Tensor:
        """Each expert computes its own rows, see `StackedExperts`."""
        counts = (
            tokens_per_expert_E.tolist()
            if isinstance(tokens_per_expert_E, Tensor)
            else list(tokens_per_expert_E)
        )
        unused = tokens_ND.shape[0] - sum(counts)
        *groups, _ = tokens_ND.split([*counts, unused])
        out = []
        for expert, rows_nD in zip(self.deepspeed_experts, groups, strict=True):
            result = expert(rows_nD)
            out.append(result[0] if isinstance(result, tuple) else result)
        out.append(out[0].new_zeros(unused, out[0].shape[-1]))
        return torch.cat(out)


class HostGate:
    """The host's linear layer `wg` as our gate, wherever it stands and whatever LoRA makes of it.

    Not a module, so that `wg` keeps its one place among the parameters.
    """

    def __init__(self, holder: nn.Module):
        self._holder = holder

    def __call__(self, tokens_TD: Tensor) -> Tensor:
        wg: Any = self._holder.wg
        with torch.autocast(tokens_TD.device.type, enabled=False):
            if type(wg) is nn.Linear:
                return F.linear(tokens_TD.float(), wg.weight.float())
            return wg(tokens_TD.to(next(wg.parameters()).dtype)).float()


def check_router_of_host(wg: nn.Linear, spec: MoESpec) -> None:
    """Whether `router_of_host` can make this router; changes nothing.

    Args:
        wg: The host's gate.
        spec: Which router.

    Raises:
        ValueError: A setting that cannot be, or a router that scores something else than tokens
            with a gate that is made for tokens.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        router: Any = create_router(wg.in_features, spec)
    gate = getattr(router, "gate", None)
    if isinstance(gate, LinearGate) and gate.weight.shape[1] != wg.in_features:
        raise ValueError(
            f"router {spec.router!r} scores embeddings of width {gate.weight.shape[1]}, but the "
            f"model's gate takes width {wg.in_features}; use embeddings of that width, or "
            "gate='cosine', which is the router's own"
        )


def router_of_host(holder: nn.Module, spec: MoESpec) -> Router:
    """A router that scores experts with the host's `wg`.

    A router without a linear gate keeps its own parameters; `wg` then remains, frozen, for the
    names' sake.

    Args:
        holder: Has the linear layer `wg`.
        spec: Which router.
    """
    wg: Any = holder.wg
    weight = next(wg.parameters())
    router: Any = create_router(wg.in_features, spec).to(weight.device)
    if isinstance(getattr(router, "gate", None), LinearGate):
        del router.gate
        router.gate = HostGate(holder)
    else:
        wg.requires_grad_(False)
        _log.warning(
            "router %r with gate %r does not use the checkpoint's gate; it starts untrained",
            spec.router,
            spec.gate,
        )
    return router


def host_loss(routing: Routing, spec: MoESpec) -> Tensor:
    """The layer's balance loss as the host expects it: its model multiplies the sum of all layers'
    by `router_aux_loss_coef`, which is `spec.balance_weight`, or 1 where that is 0."""
    return balance_loss([routing], spec) / (spec.balance_weight or 1.0)


def first_choices(routing: Routing) -> Tensor:
    """How many tokens have each expert as their first choice, (E,), on the CPU as DeepSpeed's."""
    first_TE = expert_rank(routing.selection_logits_TE) == 0
    real_T1 = (~routing.of(Modality.PADDING)).unsqueeze(-1)
    return (first_TE & real_T1).sum(0).cpu()


class MoELlavaLayer(MoE):
    """A sparse layer of MoE-LLaVA without DeepSpeed: no capacity, no communication, no chance.

    Args:
        host: DeepSpeed's layer; its gate and experts go over into this one.
        spec: How to route. Number of experts and weight of the balance loss are the host's.
        context_of: What the tokens are.
    """

    def __init__(self, host: Any, spec: MoESpec, *, context_of: TokenModality):
        nn.Module.__init__(self)
        self.spec = spec
        self.context_of = context_of
        self.dispatcher = LocalDispatcher()
        self.shared_experts = None
        moe: Any = nn.Module()
        moe.gate = nn.Module()
        moe.gate.wg = host.deepspeed_moe.gate.wg
        moe.experts = HostExperts(list(host.deepspeed_moe.experts.deepspeed_experts))
        self.deepspeed_moe = moe
        self.use_residual = bool(getattr(host, "use_residual", False))
        if self.use_residual:
            self.mlp, self.coefficient = host.mlp, host.coefficient
        for parameter in self.deepspeed_moe.experts.parameters():
            # a DeepSpeed engine would look for the group of an expert-parallel layer
            for mark in ("allreduce", "group_name"):
                if hasattr(parameter, mark):
                    delattr(parameter, mark)
        self.router = router_of_host(self.deepspeed_moe.gate, spec)

    @property
    def experts(self) -> HostExperts:  # type: ignore[override]
        return self.deepspeed_moe.experts

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, used_token: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output (B, S, D), balance loss, first choices per expert.

        Args:
            hidden_states: (B, S, D).
            used_token: DeepSpeed's argument, which MoE-LLaVA never gives.
        """
        out, routing = self.forward_with_routing(hidden_states)
        if self.use_residual:
            dense = self.mlp(hidden_states)
            dense = dense[0] if isinstance(dense, tuple) else dense
            share = self.coefficient(hidden_states).softmax(-1)
            out = out * share[..., :1] + dense * share[..., 1:]
        return out, host_loss(routing, self.spec), first_choices(routing)


class DeepSpeedGate(nn.Module):
    """Our router in the place of DeepSpeed's gate: its engine, experts and all-to-all stay.

    Nothing is dropped: the capacity is what the fullest expert of all ranks needs. Answers in the
    form of DeepSpeed 0.9 to 0.14, or in that of 0.19 when asked for routes.

    Args:
        layer: DeepSpeed's MOELayer, which knows its ranks.
        spec: How to route.
        context_of: What the tokens are.
    """

    def __init__(self, layer: Any, spec: MoESpec, *, context_of: TokenModality):
        super().__init__()
        self.spec = spec
        self.wg = layer.gate.wg
        self.k = spec.top_k
        self.wall_clock_breakdown = False
        self.context_of = context_of
        self.router = router_of_host(self, spec)
        self._layer = [layer]  # in a list, or it would be a part of its own part
        names = list(inspect.signature(type(layer.gate).forward).parameters)
        self._flag_names = names[3:]  # behind self, input, used_token

    def _set_ep_group(self, ep_group: Any) -> None:
        """DeepSpeed 0.14 and newer tell the gate; the layer knows it, too."""

    def forward(
        self, input: Tensor, used_token: Tensor | None = None, *flags: bool, **named_flags: bool
    ) -> tuple[Any, ...]:
        """DeepSpeed's call with tokens (T, D).

        Raises:
            NotImplementedError: Tutel's dispatcher is asked for.
            RuntimeError: It is not known what the tokens are.
        """
        wanted = {**dict(zip(self._flag_names, flags, strict=False)), **named_flags}
        if wanted.get("use_tutel"):
            raise NotImplementedError("Tutel's dispatcher inside DeepSpeed; use use_tutel=False")
        context = self.context_of.current
        if context is None or context.modality_BL.numel() != len(input):
            known = None if context is None else tuple(context.modality_BL.shape)
            raise RuntimeError(f"{len(input)} tokens to route, but announced are {known}")
        routing = self.router(input, context)
        form = self._as_routes if wanted.get("sparse_routes") else self._as_masks
        return form(routing, self._capacity(routing))

    def _capacity(self, routing: Routing) -> Tensor:
        """Slots that each expert needs, the same on all ranks that share experts."""
        capacity = routing.tokens_per_expert_E.max().clamp(min=1)
        layer = self._layer[0]
        if layer.ep_size > 1:
            torch.distributed.all_reduce(
                capacity, op=torch.distributed.ReduceOp.MAX, group=layer.ep_group
            )
        return capacity

    def _as_masks(self, routing: Routing, capacity: Tensor) -> tuple[Tensor, ...]:
        """Balance loss, combine weights (T, E, C), dispatch mask (T, E, C), counts."""
        mask_TE = routing.dispatch_mask_TE
        slot_TE = mask_TE.cumsum(0) - 1
        in_slot_TEC = F.one_hot(slot_TE.clamp(min=0), int(capacity)).bool()
        in_slot_TEC = in_slot_TEC & mask_TE.unsqueeze(-1)
        weights_TEC = routing.combine_weights_TE.unsqueeze(-1) * in_slot_TEC
        return host_loss(routing, self.spec), weights_TEC, in_slot_TEC, first_choices(routing)

    def _as_routes(self, routing: Routing, capacity: Tensor) -> tuple[Any, ...]:
        """Balance loss, C, E, and expert (-1: none), slot and weight of each choice, (K, T)."""
        mask_TE = routing.dispatch_mask_TE
        most = routing.max_experts_per_token or routing.num_experts
        experts_TK = mask_TE.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        used_TK = mask_TE.gather(1, experts_TK)
        slot_TE = mask_TE.cumsum(0) - 1
        slots_TK = slot_TE.gather(1, experts_TK) * used_TK
        weights_TK = routing.combine_weights_TE.gather(1, experts_TK) * used_TK
        return (
            host_loss(routing, self.spec),
            capacity,
            routing.num_experts,
            torch.where(used_TK, experts_TK, -1).int().T.contiguous(),
            slots_TK.int().T.contiguous(),
            weights_TK.T.contiguous(),
            first_choices(routing),
        )
