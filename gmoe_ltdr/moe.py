"""The MoE layer: route, dispatch, compute, combine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from gmoe_ltdr.dispatch import create_dispatcher
from gmoe_ltdr.dispatch.placement import experts_of_rank
from gmoe_ltdr.experts import StackedExperts, width_of_pieces
from gmoe_ltdr.routers import create_router
from gmoe_ltdr.routing import Modality, Routing, TokenContext
from gmoe_ltdr.spec import MoESpec


class VisionContext:
    """`context_of` of a plain ViT: every token is a vision token, nobody has to say so.

    Args:
        num_prefix_tokens: Class and register tokens at the head of every image.

    Attributes:
        image_info: What else is known of the images, set by `gmoe_ltdr.image_info.set_image_info`.
    """

    def __init__(self, num_prefix_tokens: int = 0):
        self.num_prefix_tokens = num_prefix_tokens
        self.image_info: dict[str, Tensor] = {}

    def __call__(self, x: Tensor) -> TokenContext:
        # a product of sizes, not numel(): export with an open batch size needs the symbol
        batch, length = (math.prod(x.shape[:-2]), x.shape[-2]) if x.dim() > 1 else (1, 1)
        plain = TokenContext.all_vision(
            batch, length, num_prefix_tokens=self.num_prefix_tokens, device=x.device
        )
        return replace(plain, **self.image_info) if self.image_info else plain


class MoE(nn.Module):
    """A sparse mixture of feed-forward experts: Tensor (..., dim) to Tensor (..., dim).

    Fits the `mlp` slot of timm's `Block`. What the router decided is gathered from outside, with
    `collect_routing`.

    Args:
        dim: Width of the tokens.
        hidden_dim: Hidden width of the dense network, of which `spec.expert_split` makes experts.
        spec: How many experts, which router, and so on.
        act_layer: Activation of the experts.
        bias: Whether the two linear layers of an expert have biases.
        gated: Whether experts are gated, as the feed-forward networks of language models are.
        context_of: From the layer's input (B, L, dim) to the `TokenContext` of its tokens.
        ep_group: Ranks that share the experts; each holds and trains its own. None: all are here.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        spec: MoESpec,
        *,
        act_layer: type[nn.Module] = nn.GELU,
        bias: tuple[bool, bool] = (True, True),
        gated: bool = False,
        context_of: Callable[[Tensor], TokenContext] | None = None,
        ep_group: ProcessGroup | None = None,
    ):
        super().__init__()
        self.spec = spec
        self.context_of = context_of or VisionContext()
        self.router = create_router(dim, spec)
        self.dispatcher = create_dispatcher(
            spec.dispatcher, num_experts=spec.num_experts, group=ep_group
        )
        options: dict[str, Any] = {
            "dropout": spec.expert_dropout,
            "act_layer": act_layer,
            "bias": bias,
            "gated": gated,
        }
        # all of them first, so that a seed gives the same experts on any number of ranks
        expert_dim = width_of_pieces(hidden_dim, spec.expert_split)
        self.experts = StackedExperts(spec.num_experts, dim, expert_dim, **options)
        if self.ep_group is not None:
            held = self.held_experts
            for name, parameter in list(self.experts.named_parameters()):
                held_part = parameter.detach()[held.start : held.stop].clone()
                setattr(self.experts, name, nn.Parameter(held_part))
        self.shared_experts: StackedExperts | None = None
        if spec.shared_experts:
            self.shared_experts = StackedExperts(spec.shared_experts, dim, hidden_dim, **options)

    @property
    def ep_group(self) -> ProcessGroup | None:
        """The ranks that share the experts; None when all of them are here."""
        group = getattr(self.dispatcher, "group", None)
        return None if group is None or group.size() == 1 else group

    @property
    def held_experts(self) -> range:
        """The experts that are here."""
        group = self.ep_group
        if group is None:
            return range(self.spec.num_experts)
        return experts_of_rank(self.spec.num_experts, group.size(), group.rank())

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_with_routing(x)[0]

    def forward_with_routing(self, x: Tensor) -> tuple[Tensor, Routing]:
        """The output, and the decision that led to it, for hosts that pass it on themselves."""
        tokens_TD = x.reshape(-1, x.shape[-1])
        routing = self.router(tokens_TD, self.context_of(x))
        dispatched = self.dispatcher.dispatch(tokens_TD, routing)
        expert_out_ND = dispatched.run(self.experts)
        out_TD = self.dispatcher.combine(expert_out_ND, dispatched)
        if self.shared_experts is not None:
            real_T = ~routing.of(Modality.PADDING)
            out_TD = out_TD + _sum_of_shared(self.shared_experts, tokens_TD, real_T)
        return out_TD.view(x.shape), routing

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """Checkpoints hold all experts: take the part that is held here."""
        if self.ep_group is not None:
            held = self.held_experts
            for name in dict(self.experts.named_parameters()):
                saved = state_dict.get(f"{prefix}experts.{name}")
                if saved is not None and len(saved) == self.spec.num_experts:
                    state_dict[f"{prefix}experts.{name}"] = saved[held.start : held.stop]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        spec = self.spec
        text = f"num_experts={spec.num_experts}, top_k={spec.top_k}, router={spec.router!r}"
        held = self.held_experts
        return text if self.ep_group is None else f"{text}, here={held.start}..{held.stop - 1}"


def _sum_of_shared(experts: StackedExperts, tokens_TD: Tensor, real_T: Tensor) -> Tensor:
    """Sum of the shared experts, on every token that is not padding."""
    num_shared, num_tokens = experts.num_experts, tokens_TD.shape[0]
    out_TD = experts(tokens_TD.repeat(num_shared, 1), [num_tokens] * num_shared)
    # a width of -1 would be ambiguous where there is no token
    out_TD = out_TD.view(num_shared, num_tokens, tokens_TD.shape[-1]).sum(0)
    return torch.where(real_T.unsqueeze(-1), out_TD, torch.zeros_like(out_TD))
