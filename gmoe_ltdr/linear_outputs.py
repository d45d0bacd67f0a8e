"""Gather what the experts' two linear layers put out, with its graph, from outside.

For losses that ask what single tokens want of an expert: the gradient at the output of a linear
layer is, row by row, the gradient of that layer's bias.

Shapes: E experts, N rows ordered expert by expert, n rows of one expert, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gmoe_ltdr.collect import moe_layers
from gmoe_ltdr.dispatch import LocalDispatcher
from gmoe_ltdr.moe import MoE
from gmoe_ltdr.routers.base import is_recomputed


@dataclass(frozen=True)
class LinearOutputs:
    """Outputs of one layer's experts in one forward, rows in the order of `mask.T.nonzero()`.

    Attributes:
        fc1: Of the first linear layer, for each expert (n, F).
        fc2: Of the second, (N, D), with rows behind the last expert's where the dispatcher
            allocated more.
    """

    fc1: tuple[Tensor, ...]
    fc2: Tensor


@contextmanager
def collect_linear_outputs(model: nn.Module) -> Iterator[dict[str, LinearOutputs]]:
    """Collect every sparse layer's outputs of one forward, keyed by layer name, in depth order.

    Inside the context the experts are computed by the back end "loop", whose intermediate results
    exist as tensors. Take gradients with respect to them inside, too; call `backward()` where you
    like.

        with collect_linear_outputs(model) as outputs:
            loss = cross_entropy(model(images), labels)
            grads = torch.autograd.grad(loss, outputs[name].fc1, retain_graph=True)

    Raises:
        ValueError: A layer's rows do not stay on this device (expert parallelism), or its
            dispatcher orders them in another way.
        RuntimeError: On a second forward, or a layer runs inside activation checkpointing, which
            keeps no intermediate results.
    """
    outputs: dict[str, LinearOutputs] = {}
    layers = moe_layers(model)
    for name, layer in layers.items():
        if not isinstance(layer.dispatcher, LocalDispatcher):
            raise ValueError(
                f"layer {name!r} sends its tokens with a {type(layer.dispatcher).__name__}, but "
                "outputs of its linear layers can be collected with MoESpec(dispatcher='local') "
                "only, without expert parallelism"
            )
    with ExitStack() as undo:
        for name, layer in layers.items():
            undo.enter_context(_watched(layer, name, outputs))
        yield outputs


@contextmanager
def _watched(layer: MoE, name: str, outputs: dict[str, LinearOutputs]) -> Iterator[None]:
    experts = layer.experts
    grad_was_enabled = torch.is_grad_enabled()
    first: list[Tensor] = []
    running = False  # shared experts may use the same activation module

    def begin(_experts, _inputs) -> None:
        nonlocal running
        if is_recomputed() or (grad_was_enabled and not torch.is_grad_enabled()):
            raise RuntimeError(
                f"layer {name!r} runs inside activation checkpointing, which keeps no outputs of "
                "its linear layers; switch it off (set_grad_checkpointing(False))"
            )
        if name in outputs:
            raise RuntimeError(
                f"layer {name!r} ran twice inside one collect_linear_outputs; collect one forward "
                "at a time"
            )
        running = True

    def keep_first(_act, inputs) -> None:
        if running:
            first.append(inputs[0])

    def keep_second(_experts, _inputs, rows_ND: Tensor) -> None:
        nonlocal running
        outputs[name] = LinearOutputs(tuple(first), rows_ND)
        running = False

    backend, experts.backend = experts.backend, "loop"
    handles = [
        experts.register_forward_pre_hook(begin),
        experts.act.register_forward_pre_hook(keep_first),
        experts.register_forward_hook(keep_second),
    ]
    try:
        yield
    finally:
        experts.backend = backend
        for handle in handles:
            handle.remove()
