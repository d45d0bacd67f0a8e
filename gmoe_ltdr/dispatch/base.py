"""What a dispatcher is: two halves of one trip, with no state kept between them.

Every dispatcher equals the dense reference sum_e W[t, e] * expert_e(x_t), in values and gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from gmoe_ltdr.routing import Routing


@dataclass(frozen=True)
class Dispatched:
    """Rows ready for the experts.

    Attributes:
        tokens_ND: Copies of the tokens, ordered expert by expert.
        tokens_per_expert_e: int64, how many rows each expert has; sums to N.
        ticket: Private to the dispatcher that made it; `combine` needs it.
    """

    tokens_ND: Tensor
    tokens_per_expert_e: Tensor
    ticket: object


class Dispatcher(Protocol):
    """Not a module: no parameters, no buffers, shared by copies of a model."""

    def dispatch(self, tokens_TD: Tensor, routing: Routing) -> Dispatched:
        """Copy every token once for each of its experts."""
        ...

    def combine(self, expert_out_ND: Tensor, dispatched: Dispatched) -> Tensor:
        """Weighted sum of each token's expert outputs, (T, D) in the experts' dtype."""
        ...


def create_dispatcher(name: str) -> Dispatcher:
    """The dispatcher that `MoESpec.dispatcher` names.

    Raises:
        ValueError: One that this version does not have.
    """
    from gmoe_ltdr.dispatch.local import LocalDispatcher

    if name == "local":
        return LocalDispatcher()
    raise ValueError(
        f"dispatcher={name!r} is not available in this version; use 'local', which runs all "
        "experts on one device"
    )
