"""What conversion puts around the forwards of a MoE-LLaVA model.

Splicing tells what the tokens are, the decoder's forward passes that on to its layers, and a
layer's forward keeps it for recomputation. All of them call the host's own.

Shapes: B rows, S tokens per row, E experts.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gmoe_ltdr.collect import collect_routing
from gmoe_ltdr.decoding import reuse_decisions, sequence_decisions, sequence_routers
from gmoe_ltdr.routers.base import is_recomputed
from gmoe_ltdr.routing import Modality, TokenContext
from gmoe_ltdr.vlm.cached_decisions import decisions_in, with_decisions, without_decisions
from gmoe_ltdr.vlm.modality import TokenModality

SPLICE = "prepare_inputs_labels_for_multimodal"
_IGNORE, _PROMPT = -100, -101  # no label; the same, but known to be no image feature


class Splicing:
    """The host's splicing, from whose labels we read what each spliced token is.

    Image features get the label -100. So every -100 among the labels that go in is marked
    beforehand; what comes out as a plain -100 is an image feature, whatever padding side,
    truncation and number of images have made of the rows.
    """

    def __init__(self, host: Any, modality: TokenModality, *, depth: int):
        self._splice = getattr(host, SPLICE)
        self._depth = depth
        self.modality = modality
        self._tokens: TokenContext | None = None

    def take(self) -> TokenContext | None:
        """The tokens that were spliced last, once."""
        tokens, self._tokens = self._tokens, None
        return tokens

    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        labels: Tensor | None,
        images: Any,
        *more: Any,
    ) -> tuple:
        """As the host's, which returns ids, positions, mask, cache, embeddings, labels."""
        if images is None or input_ids.shape[1] == 1:  # nothing is spliced in
            self._tokens = TokenContext(_without_images(input_ids, attention_mask))
            # the host reads the length of the past off the last entry
            cache = without_decisions(past_key_values, depth=self._depth)
            rest = (cache, labels, images, *more)
            found = self._splice(input_ids, position_ids, attention_mask, *rest)
            return (*found[:3], past_key_values, *found[4:])
        marked = torch.full_like(input_ids, _PROMPT)
        if labels is not None:
            marked = labels.masked_fill(labels == _IGNORE, _PROMPT)
        mask = attention_mask
        if mask is None:
            mask = torch.ones_like(input_ids, dtype=torch.bool)
        ids, positions, mask_out, cache, embeds, labels_out = self._splice(
            input_ids, position_ids, mask, past_key_values, marked, images, *more
        )
        if embeds is None:  # a model without image tower
            self._tokens = TokenContext(_without_images(input_ids, attention_mask))
            return ids, positions, attention_mask, cache, None, labels
        real_BS = mask_out.bool()
        map_BS = torch.where(labels_out == _IGNORE, int(Modality.VISION), int(Modality.LANGUAGE))
        map_BS = torch.where(real_BS, map_BS, int(Modality.PADDING)).to(torch.uint8)
        prompt_BS = None if labels is None else (labels_out == _PROMPT) & real_BS
        self._tokens = TokenContext(map_BS, instruction_BL=prompt_BS)
        if labels is None:
            labels_out = None
        else:
            labels_out = labels_out.masked_fill(labels_out == _PROMPT, _IGNORE)
        return (
            ids,
            positions,
            None if attention_mask is None else mask_out,
            cache,
            embeds,
            labels_out,
        )


def _without_images(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """All language but padding; a single new token is language whatever the mask of the past."""
    map_BS = torch.full_like(input_ids, int(Modality.LANGUAGE), dtype=torch.uint8)
    if attention_mask is None or attention_mask.shape != input_ids.shape or map_BS.shape[1] == 1:
        return map_BS
    return map_BS.masked_fill(attention_mask == 0, int(Modality.PADDING))


class DecoderForward:
    """The decoder's forward, inside which layers know what was spliced, and new tokens of a
    sequence what its prompt decided."""

    def __init__(self, decoder: Any, splice: Splicing, *, depth: int):
        self._forward = decoder.forward
        self._decoder = decoder
        self._splice = splice
        self._depth = depth
        self._names = list(sequence_routers(decoder))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names = self._names
        if not names or self._decoder.training:
            return self._of_tokens(args, kwargs)
        cache = kwargs.get("past_key_values")
        if _cached_length(cache):
            decided = decisions_in(cache, names, depth=self._depth)
            if decided is None:
                raise ValueError(
                    "this cache does not say what its prompt decided, which its router goes by; "
                    "let the converted model itself take the prompt, with return_dict=True"
                )
            kwargs["past_key_values"] = without_decisions(cache, depth=self._depth)
            with reuse_decisions(self._decoder, decided):
                output = self._of_tokens(args, kwargs)
        else:
            with collect_routing(self._decoder) as routings:
                output = self._of_tokens(args, kwargs)
            decided = sequence_decisions(self._decoder, routings)
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            output.past_key_values = with_decisions(cache, decided, depth=self._depth)
        return output

    def _of_tokens(self, args: Any, kwargs: Any) -> Any:
        tokens, modality = self._splice.take(), self._splice.modality
        if tokens is None:
            given = kwargs.get("inputs_embeds", kwargs.get("input_ids"))
            several = given is None or given.shape[1] > 1
            if several and modality.current is None:
                raise ValueError(
                    "nothing says which of these tokens are images, since they did not come "
                    f"through {SPLICE}; run this inside `with "
                    "model.token_modality.using(modality_map)`"
                )
            return self._forward(*args, **kwargs)
        with modality.using(tokens):
            return self._forward(*args, **kwargs)


def _cached_length(cache: Any) -> int:
    if cache is None or isinstance(cache, tuple):
        return len(cache or ())
    return int(cache.get_seq_length())


class LayerForward:
    """A decoder layer's forward that can be recomputed by any kind of checkpointing.

    The host checkpoints layers without a way to tell them anything. But the input that a layer is
    recomputed with is the storage it was computed with, which lives until then.
    """

    def __init__(self, layer: Any, modality: TokenModality, *, as_tensor: bool):
        self._forward = layer.forward
        self._modality = modality
        self._as_tensor = as_tensor
        self._seen: list[tuple[weakref.ref[Tensor], TokenContext]] = []

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        with self._tokens_of(hidden_states):
            outputs = self._forward(hidden_states, *args, **kwargs)
        losses = outputs[-1] if isinstance(outputs, tuple) else None
        if not self._as_tensor or not isinstance(losses, list):
            return outputs
        losses = [loss for loss in losses if loss is not None]
        # the model extends its list by this, and a tensor yields its scalars as well
        return (*outputs[:-1], torch.stack(losses) if losses else losses)

    def _tokens_of(self, hidden: Tensor) -> AbstractContextManager[None]:
        if not is_recomputed():
            tokens = self._modality.current
            self._seen = [pair for pair in self._seen if pair[0]() is not None]
            # reentrant checkpointing computes without gradients at first
            kept = torch.is_grad_enabled() or hidden.requires_grad
            if tokens is not None and kept:
                self._seen.append((weakref.ref(hidden), tokens))
            return nullcontext()
        for reference, tokens in reversed(self._seen):
            tensor = reference()
            if tensor is not None and tensor.data_ptr() == hidden.data_ptr():
                return self._modality.using(tokens)
        return nullcontext()


def never_three_rows(_mlp: nn.Module, _inputs: Any, output: Any) -> Any:
    """The host tells sparse from dense by whether the output has length three."""
    if isinstance(output, Tensor) and len(output) == 3:
        return output, None, None
    return output
