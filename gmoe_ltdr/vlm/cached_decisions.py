"""What a prompt decided (INSTRUCT, CLUSTER), kept where its keys and values are: in the cache.

A cache object gets an attribute. The older form, a tuple with (keys, values) of each layer, gets
one entry more, whose rows a beam search then reorders with all the others.

Shapes: B rows (sequences), E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

_DECISIONS = "moe_decisions"


def with_decisions(cache: Any, decided: Mapping[str, Tensor], *, depth: int) -> Any:
    """The cache, holding the decisions.

    Args:
        cache: Of `depth` layers; None stays None.
        decided: Logits (B, E) by layer name, of `gmoe_ltdr.decoding.sequence_decisions`.
        depth: Layers of the decoder.
    """
    if isinstance(cache, tuple):
        return (*cache[:depth], tuple(decided.values()))
    if cache is not None:
        setattr(cache, _DECISIONS, dict(decided))
    return cache


def decisions_in(cache: Any, names: Sequence[str], *, depth: int) -> dict[str, Tensor] | None:
    """The decisions by layer name, None where the cache holds none.

    Args:
        cache: Of an earlier forward, or None.
        names: Layers that decide for whole sequences, in the order of `with_decisions`.
        depth: Layers of the decoder.
    """
    if isinstance(cache, tuple):
        return dict(zip(names, cache[depth], strict=True)) if len(cache) > depth else None
    return getattr(cache, _DECISIONS, None)


def without_decisions(cache: Any, *, depth: int) -> Any:
    """The cache as the decoder knows it."""
    return cache[:depth] if isinstance(cache, tuple) else cache
