"""Experts: E feed-forward networks of equal shape, their weights stacked.

How they are computed is a matter of speed alone: `expert_backends.py` holds the ways, all equal.

A language model's feed-forward network is gated (SwiGLU: down(silu(gate(x)) * up(x))). Here that is
the same expert with a first layer of twice the outputs, gate and up one behind the other, and an
activation that multiplies its two halves. So there is one product instead of two, and dispatch,
sharding, checkpoints and back ends need not know.

Shapes: E experts here (e of them on this rank), N rows ordered expert by expert, D width, F hidden
width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gmoe_ltdr.expert_backends import compute_experts


class GatedActivation(nn.Module):
    """act(gate) * up, of rows that hold both one behind the other: (..., 2F) to (..., F)."""

    def __init__(self, act: nn.Module):
        super().__init__()
        self.act = act

    def forward(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return self.act(gate) * up


def width_of_pieces(hidden_dim: int, num_pieces: int) -> int:
    """Hidden width of each of so many equal pieces of a network.

    Raises:
        ValueError: There are none.
    """
    if hidden_dim % num_pieces:
        raise ValueError(
            f"expert_split={num_pieces} does not divide the hidden width {hidden_dim}; choose a "
            "divisor of it"
        )
    return hidden_dim // num_pieces


@torch.no_grad()
def split_ffn(
    first: Sequence[nn.Linear], second: nn.Linear, num_pieces: int
) -> list[dict[str, Tensor]]:
    """Networks that sum to one feed-forward network, each with a part of its hidden units.

    Each gets the last layer's bias divided by their number: copied, it would count several times.

    Args:
        first: The layers that read the input: fc1; of a gated network, gate and up.
        second: The layer that writes the output.
        num_pieces: 1 gives the network itself.

    Returns:
        For each piece, the parameters of an expert by their names in `StackedExperts`; biases only
        where the network has them.
    """
    width = width_of_pieces(second.in_features, num_pieces)
    pieces = []
    for start in range(0, second.in_features, width):
        units = slice(start, start + width)
        piece = {
            "fc1_weight": torch.cat([layer.weight[units] for layer in first]),
            "fc2_weight": second.weight[:, units],
        }
        if first[0].bias is not None:
            piece["fc1_bias"] = torch.cat([layer.bias[units] for layer in first])
        if second.bias is not None:
            piece["fc2_bias"] = second.bias / num_pieces
        pieces.append(piece)
    return pieces


class StackedExperts(nn.Module):
    """Linear, activation, dropout, linear: once per expert.

    Args:
        num_experts: E.
        dim: D.
        hidden_dim: F.
        dropout: Between the two linear layers, in training (GMoE: 0.1).
        act_layer: Activation between them.
        bias: Whether the two linear layers have biases.
        gated: Whether the activation of one linear layer multiplies another's output (SwiGLU).

    Attributes:
        fc1_weight: (E, F, D), the axis order of nn.Linear with experts in front; gated: (E, 2F, D),
            the gate's rows first.
        fc1_bias: (E, F); gated: (E, 2F).
        fc2_weight: (E, D, F).
        fc2_bias: (E, D).
        backend: How to compute, a name in `EXPERT_BACKENDS` or "auto". No part of the model: it is
            in no checkpoint. Set it with `use_expert_backend`.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        *,
        dropout: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        bias: tuple[bool, bool] = (True, True),
        gated: bool = False,
    ):
        super().__init__()
        fc1_dim = 2 * hidden_dim if gated else hidden_dim
        self.fc1_weight = nn.Parameter(torch.empty(num_experts, fc1_dim, dim))
        self.fc2_weight = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.fc1_bias = nn.Parameter(torch.empty(num_experts, fc1_dim)) if bias[0] else None
        self.fc2_bias = nn.Parameter(torch.empty(num_experts, dim)) if bias[1] else None
        self.act = GatedActivation(act_layer()) if gated else act_layer()
        self.drop = nn.Dropout(dropout)
        self.backend = "auto"
        self.reset_parameters()

    @property
    def num_experts(self) -> int:
        return self.fc1_weight.shape[0]

    @property
    def gated(self) -> bool:
        return isinstance(self.act, GatedActivation)

    def reset_parameters(self) -> None:
        """Initialise each expert as nn.Linear would."""
        for weight, bias in ((self.fc1_weight, self.fc1_bias), (self.fc2_weight, self.fc2_bias)):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    @torch.no_grad()
    def copy_from_dense_(
        self, fc1: nn.Linear, fc2: nn.Linear, *, num_pieces: int = 1, first_expert: int = 0
    ) -> None:
        """Make every expert a copy of one dense feed-forward network (upcycling), or of a piece.

        Args:
            fc1, fc2: The network's two layers.
            num_pieces: Expert e gets piece e mod num_pieces, see `split_ffn`.
            first_expert: Number of the first expert here, where a rank holds a part of them.
        """
        self._copy_pieces_(split_ffn([fc1], fc2, num_pieces), first_expert)

    @torch.no_grad()
    def copy_from_gated_(
        self,
        gate: nn.Linear,
        up: nn.Linear,
        down: nn.Linear,
        *,
        num_pieces: int = 1,
        first_expert: int = 0,
    ) -> None:
        """The same for a gated network, whose output is down(act(gate(x)) * up(x))."""
        self._copy_pieces_(split_ffn([gate, up], down, num_pieces), first_expert)

    @torch.no_grad()
    def scale_output_(self, scale: float) -> None:
        """Multiply what every expert puts out."""
        self.fc2_weight.mul_(scale)
        if self.fc2_bias is not None:
            self.fc2_bias.mul_(scale)

    def _copy_pieces_(self, pieces: Sequence[Mapping[str, Tensor]], first_expert: int) -> None:
        for expert in range(self.num_experts):
            piece = pieces[(first_expert + expert) % len(pieces)]
            for name, parameter in self.named_parameters():
                parameter[expert].copy_(piece[name])

    def forward(self, tokens_ND: Tensor, tokens_per_expert_e: Tensor | Sequence[int]) -> Tensor:
        """Each expert computes its own rows.

        Args:
            tokens_ND: Rows ordered expert by expert.
            tokens_per_expert_e: How many rows belong to each. Rows behind the last expert's are not
                computed; their results are undefined.
        """
        return compute_experts(self, tokens_ND, tokens_per_expert_e)

    def extra_repr(self) -> str:
        num_experts, dim, hidden_dim = self.fc2_weight.shape
        gated = ", gated" if self.gated else ""
        return f"{num_experts}, dim={dim}, hidden_dim={hidden_dim}{gated}, backend={self.backend!r}"
