"""The routing decision as a value: which experts each token goes to, and with what weights.

Legend (whole package): B rows of the batch (images), L tokens per row, T = B * L tokens, D model
width, F expert hidden width, E experts, N routed copies of tokens, ordered expert by expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor


class Modality(IntEnum):
    """What a token is. A plain ViT has vision tokens only, its class token included."""

    LANGUAGE = 0
    VISION = 1
    PADDING = 2  # never dispatched, never counted, in no loss


# Logit of an expert that a token cannot choose. Its probability is exactly 0, while sums and
# gradients stay finite, which they would not with an infinite one.
CLOSED = -1e4


@dataclass(frozen=True)
class TokenContext:
    """What a layer cannot see in its tokens: their modality, their image, and side information.

    Attributes:
        modality_BL: uint8 (B, L), values of `Modality`. Its shape says which tokens share an image:
            one row is one image (or one sequence).
        is_cls_BL: bool (B, L), the class and register tokens of a ViT; None when there are none.
        attention_BL: float (B, L), how much the class token (or the instruction) attends to each
            token; for selection by attention (IAT).
        domain_B: int64 (B,), training environment of each image, for routers that want it.
        embedding_BD: float (B, *), one embedding per image, for routers that want it.
        instruction_BL: bool (B, L), the tokens that a router for whole sequences looks at: in a
            language model the prompt without the answer. None: every language token of a sequence,
            and the patches of an image without language.
        decided_logits_BE: float (B, E), what such a router decided before, to be used again: see
            `gmoe_ltdr.decoding`.
    """

    modality_BL: Tensor
    is_cls_BL: Tensor | None = None
    attention_BL: Tensor | None = None
    domain_B: Tensor | None = None
    embedding_BD: Tensor | None = None
    instruction_BL: Tensor | None = None
    decided_logits_BE: Tensor | None = None

    def __post_init__(self) -> None:
        if self.modality_BL.dim() != 2:
            raise ValueError(
                f"modality must have shape (batch, tokens), got {tuple(self.modality_BL.shape)}"
            )
        for name in ("is_cls_BL", "attention_BL", "instruction_BL"):
            value = getattr(self, name)
            if value is not None and value.shape != self.modality_BL.shape:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, "
                    f"but modality has {tuple(self.modality_BL.shape)}"
                )
        for name in ("domain_B", "embedding_BD", "decided_logits_BE"):
            value = getattr(self, name)
            if value is not None and value.shape[0] != self.modality_BL.shape[0]:
                raise ValueError(
                    f"{name} describes {value.shape[0]} images, but this forward has "
                    f"{self.modality_BL.shape[0]}; set it anew before each forward (with "
                    "beams, a row for each of them)"
                )

    def to(self, device: torch.device) -> TokenContext:
        """The same on another device; itself where it is there already."""
        if self.modality_BL.device == device:
            return self
        tensors = {k: v.to(device) for k, v in vars(self).items() if v is not None}
        return replace(self, **tensors)

    @classmethod
    def all_vision(
        cls,
        batch: int,
        length: int,
        *,
        num_prefix_tokens: int = 0,
        device: torch.device | str | None = None,
    ) -> TokenContext:
        """Context of a plain ViT: every token is a vision token.

        Args:
            batch: Number of images.
            length: Tokens per image, class and register tokens included.
            num_prefix_tokens: How many leading tokens of each image are class or register tokens.
            device: Where the masks live.
        """
        modality_BL = torch.full(
            (batch, length), int(Modality.VISION), dtype=torch.uint8, device=device
        )
        is_cls_BL = None
        if num_prefix_tokens:
            is_cls_BL = torch.arange(length, device=device) < num_prefix_tokens
            is_cls_BL = is_cls_BL.expand(batch, length)
        return cls(modality_BL=modality_BL, is_cls_BL=is_cls_BL)


@dataclass(frozen=True)
class ExpertGroup:
    """Experts that some tokens have to themselves.

    Attributes:
        tokens_T: Bool, which tokens.
        experts: Their experts.
    """

    tokens_T: Tensor
    experts: range


@dataclass(frozen=True)
class Routing:
    """What the router decided for T = B * L tokens. A row of the mask holds any number of experts.

    Attributes:
        logits_TE: float32, clean (before gate noise); `CLOSED` where a token cannot choose.
        probs_TE: float32, softmax of the clean logits; carries the gradient of the balance losses.
        dispatch_mask_TE: bool, which experts compute which token, capacity already applied.
        combine_weights_TE: float32, zero outside the mask. Rows sum to 1 unless the weighting is
            "raw", one expert was chosen, or capacity dropped a choice.
        modality_T: uint8, values of `Modality`.
        tail_mask_T: bool, tokens that were given more experts (the vision tail tokens).
        noisy_logits_TE: what the selection saw; None when there was no gate noise.
        requested_mask_TE: the mask before capacity; None when there is no capacity.
        shape_BL: (B, L), to fold T back into images.
        max_experts_per_token: No row of the mask holds more. Known without looking at the mask, so
            that buffers can be allocated without waiting for a device; None is all experts.
        balance_groups: Where not all tokens are balanced over all experts: the groups that are
            balanced, each by itself.
        router_losses: What this router adds to the loss besides balance, by name; scalars, already
            weighted. `balance_loss` includes them.
    """

    logits_TE: Tensor
    probs_TE: Tensor
    dispatch_mask_TE: Tensor
    combine_weights_TE: Tensor
    modality_T: Tensor
    tail_mask_T: Tensor
    noisy_logits_TE: Tensor | None = None
    requested_mask_TE: Tensor | None = None
    shape_BL: tuple[int, int] | None = None
    max_experts_per_token: int | None = None
    balance_groups: tuple[ExpertGroup, ...] | None = None
    router_losses: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        return self.logits_TE.shape[-1]

    @property
    def selection_logits_TE(self) -> Tensor:
        """The logits that chose the experts: noisy in training with gate noise, else clean."""
        return self.logits_TE if self.noisy_logits_TE is None else self.noisy_logits_TE

    @property
    def open_TE(self) -> Tensor:
        """Bool: which experts each token could choose."""
        return self.logits_TE > CLOSED / 2

    @property
    def selected_mask_TE(self) -> Tensor:
        """The choices before capacity dropped any."""
        return self.dispatch_mask_TE if self.requested_mask_TE is None else self.requested_mask_TE

    @property
    def tokens_per_expert_E(self) -> Tensor:
        return self.dispatch_mask_TE.sum(0)

    @property
    def experts_per_token_T(self) -> Tensor:
        return self.dispatch_mask_TE.sum(1)

    @property
    def num_assignments(self) -> int:
        return int(self.dispatch_mask_TE.sum())

    def of(self, *modalities: Modality) -> Tensor:
        """Bool (T,): which tokens belong to one of `modalities`."""
        mask_T = torch.zeros_like(self.modality_T, dtype=torch.bool)
        for modality in modalities:
            mask_T = mask_T | (self.modality_T == int(modality))
        return mask_T

    def of_group(self, group: ExpertGroup) -> Routing:
        """The plan of a group's experts alone, in which all other tokens are padding."""
        columns = slice(group.experts.start, group.experts.stop)
        tables: dict[str, Any] = {
            name: value[:, columns]
            for name, value in vars(self).items()
            if name.endswith("_TE") and value is not None
        }
        modality_T = torch.where(group.tokens_T, self.modality_T, int(Modality.PADDING))
        return replace(self, **tables, modality_T=modality_T, balance_groups=None, router_losses={})

    def detach(self) -> Routing:
        """The same decision without its graph: for statistics that outlive a step."""
        tensors: dict[str, Any] = {
            k: v.detach() for k, v in vars(self).items() if isinstance(v, Tensor)
        }
        losses = {name: loss.detach() for name, loss in self.router_losses.items()}
        return replace(self, **tensors, router_losses=losses)


def expert_rank(logits_TE: Tensor) -> Tensor:
    """Place of every expert in its token's order of preference, 0 first. Int64 (T, E).

    Equal logits are ordered by expert index, so that replays agree; `torch.topk` promises no order.
    """
    better_TEE = logits_TE.unsqueeze(-2) > logits_TE.unsqueeze(-1)
    experts_E = torch.arange(logits_TE.shape[-1], device=logits_TE.device)
    earlier_EE = experts_E.unsqueeze(0) < experts_E.unsqueeze(1)
    tied_TEE = (logits_TE.unsqueeze(-2) == logits_TE.unsqueeze(-1)) & earlier_EE
    return (better_TEE | tied_TEE).sum(-1)


def place_in_row(scores: Tensor) -> Tensor:
    """Place of every score in the descending order of its row, 0 first. Int64, of the same shape.

    Equal scores are ordered by index. For rows of tokens, which are too long for `expert_rank`.
    """
    if torch.onnx.is_in_onnx_export():
        # ONNX knows no stable sort
        return expert_rank(scores)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, places)
