"""Which token is language, vision or padding, and how the MoE layers of a decoder learn it.

A decoder layer calls its feed-forward network with the hidden states and nothing else. So the model
says once per forward what its tokens are, and all of its MoE layers read it from one object:

    modality = TokenModality()
    layer.mlp = MoE(dim, hidden_dim, spec, gated=True, context_of=modality)
    with modality.using(modality_map(input_ids, image_token_id, attention_mask)):
        hidden = decoder(...)

Shapes: B rows of the batch (sequences), S tokens per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from gmoe_ltdr.routing import Modality, TokenContext


def modality_map(
    input_ids: Tensor,
    image_token_id: int,
    attention_mask: Tensor | None = None,
    *,
    has_images: bool = True,
    vision_mask: Tensor | None = None,
) -> Tensor:
    """What each token is, where every image token has its own place among the ids. uint8 (B, S).

    Args:
        input_ids: (B, S), the tokens of this forward; with `vision_mask` only their shape counts.
        image_token_id: The id in place of which an image feature stands.
        attention_mask: 0 for padding; (B, S), or longer where a cache holds earlier tokens, which
            come first.
        has_images: Whether this forward brings images. Where it does not, an image token is a word
            that the model has generated.
        vision_mask: Bool (B, S): which tokens are vision, instead of looking for the id.

    Raises:
        ValueError: Shapes that do not fit.
    """
    shape = tuple(input_ids.shape)
    if vision_mask is None:
        vision_BS = (
            input_ids == image_token_id if has_images else torch.zeros_like(input_ids).bool()
        )
    elif tuple(vision_mask.shape) != shape:
        raise ValueError(
            f"vision_mask has shape {tuple(vision_mask.shape)}, but the tokens have {shape}"
        )
    else:
        vision_BS = vision_mask.bool()
    map_BS = torch.where(vision_BS, int(Modality.VISION), int(Modality.LANGUAGE))
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape[0] != shape[0]:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; it must be (batch, "
                f"tokens) with the {shape[0]} rows of the tokens {shape}"
            )
        if attention_mask.shape[1] < shape[1]:
            raise ValueError(
                f"attention_mask covers {attention_mask.shape[1]} tokens, but there are {shape[1]}"
            )
        padding_BS = attention_mask[:, attention_mask.shape[1] - shape[1] :] == 0
        map_BS = torch.where(padding_BS, int(Modality.PADDING), map_BS)
    return map_BS.to(torch.uint8)


def spliced_modality_map(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    feature_lengths: Sequence[int],
    *,
    max_length: int | None = None,
    padding_side: str = "right",
    image_token_id: int = -200,
) -> Tensor:
    """What each token is after LLaVA has put image features in place of one id. uint8 (B, L).

    Rows lose their padding, every placeholder grows to its image's number of features, rows are cut
    to `max_length` (inside an image too), and padded again. A row without a placeholder uses up one
    entry of the features all the same, and shows none of them.

    Args:
        input_ids: (B, S), with one placeholder per image.
        attention_mask: (B, S), 0 for padding; None: there is none.
        feature_lengths: Features of each entry, in the order in which rows use them up.
        max_length: What the tokenizer allows; None is no limit.
        padding_side: "right" or "left".
        image_token_id: The placeholder.

    Raises:
        ValueError: More or fewer entries than the rows use up, or no such side.
    """
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side={padding_side!r} is neither 'right' nor 'left'")
    kept_BS = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask != 0
    language, vision = int(Modality.LANGUAGE), int(Modality.VISION)
    rows, used = [], 0
    for ids_S, kept_S in zip(input_ids, kept_BS, strict=True):
        row: list[int] = []
        ids = ids_S[kept_S].tolist()
        for token in ids:
            if token != image_token_id:
                row.append(language)
                continue
            if used < len(feature_lengths):
                row += [vision] * feature_lengths[used]
            used += 1
        used += image_token_id not in ids
        rows.append(row[:max_length])
    if used != len(feature_lengths):
        raise ValueError(
            f"the rows use up {used} images (a row without any uses up one), but there are "
            f"{len(feature_lengths)}"
        )
    length = max((len(row) for row in rows), default=0)
    padding = [[int(Modality.PADDING)] * (length - len(row)) for row in rows]
    if padding_side == "left":
        rows, padding = padding, rows
    spliced = [head + tail for head, tail in zip(rows, padding, strict=True)]
    return torch.tensor(spliced, dtype=torch.uint8, device=input_ids.device).view(-1, length)


class TokenModality:
    """`context_of` of the MoE layers of one decoder, which all share this object.

    It knows the tokens of a forward inside `using` and forgets them afterwards, so that no layer
    ever routes by the tokens of another forward. A single token per row needs no telling: that is
    decoding with a cache, and a generated token is language.

    Activation checkpointing runs layers again during backward, when the forward is long over and
    perhaps another one too. `checkpoint_context` binds the recomputation to its own forward:

        torch.utils.checkpoint.checkpoint(
            layer, hidden, use_reentrant=False, context_fn=modality.checkpoint_context
        )

    Not thread-local on purpose: autograd recomputes in threads of its own. So one model object runs
    one forward at a time, and `nn.DataParallel` cannot be used.

    Attributes:
        image_info: What else is known of the rows, set by `gmoe_ltdr.image_info.set_image_info`.
    """

    def __init__(self) -> None:
        self.image_info: dict[str, Tensor] = {}
        self._context: TokenContext | None = None

    @property
    def current(self) -> TokenContext | None:
        """The tokens of the forward that is running; None outside of one."""
        return self._context

    def using(self, tokens: Tensor | TokenContext) -> AbstractContextManager[None]:
        """A context in which the layers see these tokens.

        Args:
            tokens: Values of `Modality`, uint8 (B, S), or more than that is known of them.
        """
        context = tokens if isinstance(tokens, TokenContext) else TokenContext(tokens)
        if self.image_info:  # as it is now: recomputation may come after it has been set anew
            context = replace(context, **self.image_info)
        return _Using(self, context)

    def checkpoint_context(
        self,
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """`context_fn` of torch's activation checkpointing: recompute with today's tokens."""
        return nullcontext(), _Using(self, self._context)

    def __call__(self, x: Tensor) -> TokenContext:
        """The context of a layer's input (B, S, D).

        Raises:
            RuntimeError: It is not known, or is that of other tokens.
        """
        context, shape = self._context, tuple(x.shape[:-1])
        if context is None or tuple(context.modality_BL.shape) != shape:
            if len(shape) != 2 or shape[1] != 1:
                raise RuntimeError(self._what_is_wrong(shape))
            language_B1 = torch.full(
                shape, int(Modality.LANGUAGE), dtype=torch.uint8, device=x.device
            )
            return TokenContext(language_B1, **self.image_info)
        return context.to(x.device)  # a decoder may be spread over devices

    def _what_is_wrong(self, shape: tuple[int, ...]) -> str:
        if self._context is not None:
            known = tuple(self._context.modality_BL.shape)
            return f"the tokens of this forward were announced as {known}, but are {shape}"
        return (
            f"nothing is known of these {shape} tokens: run the whole model, or the decoder inside "
            "`with modality.using(...)`; if this is activation checkpointing, switch it on with "
            "the model's gradient_checkpointing_enable(), or give torch's checkpoint "
            "context_fn=modality.checkpoint_context"
        )


class _Using:
    """Sets the tokens of a `TokenModality`, any number of times. A retained graph recomputes again,
    which a generator could not."""

    def __init__(self, owner: TokenModality, context: TokenContext | None):
        self._owner = owner
        self._context = context
        self._before: list[TokenContext | None] = []

    def __enter__(self) -> None:
        self._before.append(self._owner._context)
        self._owner._context = self._context

    def __exit__(self, *_error: object) -> None:
        self._owner._context = self._before.pop()
