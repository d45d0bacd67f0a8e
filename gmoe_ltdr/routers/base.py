"""What every router is: tokens and their context in, a `Routing` out. And the registry of names.

Logits, probabilities, weights and losses are float32 whatever autocast says and whatever the
parameters' type is: rounding probabilities to bfloat16 moves the variance of near-uniform tokens by
more than 10 % and flips decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gmoe_ltdr.routing import Routing, TokenContext
from gmoe_ltdr.spec import OPTIONS, MoESpec


class Router(nn.Module):
    """Decides which experts each token goes to.

    Subclasses take `(dim, spec)` and keep parameters only; nothing of a forward stays on `self`.
    `collect_routing` reads what they return.
    """

    def __init__(self, dim: int, spec: MoESpec):
        super().__init__()
        self.spec = spec

    def forward(self, tokens_TD: Tensor, context: TokenContext) -> Routing:
        """Route.

        Args:
            tokens_TD: The layer's tokens, rows of the batch one after the other.
            context: Modality (and side information) of the same tokens, folded as (B, L).
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward")


def check_router_options(spec: MoESpec, options: Mapping[str, Sequence[Any] | None]) -> None:
    """Refuses what `spec.router_options` holds and its router does not know.

    Args:
        spec: The description of the layer.
        options: The router's own options with their possible values, None for any; those of the
            losses (`gmoe_ltdr.spec.OPTIONS`) are always allowed.

    Raises:
        ValueError: An unknown option, or an impossible value.
    """
    known = {**OPTIONS, **options}
    for name, value in spec.router_options.items():
        if name not in known:
            raise ValueError(
                f"router {spec.router!r} has no option {name!r}; it has {', '.join(sorted(known))}"
            )
        choices = known[name]
        if choices is not None and value not in choices:
            raise ValueError(f"router_options[{name!r}]={value!r} is not one of {choices}")


def in_backward() -> bool:
    """Whether this forward is a recomputation by activation checkpointing, which must not advance
    what a router accumulates."""
    return torch._C._current_graph_task_id() != -1


_ROUTERS: dict[str, type[Router]] = {}
R = TypeVar("R", bound=type[Router])


def register_router(name: str) -> Callable[[R], R]:
    """Class decorator: make a router available as `MoESpec(router=name)`."""

    def register(cls: R) -> R:
        if name in _ROUTERS and _ROUTERS[name].__qualname__ != cls.__qualname__:
            raise ValueError(f"a router named {name!r} exists already: {_ROUTERS[name]}")
        _ROUTERS[name] = cls
        return cls

    return register


def available_routers() -> list[str]:
    """Names that `MoESpec(router=...)` knows."""
    return sorted(_ROUTERS)


def create_router(dim: int, spec: MoESpec) -> Router:
    """The router that `spec` names, for tokens of width `dim`.

    Raises:
        ValueError: No router of that name.
    """
    if spec.router not in _ROUTERS:
        raise ValueError(f"no router {spec.router!r}; there are {', '.join(available_routers())}")
    return _ROUTERS[spec.router](dim, spec)
