"""MoE-LLaVA's own model classes with the routers of this package, in place.

    convert_moe_llava(model, "ltdr")                                     # DeepSpeed is gone
    convert_moe_llava(model, "ltdr", backend="deepspeed")                # only its gates are

State dict, LoRA targets, `train_modules`, the loss and `generate` stay as they are. Four defects of
the host are known; three are repaired on the way (`REPAIRS`):

* evaluation is random, since DeepSpeed draws the second expert: it is not, here;
* under activation checkpointing (all of the host's finetune_moe.sh) the balance losses leave a
  layer in a list, and so without gradient: they leave it in a tensor ("aux_checkpointing");
* in a batch of exactly three rows, a dense layer's output has length three and is taken for the
  triple of a sparse layer: there it is a triple ("batch_of_three");
* `copy.deepcopy(model)` shares the host's forward functions, so the copy computes with the
  original's layers. That remains: build a second model and load the state dict.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from gmoe_ltdr.spec import MoESpec
from gmoe_ltdr.vlm.checkpoint_files import read_config_json
from gmoe_ltdr.vlm.decoder import selects_by_attention, vlm_preset
from gmoe_ltdr.vlm.deepspeed_stub import deepspeed_stub
from gmoe_ltdr.vlm.modality import TokenModality
from gmoe_ltdr.vlm.moe_llava_forwards import (
    SPLICE,
    DecoderForward,
    LayerForward,
    Splicing,
    never_three_rows,
)
from gmoe_ltdr.vlm.moe_llava_layers import (
    DeepSpeedGate,
    MoELlavaLayer,
    check_router_of_host,
)

_log = logging.getLogger(__name__)

REPAIRS = ("aux_checkpointing", "batch_of_three")
_WITHOUT_TOP_K = ("dynamic", "task_hard")  # routers that never look at it
_CLASSES = {
    "moe_llava_stablelm": ("llava_stablelm_moe", "EvalMoELLaVAStablelmForCausalLM"),
    "moe_llava_phi": ("llava_phi_moe", "EvalMoELLaVAPhiForCausalLM"),
    "moe_llava_qwen1_5": ("llava_qwen1_5_moe", "EvalMoELLaVAQwen1_5ForCausalLM"),
    "moe_llava_qwen": ("llava_qwen_moe", "EvalMoELLaVAQWenForCausalLM"),
}


def convert_moe_llava(
    model: nn.Module,
    spec: MoESpec | str,
    backend: Literal["native", "deepspeed"] = "native",
    *,
    repair: Collection[str] = REPAIRS,
) -> nn.Module:
    """Route a MoE-LLaVA model by `spec`, in place.

    Args:
        model: The host's causal language model with its MoE layers, or a wrapper of one (PEFT).
        spec: How to route: a preset's name, which takes its number of experts and its top-k from
            the model, or a description, whose own top-k holds (with a warning, where the model has
            another). Which layers are sparse, how many experts they have and the weight of the
            balance loss (`router_aux_loss_coef`, as it is now) are the model's. Tail tokens of a
            checkpoint that was trained without them change its outputs: that is where training
            starts, and no reproduction of anything.
        backend: "native" computes the experts here; "deepspeed" replaces the gates alone.
        repair: Which of the host's defects to repair, of `REPAIRS`.

    Returns:
        The same model. Its `token_modality` tells the layers what the tokens are, where
        `inputs_embeds` are passed directly: `with model.token_modality.using(...)`.

    Raises:
        ValueError: No such model, no MoE layer, converted before, a router that does not fit the
            model, or a tail rule that needs attention scores. The model is as before then.
        NotImplementedError: Experts on several ranks without DeepSpeed, or Tutel's.
    """
    if backend not in ("native", "deepspeed"):
        raise ValueError(f"backend={backend!r} is neither 'native' nor 'deepspeed'")
    if set(repair) - set(REPAIRS):
        raise ValueError(f"repair={tuple(repair)} may hold {', '.join(REPAIRS)}")
    host = _find_host(model)
    decoder = host.get_model()
    layers = decoder.layers if hasattr(decoder, "layers") else decoder.h
    sparse = _sparse_layers(layers, host, backend)
    spec = _spec_for_host(spec, [layers[i].mlp for i in sparse], host)
    if selects_by_attention(spec):
        raise ValueError(
            "TailRule(kind='attention') needs the attention from text to image tokens, which "
            "MoE-LLaVA's layers do not hand out; use kind='mean' or 'quantile', or a converted "
            "checkpoint (from_moe_llava) with attn_implementation='eager'"
        )
    weight = getattr(host, "router_aux_loss_coef", spec.balance_weight)
    specs = {i: _spec_of_layer(spec, layers[i].mlp, weight, index=i) for i in sparse}
    if weight == 0:
        # a product with zero would take the router's own losses along; without a balance loss these
        # are all there is to multiply
        host.router_aux_loss_coef = 1.0

    modality = TokenModality()
    for index, layer_spec in specs.items():
        mlp = layers[index].mlp
        if backend == "native":
            training = mlp.training
            new = MoELlavaLayer(mlp, layer_spec, context_of=modality)
            layers[index].mlp = new.train(training)
        else:
            moe = mlp.deepspeed_moe
            gate = DeepSpeedGate(moe, layer_spec, context_of=modality)
            moe.gate = gate.train(moe.gate.training)
    splice = Splicing(host, modality, depth=len(layers))
    decoder.forward = DecoderForward(decoder, splice, depth=len(layers))
    for index, layer in enumerate(layers):
        layer.forward = LayerForward(layer, modality, as_tensor="aux_checkpointing" in repair)
        if index not in sparse and "batch_of_three" in repair:
            layer.mlp.register_forward_hook(never_three_rows)
    setattr(host, SPLICE, splice)
    host.token_modality = modality
    host.config.moe_spec = spec.to_dict()
    _log.info(
        "MoE-LLaVA: %d sparse layers routed by %r (%s); evaluation no longer draws experts; "
        "repaired: %s",
        len(sparse),
        spec.router,
        backend,
        ", ".join(repair) or "nothing else",
    )
    return model


def load_moe_llava(
    folder: str | os.PathLike,
    spec: MoESpec | str,
    *,
    cls: Any = None,
    repair: Collection[str] = REPAIRS,
    **kwargs: Any,
) -> nn.Module:
    """A MoE-LLaVA checkpoint in MoE-LLaVA's own class, with or without DeepSpeed installed.

    Args:
        folder: What the host's `save_pretrained` or its trainer wrote.
        spec: How to route, see `convert_moe_llava`.
        cls: The host's class for evaluation; None: by the checkpoint's model type.
        repair: See `convert_moe_llava`.
        **kwargs: For the class's `from_pretrained`.

    Raises:
        ImportError: MoE-LLaVA is not on the path.
        ValueError: A checkpoint of another kind.
    """
    with deepspeed_stub():
        cls = cls or _class_of(folder)
        model = cls.from_pretrained(folder, **kwargs)
    tower = model.get_image_tower()
    if tower is not None and not tower.is_loaded:
        tower.load_model()
    return convert_moe_llava(model.eval(), spec, repair=repair)


def _class_of(folder: str | os.PathLike) -> Any:
    kind = read_config_json(folder).get("model_type")
    if kind not in _CLASSES:
        raise ValueError(
            f"{folder} has model_type {kind!r}; known are {', '.join(_CLASSES)}; for another, pass "
            "cls="
        )
    module, name = _CLASSES[kind]
    try:
        return getattr(importlib.import_module(f"moellava.model.language_model.{module}"), name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"MoE-LLaVA cannot be imported ({error}); put its repository on PYTHONPATH, with the "
            "transformers that it needs (4.37)"
        ) from error


def _find_host(model: nn.Module) -> Any:
    """The module that splices images in: wrappers pass reads of attributes on, not writes."""
    for module in model.modules():
        if hasattr(type(module), SPLICE):
            if hasattr(module, "token_modality"):
                raise ValueError("the model is converted already; convert a freshly loaded one")
            return module
    raise ValueError(
        f"{type(model).__name__} is no MoE-LLaVA model (it has no {SPLICE}); for a Hugging Face "
        "LLaVA use gmoe_ltdr.vlm.transformers.upcycle_llava"
    )


def _sparse_layers(layers: Any, host: Any, backend: str) -> list[int]:
    """Which layers are DeepSpeed's, known by their shape: DeepSpeed need not be there."""
    found = []
    for index, layer in enumerate(layers):
        moe = getattr(layer.mlp, "deepspeed_moe", None)
        if moe is None:
            continue
        if getattr(moe, "use_tutel", False) or not hasattr(moe.gate, "wg"):
            raise NotImplementedError(
                f"layer {index} dispatches with Tutel; make the model with use_tutel=False"
            )
        ep_size = getattr(layer.mlp, "ep_size", 1)
        if ep_size != 1 and backend == "native":
            raise NotImplementedError(
                f"the experts of layer {index} lie on {ep_size} ranks; gather the experts into one "
                "checkpoint with ep_size=1, or use backend='deepspeed'"
            )
        if backend == "deepspeed" and not hasattr(moe, "ep_size"):
            raise ValueError(
                "backend='deepspeed' needs DeepSpeed's layers, but this model was made without "
                "DeepSpeed; use backend='native'"
            )
        found.append(index)
    if not found:
        raise ValueError(
            "the model has no MoE layer yet; call its initialize_moe_modules(arguments) first, or "
            "load a checkpoint with the Eval class of MoE-LLaVA"
        )
    return found


def _spec_for_host(spec: MoESpec | str, mlps: Sequence[Any], host: Any) -> MoESpec:
    """The description, of a preset by the model's numbers; says where they are not the model's."""
    experts = [mlp.deepspeed_moe.gate.wg.out_features for mlp in mlps]
    settings = getattr(host.config, "moe", None) or {}
    top_k = getattr(mlps[0].deepspeed_moe.gate, "k", settings.get("top_k_experts"))
    if isinstance(spec, str):
        numbers = {"num_experts": max(experts)}
        if top_k is not None:
            numbers["top_k"] = int(top_k)
        return vlm_preset(spec, **numbers)
    if top_k is not None and spec.top_k != top_k and spec.router not in _WITHOUT_TOP_K:
        _log.warning(
            "the spec's top_k=%d replaces the model's top_k_experts=%d, which changes what the "
            "model computes; a preset's name in place of the spec keeps it",
            spec.top_k,
            top_k,
        )
    if set(experts) != {spec.num_experts}:
        _log.warning(
            "the spec's num_experts=%d is not used: the model's layers have %s",
            spec.num_experts,
            ", ".join(map(str, experts)),
        )
    return spec


def _spec_of_layer(spec: MoESpec, mlp: Any, weight: float, *, index: int) -> MoESpec:
    if spec.shared_experts or spec.expert_split != 1:
        raise ValueError(
            f"shared_experts={spec.shared_experts}, expert_split={spec.expert_split}: the model's "
            "experts are what they are; make a new sparse model with upcycle_llava for these"
        )
    wg: Any = mlp.deepspeed_moe.gate.wg
    try:
        found = replace(spec, num_experts=wg.out_features, balance_weight=float(weight))
        check_router_of_host(wg, found)
    except ValueError as error:
        raise ValueError(f"layer {index}: {error}") from error
    return found
