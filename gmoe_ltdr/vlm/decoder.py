"""The feed-forward networks of a language model's decoder, and their sparse counterparts.

There are two shapes: gated (gate_proj, up_proj, down_proj: StableLM, Qwen, Llama, Mistral) and
plain (fc1, fc2: Phi). Both become the one `MoE` of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gmoe_ltdr.experts import StackedExperts
from gmoe_ltdr.moe import MoE
from gmoe_ltdr.routing import TokenContext
from gmoe_ltdr.spec import MoESpec, preset
from gmoe_ltdr.vlm.instruction_attention import InstructionAttention, check_attention
from gmoe_ltdr.vlm.modality import TokenModality


@dataclass(frozen=True)
class FeedForward:
    """What is known of a dense feed-forward network.

    Attributes:
        linears: gate, up and down, or fc1 and fc2.
        act: Its activation.
    """

    linears: tuple[nn.Linear, ...]
    act: nn.Module

    @property
    def gated(self) -> bool:
        return len(self.linears) == 3

    @classmethod
    def of(cls, mlp: nn.Module, *, name: str) -> FeedForward:
        """Read a decoder layer's network.

        Args:
            mlp: The network.
            name: Where it stands, for the error.

        Raises:
            TypeError: It has another shape.
        """
        for parts in (("gate_proj", "up_proj", "down_proj"), ("fc1", "fc2")):
            linears = tuple(getattr(mlp, part, None) for part in parts)
            act = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
            plain = all(type(linear) is nn.Linear for linear in linears)
            if plain and isinstance(act, nn.Module):
                return cls(linears=linears, act=act)  # type: ignore[arg-type]
        raise TypeError(
            f"{name} is a {type(mlp).__name__}; a sparse copy can be made of networks with the "
            "linear layers gate_proj, up_proj and down_proj, or fc1 and fc2, and an activation"
        )

    def sparse(self, spec: MoESpec, *, context_of: Callable[[Tensor], TokenContext]) -> MoE:
        """A layer of experts of this shape, with random weights.

        Args:
            spec: The sparse model.
            context_of: What its tokens are, see `MoE`.
        """
        first, last = self.linears[0], self.linears[-1]
        with _float32_by_default():
            moe = MoE(
                first.in_features,
                first.out_features,
                spec,
                bias=(first.bias is not None, last.bias is not None),
                gated=self.gated,
                context_of=context_of,
            )
        for experts in (moe.experts, moe.shared_experts):
            if experts is not None:
                # the host's own module: with its settings, e.g. Phi's approximation of GELU
                if self.gated:
                    experts.act.act = self.act
                else:
                    experts.act = self.act
                experts.to(first.weight.dtype)
        return moe.to(first.weight.device)

    def copy_into_(self, moe: MoE) -> None:
        """Make every expert, shared ones included, a copy of this network or of a piece of it
        (upcycling)."""
        self._copy_into_(moe.experts, num_pieces=moe.spec.expert_split)
        if moe.shared_experts is not None:
            self._copy_into_(moe.shared_experts, num_pieces=1)
            moe.shared_experts.scale_output_(moe.spec.init_scale_shared)

    def _copy_into_(self, experts: StackedExperts, *, num_pieces: int) -> None:
        if self.gated:
            experts.copy_from_gated_(*self.linears, num_pieces=num_pieces)
        else:
            experts.copy_from_dense_(*self.linears, num_pieces=num_pieces)


@contextmanager
def _float32_by_default() -> Iterator[None]:
    """Routers are float32, whatever type a loader has the rest of the model made in; not every way
    to draw their weights exists in half precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make_sparse_(
    decoder: Any, spec: MoESpec, *, token_modality: TokenModality, copy: bool = False
) -> None:
    """Put MoE layers in place of a decoder's feed-forward networks.

    Args:
        decoder: A language model with `layers`, each of which has an `mlp`.
        spec: Which of them, and how.
        token_modality: What the layers read their tokens from.
        copy: Make each expert a copy of the network it replaces; otherwise weights are random.

    Raises:
        TypeError: A network of another shape.
        ValueError: A layer that does not exist, or a tail rule that needs attention scores where
            the attention is not "eager".
    """
    by_attention = selects_by_attention(spec)
    if by_attention:
        check_attention(decoder)
    layers = decoder.layers
    dense = {
        index: FeedForward.of(layers[index].mlp, name=f"layers.{index}.mlp")
        for index in spec.block_indices(len(layers))
    }
    for index, network in dense.items():
        training = layers[index].mlp.training
        context_of: Callable[[Tensor], TokenContext] = token_modality
        if by_attention:
            context_of = InstructionAttention(token_modality, layers[index])
        moe = network.sparse(spec, context_of=context_of)
        if copy:
            network.copy_into_(moe)
        layers[index].mlp = moe.train(training)


def selects_by_attention(spec: MoESpec) -> bool:
    """Whether the tail rule is IAT."""
    return spec.activates_tail and spec.tail_rule.kind == "attention"


# MoE-LLaVA's settings, which LTDR keeps: for what a preset leaves at the defaults of a `MoESpec`
_LANGUAGE_MODEL: dict[str, Any] = {
    "gate": "linear",
    "num_experts": 4,
    "layers": "every_other",
    "noise_std": 0.0,
    "expert_dropout": 0.0,
}


def vlm_preset(name: str, **overrides: Any) -> MoESpec:
    """A preset as vision-language models are trained with it.

    Like `gmoe_ltdr.preset`, but where the preset does not say otherwise with a linear gate, four
    experts in every other layer, and neither gate noise nor dropout inside experts.

    Args:
        name: "ltdr", "baseline" (top-2, all tokens balanced), "dar", "eea", ...
        **overrides: Replace single fields.
    """
    plain, named = MoESpec(), preset(name)
    settings = {
        field: value
        for field, value in _LANGUAGE_MODEL.items()
        if getattr(named, field) == getattr(plain, field)
    }
    return preset(name, **{**settings, **overrides})
