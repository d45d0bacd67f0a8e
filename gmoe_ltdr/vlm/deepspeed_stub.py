"""MoE-LLaVA without DeepSpeed: just enough of it to import the classes and load a checkpoint.

    with deepspeed_stub():
        from moellava.model.language_model.llava_phi_moe import EvalMoELLaVAPhiForCausalLM
    model = EvalMoELLaVAPhiForCausalLM.from_pretrained(folder)
    convert_moe_llava(model, vlm_preset("baseline"))

The classes are built with a layer that has DeepSpeed's parameters under DeepSpeed's names and
cannot compute; `convert_moe_llava` puts one in its place that can.
"""

from __future__ import annotations

import copy
import importlib.machinery
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch import nn

_MODULES = ("deepspeed", "deepspeed.moe", "deepspeed.moe.layer")


class MoE(nn.Module):
    """DeepSpeed's layer without its forward: `deepspeed_moe.gate.wg`, the experts, the residual.

    Args:
        hidden_size: Width of the tokens.
        expert: The network of which each expert is a copy.
        num_experts: How many.
        ep_size: Ranks that share them; only 1 can be converted without DeepSpeed.
        use_residual: Keep the network itself, too.
        **_options: Capacity and noise, which conversion does away with.
    """

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int = 1,
        ep_size: int = 1,
        *,
        use_residual: bool = False,
        **_options: Any,
    ):
        super().__init__()
        self.ep_size = ep_size
        self.use_residual = use_residual
        moe: Any = nn.Module()
        moe.gate = nn.Module()
        moe.gate.wg = nn.Linear(hidden_size, num_experts, bias=False)
        moe.experts = nn.Module()
        copies = [copy.deepcopy(expert) for _ in range(num_experts // ep_size)]
        moe.experts.deepspeed_experts = nn.ModuleList(copies)
        self.deepspeed_moe = moe
        if use_residual:
            self.mlp = expert
            self.coefficient = nn.Linear(hidden_size, 2)

    def forward(self, *_inputs: Any) -> Any:
        raise RuntimeError(
            "this layer was made without DeepSpeed and holds parameters only; call "
            "convert_moe_llava(model, spec) first"
        )


@contextmanager
def deepspeed_stub() -> Iterator[None]:
    """Within, `from deepspeed.moe.layer import MoE` works without DeepSpeed.

    Does nothing where DeepSpeed is installed.
    """
    if "deepspeed" in sys.modules or find_spec("deepspeed") is not None:
        yield
        return
    for name in _MODULES:
        module: Any = ModuleType(name)
        # transformers asks for the specification, to see whether DeepSpeed is installed
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        sys.modules[name] = module
    sys.modules["deepspeed.moe.layer"].MoE = MoE  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name in _MODULES:
            sys.modules.pop(name, None)
