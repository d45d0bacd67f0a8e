"""Compiled transformer blocks, for training.

Dense blocks are compiled, one graph for all of them. Sparse blocks are not: how many rows an expert
gets is no property of a graph, and what the routers decide is collected from outside. Predictions
are computed without a compiler, so they depend neither on whether there is one nor on the order in
which it saw batches of different sizes.
"""

from __future__ import annotations

import functools
import logging
import os
from contextlib import AbstractContextManager
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from domainbed_ext.errors import UsageError
from gmoe_ltdr.collect import moe_layers

_logger = logging.getLogger(__name__)


class SharedGraphDropPath(nn.Module):
    """Stochastic depth whose rate is data: a compiler makes one graph of blocks that differ in it
    only, where each number in the code of timm's would need one of its own.
    """

    keep: Tensor

    def __init__(self, rate: float):
        super().__init__()
        self.register_buffer("keep", torch.tensor(1 - rate), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        drawn = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device)
        return x * ((drawn < self.keep) / self.keep).to(x.dtype)


def share_graphs_(network: nn.Module) -> None:
    """Make the dense blocks of a ViT equal but for their numbers, before they are compiled."""
    blocks = dense_blocks(network)
    if not any(isinstance(module, DropPath) for block in blocks for module in block.children()):
        return
    for block in blocks:
        paths = {n: child for n, child in block.named_children() if n.startswith("drop_path")}
        for name, path in paths.items():
            rate = path.drop_prob if isinstance(path, DropPath) else 0.0
            setattr(block, name, SharedGraphDropPath(rate))


def compile_blocks_(network: nn.Module, device: torch.device) -> None:
    """Compile a ViT's dense blocks, in place; state dicts stay what they are.

    Where no compiler can be used, one line says so and nothing is compiled.

    Args:
        network: On the device. Blocks that are compiled already are left alone.
        device: What is compiled for.
    """
    if not compiler_works(device.type):
        return
    for block in dense_blocks(network):
        if block._compiled_call_impl is None:
            block.compile(**_repeatable())


def _repeatable() -> dict[str, Any]:
    """Options of `torch.compile`: no choice of a kernel by its measured time, which would round
    otherwise the next time."""
    from torch._inductor import list_options

    return {"options": {"deterministic": True}} if "deterministic" in list_options() else {}


def dense_blocks(network: nn.Module) -> list[nn.Module]:
    """A ViT's blocks without experts.

    Raises:
        UsageError: The network has no `blocks`.
    """
    blocks = getattr(network, "blocks", None)
    if blocks is None:
        raise UsageError(
            f"hparam compile='blocks': {type(network).__name__} has no `blocks`; take a backbone "
            "that has them, or compile='none'"
        )
    return [block for block in blocks if not moe_layers(block)]


@functools.cache
def compiler_works(device_type: str) -> bool:
    """Whether `torch.compile` can be used on this machine; says why not, once."""
    # a number that no cache has seen, so that this really compiles
    number = int.from_bytes(os.urandom(4), "little") / 2**32
    try:
        torch.compile(lambda x: (x * number).sum())(torch.ones(64, device=device_type))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        _logger.warning(
            "hparam compile='blocks': the compiler cannot be used here (%s); nothing is compiled",
            reason,
        )
        return False
    return True


def without_compiler() -> AbstractContextManager[object]:
    """What runs in this context runs as if it had never been compiled."""
    return torch.compiler.set_stance("force_eager")
