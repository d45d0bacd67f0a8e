"""Upcycling: turn the feed-forward networks of a dense ViT into mixtures of experts, in place.

Every expert starts as a copy of the dense network. With weights that sum to 1 (`renormalize` or
`softmax_of_probs`, top_k of at least 2) the model computes the same function as before; with one
expert per token, or `raw` weights, the sparse layers' output is scaled by the gate (GMoE does so).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from gmoe_ltdr.collect import moe_layers
from gmoe_ltdr.dispatch import create_dispatcher
from gmoe_ltdr.experts import StackedExperts, width_of_pieces
from gmoe_ltdr.moe import MoE, VisionContext
from gmoe_ltdr.routing import TokenContext
from gmoe_ltdr.spec import MoESpec


class AttentionContext(VisionContext):
    """`context_of` with the class token's attention, for `TailRule(kind="attention")` (IAT).

    Registered as a forward hook of the block's attention, it recomputes one row of its attention
    map (the class token's, averaged over heads) and hands it to the MoE layer of the same block.
    The scores are detached and kept until the next forward, so that activation checkpointing finds
    them again.
    """

    def __init__(self, num_prefix_tokens: int):
        super().__init__(num_prefix_tokens)
        self._attention_BL: Tensor | None = None

    @torch.no_grad()
    def watch(self, attention: Any, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        x_BLD = inputs[0]
        batch, length, _ = x_BLD.shape
        heads = attention.num_heads
        query, key, _ = attention.qkv(x_BLD).reshape(batch, length, 3, heads, -1).unbind(2)
        query_BHd = attention.q_norm(query[:, 0]).float()
        key_BLHd = attention.k_norm(key).float()
        logits_BHL = torch.einsum("bhd,blhd->bhl", query_BHd, key_BLHd) * attention.scale
        self._attention_BL = logits_BHL.softmax(-1).mean(1)

    def __call__(self, x: Tensor) -> TokenContext:
        plain = super().__call__(x)
        scores = self._attention_BL
        if scores is None or scores.shape != plain.modality_BL.shape:
            raise RuntimeError("the attention of this block has not run on these tokens")
        return replace(plain, attention_BL=scores)


def upcycle_(model: nn.Module, spec: MoESpec, *, ep_group: ProcessGroup | None = None) -> nn.Module:
    """Replace the MLPs of `spec.layers` by MoE layers, each expert a copy of the MLP it replaces,
    or a piece of it.

    Args:
        model: A timm VisionTransformer, or any module with `blocks` whose items have an `mlp`.
        spec: The sparse model.
        ep_group: Ranks that share the experts of every layer (expert parallelism). Each of them
            calls this with the same model.

    Returns:
        The same model, changed in place. Nothing is changed when an error is raised.

    Raises:
        TypeError: The model has no `blocks`, or a block's MLP is not timm's plain `Mlp`.
        ValueError: The model is sparse already, a layer index does not exist, an MLP cannot be
            split as the spec says, or the experts cannot be shared by the group's ranks.
    """
    blocks = getattr(model, "blocks", None)
    if blocks is None or not len(blocks) or not all(hasattr(b, "mlp") for b in blocks):
        raise TypeError(
            f"{type(model).__name__} has no `blocks` with an `mlp` each; upcycle_ needs a "
            "transformer like timm's VisionTransformer"
        )
    if moe_layers(model):
        raise ValueError(f"the model is sparse already: {', '.join(moe_layers(model))}")
    indices = spec.block_indices(len(blocks))
    for index in indices:
        _check_mlp(blocks[index].mlp, name=f"blocks.{index}.mlp")
        width_of_pieces(blocks[index].mlp.fc1.out_features, spec.expert_split)
    if spec.tail_rule.kind == "attention":
        for index in indices:
            _check_attention(model, blocks[index], name=f"blocks.{index}.attn")

    # only to raise what is wrong with them before anything is changed
    create_dispatcher(spec.dispatcher, num_experts=spec.num_experts, group=ep_group)

    prefix = num_prefix_tokens(model)
    sparse = {
        index: _sparse_copy(blocks[index].mlp, spec, num_prefix_tokens=prefix, ep_group=ep_group)
        for index in indices
    }
    for index, layer in sparse.items():
        if isinstance(layer.context_of, AttentionContext):
            blocks[index].attn.register_forward_hook(layer.context_of.watch)
        blocks[index].mlp = layer
    return model


def dense_copy(model: nn.Module) -> nn.Module:
    """A dense copy of a sparse model: each sparse layer becomes its first expert.

    As long as nothing was trained, all experts are copies of the MLP that they replaced, and this
    is the model that was upcycled.
    """
    twin: Any = copy.deepcopy(model)
    for name, layer in moe_layers(twin).items():
        parent, _, slot = name.rpartition(".")
        setattr(twin.get_submodule(parent), slot, _first_expert(layer.experts))
    if hasattr(twin, "moe_config"):
        del twin.moe_config
    return twin


def _first_expert(experts: StackedExperts) -> Mlp:
    _, hidden_dim, dim = experts.fc1_weight.shape
    bias: Any = (experts.fc1_bias is not None, experts.fc2_bias is not None)
    with torch.device("meta"):  # draws no random numbers for weights that are replaced
        mlp = Mlp(dim, hidden_dim, bias=bias)
    mlp.act = experts.act
    for name, stacked in experts.named_parameters():
        linear, parameter = name.split("_")
        setattr(getattr(mlp, linear), parameter, nn.Parameter(stacked[0].detach().clone()))
    return mlp.train(experts.training)


def _sparse_copy(
    mlp: Any, spec: MoESpec, *, num_prefix_tokens: int, ep_group: ProcessGroup | None
) -> MoE:
    reads_attention = spec.tail_rule.kind == "attention"
    moe = MoE(
        mlp.fc1.in_features,
        mlp.fc1.out_features,
        spec,
        act_layer=type(mlp.act),
        bias=(mlp.fc1.bias is not None, mlp.fc2.bias is not None),
        context_of=(AttentionContext if reads_attention else VisionContext)(num_prefix_tokens),
        ep_group=ep_group,
    )
    moe.experts.act = mlp.act  # with its own settings, e.g. the tanh approximation of GELU
    moe.experts.copy_from_dense_(
        mlp.fc1,
        mlp.fc2,
        num_pieces=spec.expert_split,
        first_expert=moe.held_experts.start,
    )
    if moe.shared_experts is not None:
        moe.shared_experts.act = mlp.act
        moe.shared_experts.copy_from_dense_(mlp.fc1, mlp.fc2)
        moe.shared_experts.scale_output_(spec.init_scale_shared)
        moe.shared_experts.to(mlp.fc1.weight.dtype)
    moe.experts.to(mlp.fc1.weight.dtype)
    moe.to(mlp.fc1.weight.device)
    moe.train(mlp.training)
    return moe


def _check_mlp(mlp: nn.Module, *, name: str) -> None:
    if type(mlp) is not Mlp:
        raise TypeError(
            f"{name} is a {type(mlp).__name__}; upcycle_ copies timm's plain Mlp "
            "(two linear layers), so choose a model or layers with it"
        )
    if not isinstance(mlp.norm, nn.Identity):
        raise TypeError(f"{name} normalises its hidden layer, which experts do not")
    if not isinstance(mlp.fc1, nn.Linear) or not isinstance(mlp.fc2, nn.Linear):
        raise TypeError(f"{name} is convolutional; upcycle_ copies linear layers")


def _check_attention(model: nn.Module, block: nn.Module, *, name: str) -> None:
    if num_prefix_tokens(model) < 1:
        raise ValueError(
            "selection by attention (IAT) asks what the class token attends to, "
            "but this model has none; use another TailRule"
        )
    attention = getattr(block, "attn", None)
    # Not a class derived from it, and not one like it: rotary positions, biases of its own or
    # differences of maps would make other scores.
    if type(attention) is not Attention:
        raise TypeError(
            f"{name} is a {type(attention).__name__} and not timm's plain Attention, whose "
            "attention map can be read; use another TailRule"
        )


def num_prefix_tokens(model: nn.Module) -> int:
    """Class and register tokens among the tokens of the model's `blocks`."""
    # CaiT and XCiT add the class token in layers of their own behind the blocks.
    if any(hasattr(model, name) for name in ("blocks_token_only", "cls_attn_blocks")):
        return 0
    return int(getattr(model, "num_prefix_tokens", 0))
