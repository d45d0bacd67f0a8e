"""What a sparse model has to know of `generate`, and what it cannot be asked for: where a router
would decide otherwise than with a cache.

With a cache, a layer sees the whole prompt once and then one new word at a time. Without one it
sees all tokens again in every step, and with chunks the prompt piece by piece; rules that compare
tokens with each other then find other tokens to compare.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gmoe_ltdr.spec import MoESpec


def check_generation(
    spec: MoESpec, options: Mapping[str, Any], config: Any, *, per_sequence: bool
) -> None:
    """Whether generation with these options is what the model was made for.

    Args:
        spec: The sparse layers.
        options: Keyword arguments of `generate`.
        config: The generation configuration of the model, for what the options leave open.
        per_sequence: Whether the router decides for whole sequences.

    Raises:
        ValueError: `prefill_chunk_size`, or no cache, with a router that would decide otherwise.
    """
    config = options.get("generation_config") or config
    chunk = options.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
    if chunk is not None and per_sequence:
        raise ValueError(
            f"prefill_chunk_size={chunk} would let the first part of a prompt choose the "
            f"experts, and router {spec.router!r} looks at the whole of it; leave it out"
        )
    if chunk is not None and spec.activates_tail and spec.tail_rule.eval_scope != "ema":
        raise ValueError(
            f"prefill_chunk_size={chunk} would cut images apart, and the tail rule compares "
            "the tokens of a whole one; leave it out, or use TailRule(eval_scope='ema')"
        )
    cached = options.get("use_cache", getattr(config, "use_cache", None))
    reason = _compares_generated_words(spec)
    if cached is False and reason is not None:
        raise ValueError(
            f"use_cache=False would let words that are generated later change what earlier tokens "
            f"do, since {reason}; leave use_cache at True"
        )


def prompt_shape(arguments: tuple[Any, ...], options: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and tokens of the prompt that `generate` is called with; None: it has none."""
    names = ("inputs_embeds", "input_ids", "inputs")
    given = [*(options.get(name) for name in names), *arguments[:1]]
    return next(((p.shape[0], p.shape[1]) for p in given if p is not None), None)


def info_of_beams(
    info: Mapping[str, Tensor], options: Mapping[str, Any], config: Any, *, num_rows: int
) -> dict[str, Tensor]:
    """What is known of each row, for the rows that `generate` makes of it: one a beam, or one a
    sequence that is asked for.

    Args:
        info: By name, of `set_image_info`.
        options: Keyword arguments of `generate`.
        config: The generation configuration of the model.
        num_rows: Rows of the prompt; what describes another number is left alone.
    """
    config = options.get("generation_config") or config
    names = ("num_beams", "num_return_sequences")
    copies = max(options.get(name) or getattr(config, name, None) or 1 for name in names)
    return {
        name: value.repeat_interleave(copies, 0) if len(value) == num_rows else value
        for name, value in info.items()
    }


def _compares_generated_words(spec: MoESpec) -> str | None:
    """How what is generated would take part in a comparison of tokens; None: it does not."""
    rule, options = spec.tail_rule, spec.router_options
    if spec.router == "expert_choice":
        return "router 'expert_choice' chooses among all tokens of a sequence"
    if spec.router == "task_hard" and options.get("unseen") == "nearest":
        return "router 'task_hard' goes by the mean of all tokens"
    if spec.activates_tail and rule.modality == "language" and rule.kind != "threshold":
        return "the tail rule compares words with each other"
    if spec.capacity_factor is not None and options.get("eval_capacity", "none") != "none":
        return "experts have a capacity in evaluation (eval_capacity)"
    return None
