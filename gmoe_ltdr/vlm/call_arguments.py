"""What the arguments of a forward of transformers say, in whichever form they come.

Shapes: B rows of the batch, S tokens per row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def share_of_targets(kwargs: Mapping[str, Any]) -> Tensor | float:
    """This forward's part of the targets that one optimizer step sees.

    `Trainer` says how many there are (`num_items_in_batch`) and divides nothing itself.
    """
    total = kwargs.get("num_items_in_batch")
    if total is None:
        return 1.0
    targets = kwargs.get("shift_labels")
    if targets is None:
        targets = kwargs["labels"][..., 1:]  # what the first token is, nothing predicts
    num_targets = (targets != -100).sum()
    return num_targets / (total.to(num_targets.device) if isinstance(total, Tensor) else total)


def token_mask(attention_mask: Any, length: int, cached: int) -> Tensor | None:
    """Which of the last `length` tokens are no padding, (B, S); None: all.

    A static cache brings masks of shape (batch, 1, queries, keys), or one per kind of attention.
    There, padding is what may not look at itself.
    """
    if isinstance(attention_mask, Mapping):
        attention_mask = next(iter(attention_mask.values()))
    if attention_mask is None or attention_mask.dim() != 4:
        return attention_mask
    own_BSS = attention_mask[:, 0, :, cached : cached + length]
    own_BS = own_BSS.diagonal(dim1=-2, dim2=-1)
    return own_BS if own_BS.dtype == torch.bool else own_BS == 0


def cache_of(values: Mapping[str, Any]) -> Any:
    """Of arguments or of an output; its name differs between versions of transformers."""
    return values.get("cache", values.get("past_key_values"))


def cached_length(kwargs: Mapping[str, Any]) -> int:
    """Tokens that the cache holds already."""
    cache = cache_of(kwargs)
    return 0 if cache is None else int(cache.get_seq_length())
