"""Activation checkpointing: what is computed again sees the tokens of its own forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gmoe_ltdr.vlm.modality import TokenModality


def with_tokens(token_modality: TokenModality, context_fn: Callable | None) -> Callable:
    """A `context_fn` for torch's checkpointing that knows the tokens, around another one."""
    if context_fn is None:
        return token_modality.checkpoint_context

    def both() -> tuple[Any, Any]:
        forward, recompute = context_fn()
        _, tokens = token_modality.checkpoint_context()
        return forward, _Nested(tokens, recompute)

    return both


class _Nested:
    """Two contexts as one, any number of times."""

    def __init__(self, outer: Any, inner: Any):
        self._outer, self._inner = outer, inner

    def __enter__(self) -> None:
        self._outer.__enter__()
        self._inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)
        self._outer.__exit__(*error)
