"""The numbers of one set of tokens: what `RoutingStats` says of a layer, a modality, a group.

Entropies are shares of the largest there can be (the logarithm of the number of experts that there
were to choose), so 1 is uniform whatever the number of experts. Of no tokens, everything is 0.

Shapes: E experts, H bins of routing-probability variance (RPV).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

# Below this entropy of the first choices a router counts as collapsed. With six experts, nine of
# ten tokens choosing one expert, the others shared evenly, have 0.27.
LOAD_ENTROPY_BOUND = 0.25


@dataclass(frozen=True)
class TokenStats:
    """Means over a set of tokens.

    Attributes:
        num_images: How often an image (a row with vision tokens) passed one of the layers.
        num_tokens: How often a token did, padding apart.
        load_E: Share of each expert in the first choices; sums to 1.
        selected_load_E: Share of each expert in all choices, before capacity; sums to 1.
        mean_probs_E: Mean clean probability of each expert.
        open_E: Bool, the experts that some token could choose.
        token_entropy: Mean entropy of the tokens' distributions.
        rpv, head_rpv, tail_rpv: Mean RPV of all tokens, of head and of tail tokens.
        tail_share: Tail tokens per token.
        experts_per_token: Choices per token, before capacity.
        dropped_share: Choices lost to capacity.
        head_bins_H, tail_bins_H: How many tokens are in each bin of `rpv_edges`; None unless
            detailed, as are the following.
        rank_norms: Mean norm of the tokens with the highest RPV of their image, of the next, and of
            the next; 0 where no norms were given.
        foreground_share: Foreground tokens per token.
        tail_foreground_share: Foreground tokens per tail token.
    """

    num_images: int
    num_tokens: int
    load_E: np.ndarray
    selected_load_E: np.ndarray
    mean_probs_E: np.ndarray
    open_E: np.ndarray
    token_entropy: float
    rpv: float
    head_rpv: float
    tail_rpv: float
    tail_share: float
    experts_per_token: float
    dropped_share: float
    head_bins_H: np.ndarray | None = None
    tail_bins_H: np.ndarray | None = None
    rank_norms: tuple[float, ...] | None = None
    foreground_share: float | None = None
    tail_foreground_share: float | None = None

    @classmethod
    def from_sums(cls, sums: Mapping[str, np.ndarray]) -> TokenStats:
        """Out of the sums of `RoutingStats`."""
        scalar = {name: float(values[0]) for name, values in sums.items() if len(values) == 1}
        tokens, tail = scalar["tokens"], scalar["tail"]
        selected = float(sums["selected"].sum())
        detailed: dict[str, Any] = {}
        if "head_bins" in sums:
            norms = zip(sums["rank_norm"], sums["rank_tokens"], strict=True)
            detailed = {
                "head_bins_H": sums["head_bins"],
                "tail_bins_H": sums["tail_bins"],
                "rank_norms": tuple(_ratio(norm, count) for norm, count in norms),
                "foreground_share": _ratio(scalar["foreground"], tokens),
                "tail_foreground_share": _ratio(scalar["foreground_tail"], tail),
            }
        return cls(
            num_images=round(scalar["images"]),
            num_tokens=round(tokens),
            load_E=_shares(sums["first"]),
            selected_load_E=_shares(sums["selected"]),
            mean_probs_E=_shares(sums["probs"]),
            open_E=sums["open"] > 0,
            token_entropy=_ratio(scalar["entropy"], tokens),
            rpv=_ratio(scalar["rpv"], tokens),
            head_rpv=_ratio(scalar["rpv"] - scalar["tail_rpv"], tokens - tail),
            tail_rpv=_ratio(scalar["tail_rpv"], tail),
            tail_share=_ratio(tail, tokens),
            experts_per_token=_ratio(selected, tokens),
            dropped_share=_ratio(scalar["dropped"], selected),
            **detailed,
        )

    @property
    def load_entropy(self) -> float:
        """Entropy of the first choices: 1 when all experts are chosen alike, 0 when one is."""
        return self._entropy(self.load_E)

    @property
    def mean_probs_entropy(self) -> float:
        """Entropy of the mean distribution. High with a low `token_entropy`: experts specialise."""
        return self._entropy(self.mean_probs_E)

    @property
    def dead_experts(self) -> list[int]:
        """Experts that no token chose although some could."""
        return np.flatnonzero(self.open_E & (self.selected_load_E == 0)).tolist()

    def complaint(self) -> str | None:
        """Why this router counts as collapsed; None if it does not."""
        reasons = []
        if self.dead_experts:
            dead = ", ".join(map(str, self.dead_experts))
            reasons.append(f"no token chose expert {dead} of {len(self.load_E)}")
        if self.num_tokens and self.load_entropy < LOAD_ENTROPY_BOUND:
            reasons.append(
                f"{self.load_E.max():.0%} of the first choices are expert {self.load_E.argmax()} "
                f"(load entropy {self.load_entropy:.2f}, below {LOAD_ENTROPY_BOUND})"
            )
        return "; ".join(reasons) or None

    def summary(self) -> dict[str, Any]:
        """JSON values, rounded to six digits."""
        values: dict[str, Any] = {
            "tokens": self.num_tokens,
            "load": self.load_E,
            "selected_load": self.selected_load_E,
            "load_entropy": self.load_entropy,
            "mean_probs_entropy": self.mean_probs_entropy,
            "token_entropy": self.token_entropy,
            "rpv": self.rpv,
            "head_rpv": self.head_rpv,
            "tail_rpv": self.tail_rpv,
            "tail_share": self.tail_share,
            "experts_per_token": self.experts_per_token,
            "dropped_share": self.dropped_share,
            "dead_experts": self.dead_experts,
        }
        if any(self.rank_norms or ()):
            values["rank_norms"] = self.rank_norms
        if self.foreground_share:
            values["foreground_share"] = self.foreground_share
            values["tail_foreground_share"] = self.tail_foreground_share
        if self.head_bins_H is not None and self.tail_bins_H is not None:
            values["head_bins"] = self.head_bins_H.astype(int)
            values["tail_bins"] = self.tail_bins_H.astype(int)
        return {name: rounded(value) for name, value in values.items()}

    def _entropy(self, shares_E: np.ndarray) -> float:
        some_E = shares_E[shares_E > 0]
        if self.open_E.sum() < 2:
            return float(some_E.sum())  # one expert alone is used evenly
        return float((some_E * -np.log(some_E)).sum() / np.log(self.open_E.sum())) + 0.0  # no -0


def rounded(value: Any) -> Any:
    """Plain numbers with six significant digits, in lists where there are several."""
    if isinstance(value, (np.ndarray, list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, (float, np.floating)) else int(value)


def _shares(amounts_E: np.ndarray) -> np.ndarray:
    total = amounts_E.sum()
    return amounts_E / total if total > 0 else np.zeros_like(amounts_E)


def _ratio(amount: float, count: float) -> float:
    return amount / count if count else 0.0
