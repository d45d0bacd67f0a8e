"""Other ways to make vision tokens sure of their experts: the controls of LTDR's table VII (v2).

LTDR lets vision tokens specialise by not balancing them. These push them to, all else being equal:

- temperature: Gumbel-softmax at a temperature below 1;
- entropy: a loss on the mean entropy of their routing distributions;
- variance: a loss that rewards their mean routing-probability variance.

The paper gives no coefficients but the temperature, 0.7. Shapes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gmoe_ltdr.tail import routing_probability_variance

SHARPENING_OPTIONS = {
    "sharpening": ("none", "temperature", "entropy", "variance"),
    "sharpening_strength": None,
}
_DEFAULT_STRENGTH = {"temperature": 0.7, "entropy": 0.01, "variance": 0.01}


@dataclass(frozen=True)
class Sharpening:
    """How vision tokens are made surer than the gate is.

    Attributes:
        kind: One of the three, or "none".
        strength: The temperature, or the weight of the loss.
    """

    kind: Literal["none", "temperature", "entropy", "variance"] = "none"
    strength: float = 0.0

    @classmethod
    def of_options(cls, options: Mapping[str, Any]) -> Sharpening:
        """What `MoESpec.router_options` say: `sharpening`, and `sharpening_strength` if it is not
        0.7 for the temperature or 0.01 for a loss.

        Raises:
            ValueError: A strength that is not positive, or one for nothing.
        """
        kind, given = options.get("sharpening", "none"), options.get("sharpening_strength")
        if kind == "none":
            if given is not None:
                raise ValueError(
                    f"router_options['sharpening_strength']={given} needs 'sharpening': "
                    "temperature, entropy or variance"
                )
            return cls()
        strength = _DEFAULT_STRENGTH[kind] if given is None else given
        if not strength > 0:
            raise ValueError(f"router_options['sharpening_strength']={strength} must be positive")
        return cls(kind, strength)

    def temper(self, logits_TE: Tensor, vision_T: Tensor) -> Tensor:
        """Logits, those of vision tokens divided by the temperature."""
        if self.kind != "temperature":
            return logits_TE
        return torch.where(vision_T.unsqueeze(-1), logits_TE / self.strength, logits_TE)

    def noise(self, logits_TE: Tensor, vision_T: Tensor) -> Tensor | None:
        """Gumbel noise of vision tokens at the temperature, for training; None without one."""
        if self.kind != "temperature":
            return None
        gumbel_TE = -torch.empty_like(logits_TE).exponential_().log()
        return torch.where(vision_T.unsqueeze(-1), gumbel_TE / self.strength, 0.0)

    def losses(self, probs_TE: Tensor, vision_T: Tensor) -> dict[str, Tensor]:
        """What a training step adds, by name, weighted; zero where there is no vision token."""
        if self.kind not in ("entropy", "variance"):
            return {}
        # what is not vision may hold NaN, and a gradient of zero times NaN is NaN
        vision_TE = torch.where(vision_T.unsqueeze(-1), probs_TE, 1 / probs_TE.shape[-1])
        if self.kind == "entropy":
            return {"entropy_loss": self.strength * _mean(_entropy(vision_TE), vision_T)}
        rpv_T = routing_probability_variance(vision_TE)
        return {"variance_loss": -self.strength * _mean(rpv_T, vision_T)}


def _entropy(probs_TE: Tensor) -> Tensor:
    # p log p has an infinite slope at 0
    positive_TE = probs_TE.clamp(min=torch.finfo(torch.float32).tiny)
    return -(probs_TE * positive_TE.log()).sum(-1)


def _mean(value_T: Tensor, chosen_T: Tensor) -> Tensor:
    return torch.where(chosen_T, value_T, 0.0).sum() / chosen_T.sum().clamp(min=1)
