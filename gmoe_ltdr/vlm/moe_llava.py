"""MoE-LLaVA's own model classes with the routers of this package, in place.

    convert_moe_llava(model, vlm_preset("ltdr"))                         # DeepSpeed is gone
    convert_moe_llava(model, vlm_preset("ltdr"), backend="deepspeed")    # only its gates are

State dict, LoRA targets, `train_modules`, the loss and `generate` stay as they are. Four defects of
the host are known; three are repaired on the way (`REPAIRS`):

* evaluation is random, since DeepSpeed draws the second expert: it is not, here;
* under activation checkpointing (all of the host's finetune_moe.sh) the balance losses leave a
  layer in a list, and so without gradient: they leave it in a tensor ("aux_checkpointing");
* in a batch of exactly three rows, a dense layer's output has length three and is taken for the
  triple of a sparse layer: there it is a triple ("batch_of_three");
* `copy.deepcopy(model)` shares the host's forward functions, so the copy computes with the
  original's layers. That remains: build a second model and load the state dict.

Shapes: B rows of the batch, S tokens per row.
"""

from __future__ import annotations

import importlib
import logging
import os
import weakref
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gmoe_ltdr.routers.base import is_recomputed
from gmoe_ltdr.routing import Modality, TokenContext
from gmoe_ltdr.spec import MoESpec
from gmoe_ltdr.vlm.decoder import refuse_attention
from gmoe_ltdr.vlm.deepspeed_stub import deepspeed_stub
from gmoe_ltdr.vlm.modality import TokenModality
from gmoe_ltdr.vlm.moe_llava_layers import DeepSpeedGate, MoELlavaLayer

_log = logging.getLogger(__name__)

REPAIRS = ("aux_checkpointing", "batch_of_three")
_IGNORE, _PROMPT = -100, -101  # no label; the same, but known to be no image feature
_SPLICE = "prepare_inputs_labels_for_multimodal"
_CLASSES = {
    "moe_llava_stablelm": ("llava_stablelm_moe", "EvalMoELLaVAStablelmForCausalLM"),
    "moe_llava_phi": ("llava_phi_moe", "EvalMoELLaVAPhiForCausalLM"),
    "moe_llava_qwen1_5": ("llava_qwen1_5_moe", "EvalMoELLaVAQwen1_5ForCausalLM"),
    "moe_llava_qwen": ("llava_qwen_moe", "EvalMoELLaVAQWenForCausalLM"),
}


def convert_moe_llava(
    model: nn.Module,
    spec: MoESpec,
    backend: Literal["native", "deepspeed"] = "native",
    *,
    repair: Collection[str] = REPAIRS,
) -> nn.Module:
    """Route a MoE-LLaVA model by `spec`, in place.

    Args:
        model: The host's causal language model with its MoE layers, or a wrapper of one (PEFT).
        spec: How to route. Which layers are sparse, how many experts they have and the weight of
            the balance loss (`router_aux_loss_coef`) are the model's. Tail tokens of a checkpoint
            that was trained without them change its outputs: that is where training starts, and no
            reproduction of anything.
        backend: "native" computes the experts here; "deepspeed" replaces the gates alone.
        repair: Which of the host's defects to repair, of `REPAIRS`.

    Returns:
        The same model. Its `token_modality` tells the layers what the tokens are, where
        `inputs_embeds` are passed directly: `with model.token_modality.using(...)`.

    Raises:
        ValueError: No such model, no MoE layer, converted before, or a tail rule that needs
            attention scores.
        NotImplementedError: Experts on several ranks without DeepSpeed, or Tutel's.
    """
    if backend not in ("native", "deepspeed"):
        raise ValueError(f"backend={backend!r} is neither 'native' nor 'deepspeed'")
    if set(repair) - set(REPAIRS):
        raise ValueError(f"repair={tuple(repair)} may hold {', '.join(REPAIRS)}")
    refuse_attention(spec)
    host = _find_host(model)
    decoder = host.get_model()
    layers = decoder.layers if hasattr(decoder, "layers") else decoder.h
    sparse = _sparse_layers(layers, host, backend)
    weight = getattr(host, "router_aux_loss_coef", spec.balance_weight)
    specs = {i: _spec_of_layer(spec, layers[i].mlp, weight) for i in sparse}

    modality = TokenModality()
    for index, layer_spec in specs.items():
        mlp = layers[index].mlp
        if backend == "native":
            training = mlp.training
            new = MoELlavaLayer(mlp, layer_spec, context_of=modality)
            layers[index].mlp = new.train(training)
        else:
            moe = mlp.deepspeed_moe
            gate = DeepSpeedGate(moe, layer_spec, token_modality=modality)
            moe.gate = gate.train(moe.gate.training)
    splice = _Splicing(host, modality)
    decoder.forward = _DecoderForward(decoder, splice)
    for index, layer in enumerate(layers):
        layer.forward = _LayerForward(layer, modality, as_tensor="aux_checkpointing" in repair)
        if index not in sparse and "batch_of_three" in repair:
            layer.mlp.register_forward_hook(_never_three_rows)
    setattr(host, _SPLICE, splice)
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
    spec: MoESpec,
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
    import json
    from pathlib import Path

    path = Path(folder) / "config.json"
    try:
        kind = json.loads(path.read_text()).get("model_type")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no readable config.json: {error}") from error
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
        if hasattr(type(module), _SPLICE):
            if hasattr(module, "token_modality"):
                raise ValueError("the model is converted already; convert a freshly loaded one")
            return module
    raise ValueError(
        f"{type(model).__name__} is no MoE-LLaVA model (it has no {_SPLICE}); for a Hugging Face "
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


def _spec_of_layer(spec: MoESpec, mlp: Any, weight: float) -> MoESpec:
    if spec.shared_experts or spec.expert_split != 1:
        raise ValueError(
            f"shared_experts={spec.shared_experts}, expert_split={spec.expert_split}: the model's "
            "experts are what they are; make a new sparse model with upcycle_llava for these"
        )
    wg: Any = mlp.deepspeed_moe.gate.wg
    return replace(spec, num_experts=wg.out_features, balance_weight=float(weight))


class _Splicing:
    """The host's splicing, from whose labels we read what each spliced token is.

    Image features get the label -100. So every -100 among the labels that go in is marked
    beforehand; what comes out as a plain -100 is an image feature, whatever padding side,
    truncation and number of images have made of the rows.
    """

    def __init__(self, host: Any, modality: TokenModality):
        self._splice = getattr(host, _SPLICE)
        self.modality = modality
        self._tokens: TokenContext | None = None

    def take(self) -> TokenContext | None:
        """The tokens that were spliced last, once."""
        tokens, self._tokens = self._tokens, None
        return tokens

    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        labels: Tensor | None,
        images: Any,
        *more: Any,
    ) -> tuple:
        """As the host's, which returns ids, positions, mask, cache, embeddings, labels."""
        rest = (past_key_values, labels, images, *more)
        if images is None or input_ids.shape[1] == 1:  # nothing is spliced in
            self._tokens = TokenContext(_without_images(input_ids, attention_mask))
            return self._splice(input_ids, position_ids, attention_mask, *rest)
        marked = torch.full_like(input_ids, _PROMPT)
        if labels is not None:
            marked = labels.masked_fill(labels == _IGNORE, _PROMPT)
        mask = attention_mask
        if mask is None:
            mask = torch.ones_like(input_ids, dtype=torch.bool)
        ids, positions, mask_out, cache, embeds, labels_out = self._splice(
            input_ids, position_ids, mask, past_key_values, marked, images, *more
        )
        if embeds is None:  # a model without image tower
            self._tokens = TokenContext(_without_images(input_ids, attention_mask))
            return ids, positions, attention_mask, cache, None, labels
        real_BS = mask_out.bool()
        map_BS = torch.where(labels_out == _IGNORE, int(Modality.VISION), int(Modality.LANGUAGE))
        map_BS = torch.where(real_BS, map_BS, int(Modality.PADDING)).to(torch.uint8)
        prompt_BS = None if labels is None else (labels_out == _PROMPT) & real_BS
        self._tokens = TokenContext(map_BS, instruction_BL=prompt_BS)
        if labels is None:
            labels_out = None
        else:
            labels_out = labels_out.masked_fill(labels_out == _PROMPT, _IGNORE)
        return (
            ids,
            positions,
            None if attention_mask is None else mask_out,
            cache,
            embeds,
            labels_out,
        )


def _without_images(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """All language but padding; a single new token is language whatever the mask of the past."""
    map_BS = torch.full_like(input_ids, int(Modality.LANGUAGE), dtype=torch.uint8)
    if attention_mask is None or attention_mask.shape != input_ids.shape or map_BS.shape[1] == 1:
        return map_BS
    return map_BS.masked_fill(attention_mask == 0, int(Modality.PADDING))


class _DecoderForward:
    """The decoder's forward, inside which layers know what was spliced."""

    def __init__(self, decoder: Any, splice: _Splicing):
        self._forward = decoder.forward
        self._splice = splice

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tokens, modality = self._splice.take(), self._splice.modality
        if tokens is None:
            given = kwargs.get("inputs_embeds", kwargs.get("input_ids"))
            several = given is None or given.shape[1] > 1
            if several and modality.current is None:
                raise ValueError(
                    "nothing says which of these tokens are images, since they did not come "
                    f"through {_SPLICE}; run this inside `with "
                    "model.token_modality.using(modality_map)`"
                )
            return self._forward(*args, **kwargs)
        with modality.using(tokens):
            return self._forward(*args, **kwargs)


class _LayerForward:
    """A decoder layer's forward that can be recomputed by any kind of checkpointing.

    The host checkpoints layers without a way to tell them anything. But the input that a layer is
    recomputed with is the storage it was computed with, which lives until then.
    """

    def __init__(self, layer: Any, modality: TokenModality, *, as_tensor: bool):
        self._forward = layer.forward
        self._modality = modality
        self._as_tensor = as_tensor
        self._seen: list[tuple[weakref.ref[Tensor], TokenContext]] = []

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        with self._tokens_of(hidden_states):
            outputs = self._forward(hidden_states, *args, **kwargs)
        losses = outputs[-1] if isinstance(outputs, tuple) else None
        if not self._as_tensor or not isinstance(losses, list):
            return outputs
        losses = [loss for loss in losses if loss is not None]
        # the model extends its list by this, and a tensor yields its scalars as well
        return (*outputs[:-1], torch.stack(losses) if losses else losses)

    def _tokens_of(self, hidden: Tensor) -> AbstractContextManager[None]:
        if not is_recomputed():
            tokens = self._modality.current
            self._seen = [pair for pair in self._seen if pair[0]() is not None]
            # reentrant checkpointing computes without gradients at first
            kept = torch.is_grad_enabled() or hidden.requires_grad
            if tokens is not None and kept:
                self._seen.append((weakref.ref(hidden), tokens))
            return nullcontext()
        for reference, tokens in reversed(self._seen):
            tensor = reference()
            if tensor is not None and tensor.data_ptr() == hidden.data_ptr():
                return self._modality.using(tokens)
        return nullcontext()


def _never_three_rows(_mlp: nn.Module, _inputs: Any, output: Any) -> Any:
    """The host tells sparse from dense by whether the output has length three."""
    if isinstance(output, Tensor) and len(output) == 3:
        return output, None, None
    return output
