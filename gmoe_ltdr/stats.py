"""What routers do, in numbers: loads, entropies, tail tokens, routing-probability variance (RPV).

    stats = RoutingStats()
    with collect_routing(model) as routings:
        model(images)
    stats.add(routings)
    stats.of("blocks.8.mlp").load_E    # share of each expert in the first choices

All of it comes from sums over tokens. So the statistics of several batches, runs or machines can be
added, and no number is read from a device before it is asked for. Nothing carries a gradient.

Shapes: B images, L tokens per image, T = B * L, E experts, G groups of images, M = 2 modalities
(language and vision; padding is counted nowhere), C columns: the quantities that are summed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gmoe_ltdr.routing import Modality, Routing
from gmoe_ltdr.rpv_bins import NUM_RANK_GROUPS, num_rpv_bins, rank_group, rpv_bin
from gmoe_ltdr.tail import routing_probability_variance
from gmoe_ltdr.token_stats import TokenStats

_MODALITIES = (Modality.LANGUAGE, Modality.VISION)
_FORMAT = "gmoe-ltdr routing statistics 1"


class RoutingStats:
    """Sums over the tokens that the routers of one model have seen, by layer, group and modality.

    Args:
        groups: Names of the groups of images that are kept apart: classes, or training domains.
        detailed: Also what the paper's figures are made of: the histogram of RPV, token norms by
            rank of RPV, and overlap with a foreground. Costs memory; not for every training step.

    Attributes:
        num_forwards: How many times `add` was called, on all that was added together.
    """

    def __init__(self, groups: Sequence[str] = ("all",), *, detailed: bool = False):
        self.groups = tuple(groups)
        self.detailed = detailed
        self.num_forwards = 0
        self._sums: dict[str, Tensor] = {}  # (G, M, C), float64: counts are exact up to 2^53
        self._num_experts: dict[str, int] = {}

    @property
    def layers(self) -> list[str]:
        """Names of the layers, in depth order."""
        return list(self._sums)

    def num_experts(self, layer: str) -> int:
        return self._num_experts[layer]

    @torch.no_grad()
    def add(
        self,
        routings: Mapping[str, Routing],
        group_B: Tensor | None = None,
        *,
        norm_of: Mapping[str, Tensor] | None = None,
        foreground_BL: Tensor | None = None,
    ) -> None:
        """Count one forward. Waits for no device.

        Args:
            routings: What `collect_routing` gathered.
            group_B: Index of each image's group, int64; None: all images are of the first.
            norm_of: For detailed statistics, the norms of each layer's tokens (T,), by layer.
            foreground_BL: For detailed statistics, bool: what of an image is foreground.
        """
        if not routings:
            raise ValueError(
                "RoutingStats.add got no routing: run the model inside `with "
                "collect_routing(model) as routings:` and check that it has MoE layers"
            )
        for layer, plan in routings.items():
            norm_T = None if norm_of is None else norm_of[layer]
            sums = self._sums_of(plan, group_B, norm_T, foreground_BL)
            before = self._sums.get(layer)
            self._num_experts[layer] = plan.num_experts
            self._sums[layer] = sums if before is None else before.to(sums.device) + sums
        self.num_forwards += 1

    def merge(self, other: RoutingStats) -> None:
        """Count what another has counted, too."""
        if (self.groups, self.detailed) != (other.groups, other.detailed):
            raise ValueError(
                f"statistics of groups {self.groups}, detailed={self.detailed} cannot take in "
                f"those of groups {other.groups}, detailed={other.detailed}"
            )
        for layer, sums in other._sums.items():
            mine = self._sums.get(layer)
            if mine is not None and mine.shape != sums.shape:
                raise ValueError(
                    f"layer {layer!r} has {self._num_experts[layer]} experts here and "
                    f"{other._num_experts[layer]} there"
                )
            self._num_experts[layer] = other._num_experts[layer]
            self._sums[layer] = sums.clone() if mine is None else mine + sums.to(mine.device)
        self.num_forwards += other.num_forwards

    def of(
        self,
        layer: str | None = None,
        *,
        modality: Modality | None = None,
        group: str | None = None,
    ) -> TokenStats:
        """The numbers of one layer's tokens, or all layers' together; read from the device.

        Args:
            layer: None: all layers, which must have equally many experts.
            modality: None: language and vision.
            group: None: all groups.
        """
        layers = self.layers if layer is None else [layer]
        counts = {self._num_experts[name] for name in layers}
        if len(counts) != 1:
            raise ValueError(
                "layers with different numbers of experts have no numbers in common; name one of "
                f"{', '.join(self.layers)}"
                if counts
                else "nothing has been counted yet"
            )
        num_experts = counts.pop()
        sums_GMC = torch.stack([self._sums[name] for name in layers]).sum(0)
        if modality is not None:
            sums_GMC = sums_GMC[:, [_MODALITIES.index(modality)]]
        if group is not None:
            sums_GMC = sums_GMC[[self.groups.index(group)]]
        sums = sums_GMC.sum((0, 1)).cpu().numpy()
        widths = _widths(num_experts, self.detailed)
        ends = torch.tensor(list(widths.values())).cumsum(0).tolist()
        parts = {
            name: sums[end - width : end]
            for (name, width), end in zip(widths.items(), ends, strict=True)
        }
        return TokenStats.from_sums(parts)

    def by_group(self) -> dict[str, RoutingStats]:
        """The groups that any image was of, each by itself."""
        parts = {}
        for index, group in enumerate(self.groups):
            part = RoutingStats((group,), detailed=self.detailed)
            part.num_forwards = self.num_forwards
            part._num_experts = dict(self._num_experts)
            part._sums = {name: sums[[index]] for name, sums in self._sums.items()}
            if part.layers and part.of(part.layers[0]).num_tokens:
                parts[group] = part
        return parts

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: the sums."""
        return {
            "format": _FORMAT,
            "groups": list(self.groups),
            "detailed": self.detailed,
            "num_forwards": self.num_forwards,
            "num_experts": dict(self._num_experts),
            "sums": {name: sums.tolist() for name, sums in self._sums.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RoutingStats:
        """The inverse of `to_dict`.

        Raises:
            ValueError: Not what this version writes.
        """
        if values.get("format") != _FORMAT:
            raise ValueError(f"these are no routing statistics of this version ({_FORMAT})")
        stats = cls(values["groups"], detailed=values["detailed"])
        stats.num_forwards = values["num_forwards"]
        stats._num_experts = dict(values["num_experts"])
        stats._sums = {
            name: torch.tensor(sums, dtype=torch.float64) for name, sums in values["sums"].items()
        }
        return stats

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> RoutingStats:
        return cls.from_dict(json.loads(text))

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs, tensors where they are."""
        return {
            "num_forwards": self.num_forwards,
            "num_experts": dict(self._num_experts),
            "sums": dict(self._sums),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.num_forwards = state["num_forwards"]
        self._num_experts = dict(state["num_experts"])
        self._sums = dict(state["sums"])

    def clear(self) -> None:
        """Forget all that was counted."""
        self.load_state({"num_forwards": 0, "num_experts": {}, "sums": {}})

    def _sums_of(
        self,
        plan: Routing,
        group_B: Tensor | None,
        norm_T: Tensor | None,
        foreground_BL: Tensor | None,
    ) -> Tensor:
        """One forward of one layer, (G, M, C)."""
        batch, length = plan.shape_BL or (1, plan.modality_T.shape[0])
        device = plan.probs_TE.device
        columns = _columns(plan)
        if self.detailed:
            columns |= _detailed_columns(plan, norm_T, foreground_BL)
        widths = _widths(plan.num_experts, self.detailed)
        columns_TC = torch.cat(
            [columns[name].float().reshape(-1, width) for name, width in widths.items()], 1
        )
        # where() and not a product: a padding token may hold NaN
        columns_TC = torch.where(plan.of(*_MODALITIES).unsqueeze(-1), columns_TC, 0.0).double()
        is_modality_TM = torch.stack([plan.of(modality) for modality in _MODALITIES], 1)
        sums_BMC = torch.einsum(
            "blm,blc->bmc",
            is_modality_TM.double().view(batch, length, -1),
            columns_TC.view(batch, length, -1),
        )
        # an image is a row with vision tokens
        has_vision_B = is_modality_TM[:, _MODALITIES.index(Modality.VISION)].view(batch, length)
        sums_BMC[:, _MODALITIES.index(Modality.VISION), 0] = has_vision_B.any(1).double()
        if group_B is None:
            group_B = torch.zeros(batch, dtype=torch.int64, device=device)
        # a product with zeros and ones sums in one order, which index_add on a GPU does not
        is_group_GB = torch.arange(len(self.groups), device=device).unsqueeze(1) == group_B
        return torch.einsum("gb,bmc->gmc", is_group_GB.double(), sums_BMC)


def _widths(num_experts: int, detailed: bool) -> dict[str, int]:
    """The columns in order, and how many numbers each has."""
    widths = dict.fromkeys(("images", "tokens", "tail", "dropped", "entropy", "rpv", "tail_rpv"), 1)
    widths |= dict.fromkeys(("first", "selected", "probs", "open"), num_experts)
    if detailed:
        widths |= dict.fromkeys(("head_bins", "tail_bins"), num_rpv_bins(num_experts))
        widths |= dict.fromkeys(("rank_tokens", "rank_norm"), NUM_RANK_GROUPS)
        widths |= dict.fromkeys(("foreground", "foreground_tail"), 1)
    return widths


def _columns(plan: Routing) -> dict[str, Tensor]:
    """What is summed, for each token: (T,) or (T, width)."""
    probs_TE, tail_T = plan.probs_TE.detach(), plan.tail_mask_T
    experts_E = torch.arange(plan.num_experts, device=probs_TE.device)
    selected_TE = plan.selected_mask_TE
    # The best of those it got, as not every router gives a token what its logits prefer, or any;
    # argmax takes the first of equals, as `expert_rank` does.
    own_TE = plan.selection_logits_TE.masked_fill(~selected_TE, -torch.inf)
    first_T1 = own_TE.argmax(-1, keepdim=True)
    rpv_T = routing_probability_variance(probs_TE)
    return {
        "images": torch.zeros_like(rpv_T),  # filled in per image
        "tokens": torch.ones_like(rpv_T),
        "tail": tail_T,
        "dropped": (selected_TE & ~plan.dispatch_mask_TE).sum(-1),
        "entropy": _relative_entropy(probs_TE, plan.open_TE),
        "rpv": rpv_T,
        "tail_rpv": rpv_T * tail_T,
        "first": (first_T1 == experts_E) & selected_TE,
        "selected": selected_TE,
        "probs": probs_TE,
        "open": plan.open_TE,
    }


def _relative_entropy(probs_TE: Tensor, open_TE: Tensor) -> Tensor:
    """Entropy of each token's distribution over the largest that it could have. (T,)."""
    largest_T = open_TE.sum(-1).clamp(min=2).log()  # with one expert to choose, 0 of anything
    return torch.special.entr(probs_TE).sum(-1) / largest_T


def _detailed_columns(
    plan: Routing, norm_T: Tensor | None, foreground_BL: Tensor | None
) -> dict[str, Tensor]:
    shape_BL = plan.shape_BL or (1, plan.modality_T.shape[0])
    tail_T = plan.tail_mask_T
    rpv_T = routing_probability_variance(plan.probs_TE.detach())
    num_bins = num_rpv_bins(plan.num_experts)
    bins_H = torch.arange(num_bins, device=rpv_T.device)
    in_bin_TH = rpv_bin(rpv_T, plan.num_experts).unsqueeze(-1) == bins_H
    groups_R = torch.arange(NUM_RANK_GROUPS, device=rpv_T.device)
    zeros_T = torch.zeros_like(rpv_T)
    vision_BL = plan.of(Modality.VISION).view(shape_BL)
    in_group_TR = rank_group(rpv_T.view(shape_BL), vision_BL).view(-1, 1) == groups_R
    if norm_T is None:
        in_group_TR, norm_T = torch.zeros_like(in_group_TR), zeros_T
    foreground_T = zeros_T if foreground_BL is None else foreground_BL.reshape(-1)
    return {
        "head_bins": in_bin_TH & ~tail_T.unsqueeze(-1),
        "tail_bins": in_bin_TH & tail_T.unsqueeze(-1),
        "rank_tokens": in_group_TR,
        "rank_norm": in_group_TR * norm_T.detach().float().reshape(-1, 1),
        "foreground": foreground_T,
        "foreground_tail": foreground_T * tail_T,
    }
