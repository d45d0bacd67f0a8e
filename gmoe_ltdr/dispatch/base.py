"""What a dispatcher is: two halves of one trip, with no state kept between them.

Every dispatcher equals the dense reference sum_e W[t, e] * expert_e(x_t), in values and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.distributed import ProcessGroup

from gmoe_ltdr.dispatch.placement import experts_per_rank
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

    def run(self, experts: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What the experts make of the rows; an engine that overlaps travel has its own way."""
        return experts(self.tokens_ND, self.tokens_per_expert_e)


class Dispatcher(Protocol):
    """Not a module: no parameters, no buffers, shared by copies of a model."""

    def dispatch(self, tokens_TD: Tensor, routing: Routing) -> Dispatched:
        """Copy every token once for each of its experts."""
        ...

    def combine(self, expert_out_ND: Tensor, dispatched: Dispatched) -> Tensor:
        """Weighted sum of each token's expert outputs, (T, D) in the experts' dtype."""
        ...


def create_dispatcher(
    name: str, *, num_experts: int | None = None, group: ProcessGroup | None = None
) -> Dispatcher:
    """The dispatcher that `MoESpec.dispatcher` names.

    Args:
        name: "local" (all experts on this device), "all_to_all" or "tutel" (experts shared by the
            ranks of `group`), or "auto": local without a group of several ranks, else Tutel where
            it is installed and the ranks divide the experts, else all-to-all. Without such a group
            "all_to_all" is "local" too, and "tutel" means Tutel's kernels on one device.
        num_experts: Experts of the layer, all ranks together; needed with a group.
        group: The ranks that share the experts.

    Raises:
        ValueError: No such dispatcher, one that cannot use the group, or more ranks than experts.
        ImportError: Tutel was asked for by name and is not installed.
    """
    from gmoe_ltdr.dispatch.local import LocalDispatcher

    if name not in ("local", "all_to_all", "tutel", "auto"):
        raise ValueError(
            f"dispatcher={name!r} is not available in this version; use 'local', which runs all "
            "experts on one device, or 'auto'"
        )
    if group is None or group.size() == 1:
        if name != "tutel":
            return LocalDispatcher()
        from gmoe_ltdr.dispatch.tutel import TutelDispatcher

        return TutelDispatcher(num_experts=num_experts)
    if name == "local":
        raise ValueError(
            "dispatcher='local' runs all experts on one device, but the expert-parallel group "
            f"has {group.size()} ranks; use dispatcher='auto', or pass no ep_group"
        )
    if num_experts is None:
        raise ValueError("create_dispatcher needs num_experts to place experts on a group's ranks")
    experts_per_rank(num_experts, group.size())  # refuses more ranks than experts
    if name == "tutel" or (name == "auto" and _tutel_fits(num_experts, group.size())):
        from gmoe_ltdr.dispatch.tutel import TutelDispatcher

        return TutelDispatcher(group, num_experts=num_experts)
    from gmoe_ltdr.dispatch.all_to_all import AllToAllDispatcher

    return AllToAllDispatcher(group)


def _tutel_fits(num_experts: int, num_ranks: int) -> bool:
    """Every rank of a group sees the same numbers; Tutel itself must be on all ranks or none."""
    if num_experts % num_ranks:
        return False
    from gmoe_ltdr.dispatch.tutel import import_tutel

    try:
        import_tutel()
    except ImportError:
        return False
    return True
