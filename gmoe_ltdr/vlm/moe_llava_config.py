"""What config.json of a MoE-LLaVA checkpoint says, in terms of transformers and of `MoESpec`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from gmoe_ltdr.spec import PRESETS, MoESpec
from gmoe_ltdr.vlm.checkpoint_files import needed, read_config_json
from gmoe_ltdr.vlm.decoder import vlm_preset

# MoE-LLaVA's model type: transformers' model type of its language model
FAMILIES = {
    "moe_llava_stablelm": "stablelm",
    "moe_llava_phi": "phi",
    "moe_llava_qwen1_5": "qwen2",
}
# Names of configuration fields where the two differ
_RENAMED_FIELDS = {"norm_eps": "layer_norm_eps", "rope_pct": "partial_rotary_factor"}
_TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range",
    "layer_norm_eps", "rms_norm_eps", "norm_eps", "rope_pct", "partial_rotary_factor",
    "rope_theta", "use_qkv_bias", "qk_layernorm", "use_sliding_window", "sliding_window",
    "max_window_layers", "resid_pdrop", "embd_pdrop", "attention_dropout", "tie_word_embeddings",
    "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
# Routers whose weights are a gate's and nothing else
_ROUTERS_OF_ONE_GATE = ("token_choice", "groups", "expert_choice")
# openai/clip-vit-large-patch14-336, the tower of all published models
_CLIP_LARGE_336 = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip


def read_config(source: Path) -> dict[str, Any]:
    """The checkpoint's config.json.

    Raises:
        ValueError: There is none, or it is that of another kind of model.
    """
    config = read_config_json(source)
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"{source} has model_type {kind!r}; {', '.join(FAMILIES)} can be converted (Qwen-1 and "
            "MiniCPM have no counterpart in transformers; use convert_moe_llava on the model)"
        )
    needed(config, "vocab_size", of=f"the config.json of {source}")
    return config


def spec_of(old: Mapping[str, Any], preset: str) -> MoESpec:
    """The sparse layers as `config.moe` describes them.

    Raises:
        ValueError: No sparse layer, something that has no counterpart, or a preset with parts that
            the checkpoint does not have.
        NotImplementedError: Experts on several ranks, or Tutel's.
    """
    moe = old.get("moe") or {}
    if not isinstance(moe, Mapping):
        raise ValueError(f"config.moe of the checkpoint is a {type(moe).__name__}, and no mapping")
    layers = moe.get("moe_layers_idx")
    if not layers:
        raise ValueError("the checkpoint has no MoE layer (config.moe.moe_layers_idx is empty)")
    if moe.get("use_tutel"):
        raise NotImplementedError("the experts are Tutel's; train with use_tutel=False instead")
    if moe.get("ep_size", 1) != 1:
        raise NotImplementedError(
            f"the experts lie on ep_size={moe['ep_size']} ranks, each of which numbers its own "
            "from 0; gather them into one checkpoint with ep_size=1 first"
        )
    if moe.get("use_residual"):
        raise ValueError(
            "residual experts (use_residual) have no counterpart in this model; use "
            "convert_moe_llava, which keeps them"
        )
    obstacle = _obstacle(preset)
    if obstacle is not None:
        able = ", ".join(name for name in PRESETS if _obstacle(name) is None)
        raise ValueError(
            f"preset {preset!r} cannot take a MoE-LLaVA checkpoint, {obstacle}; {able} can, or "
            "make a dense LLaVA sparse with it (ltdr vlm upcycle, upcycle_llava)"
        )
    numbers = needed(moe, "num_experts", of="config.moe of the checkpoint")
    numbers = [numbers] if isinstance(numbers, int) else numbers
    if len(set(numbers)) != 1:
        raise ValueError(
            f"layers with different numbers of experts ({numbers}) have no counterpart in this "
            "model; use convert_moe_llava, which keeps them"
        )
    projector = old.get("image_projector_type")
    if projector != "mlp2x_gelu":
        raise ValueError(
            f"image_projector_type={projector!r} has no counterpart in LLaVA, whose projector is "
            "'mlp2x_gelu'"
        )
    return vlm_preset(
        preset,
        num_experts=numbers[0],
        top_k=needed(moe, "top_k_experts", of="config.moe of the checkpoint"),
        layers=tuple(layers),
        balance_weight=moe.get("router_aux_loss_coef", 0.01),
    )


def _obstacle(preset: str) -> str | None:
    """What a preset has that such a checkpoint has not; None: nothing."""
    spec = vlm_preset(preset)
    if spec.router not in _ROUTERS_OF_ONE_GATE:
        return f"whose gate is all that router {spec.router!r} would find of its weights"
    if spec.shared_experts:
        return "which has no shared experts"
    if spec.expert_split != 1:
        return "whose experts are whole networks and not pieces of one"
    return None


def text_config_of(old: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The language model's configuration, for `LlavaConfig(text_config=...)`."""
    values = {name: old[name] for name in _TEXT_FIELDS if name in old}
    values = {_RENAMED_FIELDS.get(name, name): value for name, value in values.items()}
    return {**values, "vocab_size": vocab_size, "model_type": FAMILIES[old["model_type"]]}


def vision_config_of(
    old: Mapping[str, Any], source: Path, vision_tower: str | os.PathLike | None
) -> dict[str, Any]:
    """The image tower's configuration: of the folder given, of one beside the checkpoint, or known.

    Raises:
        ValueError: None of these.
    """
    name = str(old.get("mm_image_tower") or "")
    for folder in (vision_tower, source / name if name else None):
        path = None if folder is None else Path(folder) / "config.json"
        if path is not None and path.is_file():
            values = json.loads(path.read_text())
            values = values.get("vision_config", values)  # of a whole CLIP
            return {**values, "model_type": "clip_vision_model"}
    if vision_tower is not None:
        raise ValueError(f"vision_tower={str(vision_tower)!r} holds no config.json of a CLIP")
    if name.rstrip("/").endswith("clip-vit-large-patch14-336"):
        return {**_CLIP_LARGE_336, "model_type": "clip_vision_model"}
    raise ValueError(
        f"the checkpoint's image tower is {name!r}; pass vision_tower=, a folder with that model"
    )


def feature_strategy(old: Mapping[str, Any]) -> Literal["default", "full"]:
    """LLaVA's name for whether the class token is among the image features."""
    return "full" if old.get("mm_vision_select_feature") == "cls_patch" else "default"


def num_features(vision: Mapping[str, Any], old: Mapping[str, Any]) -> int:
    """How many tokens one image becomes.

    Raises:
        ValueError: The image tower's configuration does not say.
    """
    image, patch = (
        needed(vision, name, of="the image tower's configuration")
        for name in ("image_size", "patch_size")
    )
    patches = (image // patch) ** 2
    return patches + (feature_strategy(old) == "full")
