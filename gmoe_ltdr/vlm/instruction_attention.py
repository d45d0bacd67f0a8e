"""How much the instruction attends to each image token: the scores of IAT, selection by attention
(table 7).

The paper does not say whose attention. Here it is that of the same decoder layer, which comes
before its feed-forward network, averaged over heads and over the words of the instruction.

Shapes: B rows, H heads, S tokens per row, K tokens that they attend to (those in the cache first).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gmoe_ltdr.routers.instruct import instruction_tokens
from gmoe_ltdr.routing import TokenContext
from gmoe_ltdr.vlm.modality import TokenModality

_REMEDY = "load or make the model with attn_implementation='eager'"


@torch.no_grad()
def instruction_scores(weights_BHSK: Tensor, instruction_BS: Tensor, *, past: int = 0) -> Tensor:
    """For every token the mean attention of the instruction's words that can see it; 0 where none
    can. Float32 (B, S).

    Args:
        weights_BHSK: Attention probabilities of a causal layer.
        instruction_BS: Bool, the words.
        past: Tokens of earlier forwards, which come first in K.
    """
    length = instruction_BS.shape[1]
    mean_BSS = weights_BHSK[..., past : past + length].float().mean(1)
    sees_SS = torch.ones(length, length, dtype=torch.bool, device=mean_BSS.device).tril()
    counted_BSS = instruction_BS.unsqueeze(-1) & sees_SS
    total_BS = torch.where(counted_BSS, mean_BSS, 0.0).sum(1)
    return total_BS / counted_BSS.sum(1).clamp(min=1)


class InstructionAttention:
    """`context_of` of one sparse layer: what all layers know, and the scores of this layer's own
    attention.

    Args:
        modality: What all layers know.
        layer: A decoder layer with `self_attn`, whose second output are the probabilities.
    """

    def __init__(self, modality: TokenModality, layer: Any):
        self._modality = modality
        self._weights: Tensor | None = None
        self._past = 0
        layer.self_attn.register_forward_hook(self._keep, with_kwargs=True)

    @property
    def image_info(self) -> dict[str, Tensor]:
        """See `TokenModality`, which holds it for all layers."""
        return self._modality.image_info

    @image_info.setter
    def image_info(self, info: dict[str, Tensor]) -> None:
        self._modality.image_info = info

    def _keep(
        self, attention: nn.Module, _inputs: Any, kwargs: Mapping[str, Any], outputs: Any
    ) -> None:
        self._weights = outputs[1]
        self._past = 0
        cache = next((v for v in kwargs.values() if hasattr(v, "get_seq_length")), None)
        if cache is not None:  # which holds the tokens of this forward by now
            self._past = int(cache.get_seq_length(attention.layer_idx)) - outputs[0].shape[1]

    def __call__(self, x: Tensor) -> TokenContext:
        """The context of a layer's input (B, S, D).

        Raises:
            ValueError: The attention did not hand out its probabilities.
        """
        context = self._modality(x)
        weights, self._weights = self._weights, None  # nothing is kept for another forward
        if x.shape[1] == 1:  # a generated word
            scores_BS = torch.zeros(x.shape[:2], device=x.device)
        elif weights is None:
            raise ValueError(
                "TailRule(kind='attention') needs the probabilities of attention, which were not "
                f"handed out; {_REMEDY}"
            )
        else:
            scores_BS = instruction_scores(weights, instruction_tokens(context), past=self._past)
        return replace(context, attention_BL=scores_BS)


def check_attention(decoder: Any) -> None:
    """Whether a language model's layers can hand out the probabilities of their attention.

    Raises:
        ValueError: They use a kernel that never has them.
    """
    kind = getattr(decoder.config, "_attn_implementation", None)
    if kind != "eager":
        raise ValueError(
            f"TailRule(kind='attention') needs the probabilities of attention, which {kind!r} "
            f"attention does not have; {_REMEDY}"
        )
