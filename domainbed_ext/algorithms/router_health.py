"""What the routers of a run did since its last record: into the record, and a warning if one has
collapsed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from domainbed_ext.distributed import current_ranks, gather
from gmoe_ltdr import moe_layers
from gmoe_ltdr.expert_distance import distances_between, expert_distances
from gmoe_ltdr.routing import Routing
from gmoe_ltdr.stats import RoutingStats
from gmoe_ltdr.token_stats import rounded

# A record after fewer steps, such as a run's first, says nothing about a router's habits.
_MIN_STEPS = 10

_logger = logging.getLogger(__name__)


class RouterHealth:
    """Sums over the training steps since the last record, per layer and training domain.

    Args:
        num_domains: Number of training domains.
    """

    def __init__(self, num_domains: int):
        self._stats = RoutingStats([str(domain) for domain in range(num_domains)])

    def add(self, routings: Mapping[str, Routing], domains: Tensor) -> None:
        """Count one step. Waits for no device."""
        self._stats.add(routings, domains)

    def report(self, network: nn.Module) -> dict[str, Any]:
        """JSON values per layer, of all ranks' images; from here on counts anew. All ranks call it.

        Besides what `TokenStats.summary` has: the loads per training domain, and how far apart the
        experts' weights are.
        """
        stats = self._of_all_ranks()
        self._stats.clear()
        report = {}
        for name, layer in moe_layers(network).items():
            between = distances_between(expert_distances(layer))
            if name not in stats.layers:  # no step was taken
                continue
            numbers = stats.of(name)
            report[name] = numbers.summary()
            report[name]["domain_load"] = [
                rounded(stats.of(name, group=domain).load_E) for domain in stats.groups
            ]
            if len(between):
                report[name]["expert_distance"] = {
                    "mean": rounded(between.mean().item()),
                    "min": rounded(between.min().item()),
                }
            complaint = numbers.complaint()
            if complaint and stats.num_forwards >= _MIN_STEPS and current_ranks().is_first:
                _logger.warning(
                    "the router of %s has collapsed in the last %d steps: %s",
                    name,
                    stats.num_forwards,
                    complaint,
                )
        return report

    def state(self) -> list[dict[str, Any]]:
        """What each rank has counted; all ranks call it."""
        state = self._stats.state()
        return gather({**state, "sums": {k: v.cpu() for k, v in state["sums"].items()}})

    def load_state(self, states: list[dict[str, Any]]) -> None:
        """Go on from what `state` gave, on any number of ranks."""
        ranks = current_ranks()
        if len(states) == ranks.size:
            self._stats.load_state(states[ranks.rank])
            return
        self._stats.clear()
        if ranks.is_first:
            self._stats.merge(_sum_of(states, self._stats.groups))

    def _of_all_ranks(self) -> RoutingStats:
        return _sum_of(self.state(), self._stats.groups)


def _sum_of(states: list[dict[str, Any]], groups: tuple[str, ...]) -> RoutingStats:
    total = RoutingStats(groups)
    for state in states:
        part = RoutingStats(groups)
        part.load_state(state)
        total.merge(part)
    # every rank counts the same steps
    total.num_forwards = max(state["num_forwards"] for state in states)
    return total
