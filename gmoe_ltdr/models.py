"""Sparse ViTs: `create_moe_vit` for any timm ViT, and names registered with timm.

After `import gmoe_ltdr`, `timm.create_model("ltdr_deit_small_patch16_224", pretrained=True)` builds
the dense model, loads its weights and upcycles it. Tags of the dense model work too:
"gmoe_vit_small_patch16_224.augreg_in1k".
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import generate_default_cfgs, get_pretrained_cfg, register_model
from torch import nn
from torch.distributed import ProcessGroup

from gmoe_ltdr.sharding import expert_parallel_group, gather_state_dict
from gmoe_ltdr.spec import MoESpec, preset
from gmoe_ltdr.upcycle import upcycle_

_WEIGHTS_FILE = "model.safetensors"
_CONFIG_FILE = "config.json"
_FORMAT = "gmoe-ltdr/1"


def create_moe_vit(
    name: str,
    spec: MoESpec,
    *,
    pretrained: bool = False,
    ep_group: ProcessGroup | None = None,
    **timm_kwargs: Any,
) -> nn.Module:
    """A timm ViT with sparse layers.

    Args:
        name: A dense timm model, with or without a tag: "deit_small_patch16_224".
        spec: The sparse model.
        pretrained: Load the dense model's weights first, then copy them into every expert. For a
            local file pass `pretrained_cfg_overlay={"file": path}` as with timm.
        ep_group: Ranks that share the experts, see `upcycle_`.
        **timm_kwargs: For `timm.create_model`: num_classes, img_size, drop_path_rate, ...

    Returns:
        The model; `save_model` knows how to build it again.

    Raises:
        ValueError: Pretrained weights were asked for, and timm knows none for this name.
        RuntimeError: They could not be loaded. A model never starts from random weights silently.
    """
    dense: Any = create_dense_vit(name, pretrained=pretrained, **timm_kwargs)
    model: Any = upcycle_(dense, spec, ep_group=ep_group)
    placement = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "checkpoint_path")
    kept = {k: v for k, v in timm_kwargs.items() if k not in placement and v is not None}
    model.moe_config = {"backbone": name, "timm_kwargs": kept, "spec": spec.to_dict()}
    return model


class PretrainedWeightsError(RuntimeError):
    """Pretrained weights that could not be loaded; `reason` says why."""

    def __init__(self, name: str, reason: str):
        super().__init__(
            f"the pretrained weights of {name!r} could not be loaded ({reason}). "
            "Without a network, put them into the cache first or pass "
            "pretrained_cfg_overlay={'file': 'weights.safetensors'}; pretrained=False starts from "
            "random weights"
        )
        self.reason = reason


def create_dense_vit(name: str, *, pretrained: bool = False, **timm_kwargs: Any) -> nn.Module:
    """`timm.create_model`, where asking for pretrained weights and not getting them is an error.

    Raises:
        ValueError: timm does not know the model, or has no weights for it.
        PretrainedWeightsError: The weights could not be loaded.
    """
    if not timm.is_model(name.split(".")[0]) and ":" not in name:
        raise ValueError(f"timm has no model {name!r}; see timm.list_models('vit*')")
    if not pretrained:
        return timm.create_model(name, pretrained=False, **timm_kwargs)
    overlay = timm_kwargs.get("pretrained_cfg_overlay") or {}
    tag = timm_kwargs.get("pretrained_cfg")
    full_name = f"{name}.{tag}" if isinstance(tag, str) and "." not in name else name
    cfg = get_pretrained_cfg(full_name, allow_unregistered=True) if ":" not in name else None
    if ":" not in name and not overlay and not (cfg and cfg.has_weights) and not _is_cfg(tag):
        raise ValueError(
            f"timm has no pretrained weights for {full_name!r}; pass pretrained=False to start "
            "from random weights, or pretrained_cfg_overlay={'file': 'weights.safetensors'}"
        )
    try:
        return timm.create_model(name, pretrained=True, **timm_kwargs)
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise PretrainedWeightsError(name, f"{type(error).__name__}: {first_line}") from error


def _is_cfg(tag: Any) -> bool:
    return tag is not None and not isinstance(tag, str)


def save_model(model: nn.Module, folder: str | os.PathLike) -> Path:
    """Write a sparse model as safetensors and JSON, one unsharded layout.

    With expert parallelism every rank of the group calls this; the group's first rank writes what
    all of them hold, and all return when it is written.

    Args:
        model: Made by `create_moe_vit` or a registered name, or an upcycled timm model that was
            made by `timm.create_model`.
        folder: Created if need be; its files are replaced atomically.

    Raises:
        ValueError: It is not known how the model was made.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    config = {"format": _FORMAT, **_moe_config(model)}
    try:
        text = json.dumps(config, indent=1, sort_keys=True)
    except TypeError as error:
        raise ValueError(
            f"the model's timm arguments cannot be written as JSON: {error}"
        ) from error
    group = expert_parallel_group(model)
    state = gather_state_dict(model)
    if group is None or group.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
        partial = folder / f".{_WEIGHTS_FILE}.{os.getpid()}"
        save_file(state, partial)
        os.replace(partial, folder / _WEIGHTS_FILE)
        partial = folder / f".{_CONFIG_FILE}.{os.getpid()}"
        partial.write_text(text + "\n")
        os.replace(partial, folder / _CONFIG_FILE)
    if group is not None:
        torch.distributed.barrier(group)
    return folder


def load_model(
    folder: str | os.PathLike,
    *,
    device: str = "cpu",
    ep_group: ProcessGroup | None = None,
    dispatcher: str | None = None,
) -> nn.Module:
    """Read what `save_model` wrote, in evaluation mode. Never executes code from the folder.

    Args:
        folder: Written on any number of ranks.
        device: Where the model goes.
        ep_group: Ranks that share the experts from now on; each of them calls this.
        dispatcher: Replaces the one the model was saved with. With `ep_group`, a model saved with
            "local" gets "auto".

    Raises:
        ValueError: Not such a folder, or its two files do not fit each other.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        config = json.loads((folder / _CONFIG_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} holds no readable {_CONFIG_FILE} of save_model: {error}"
        ) from error
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        raise ValueError(f"{folder / _CONFIG_FILE} was not written by save_model ({_FORMAT})")
    spec = MoESpec.from_dict(config["spec"])
    if dispatcher is None and ep_group is not None and spec.dispatcher == "local":
        dispatcher = "auto"
    if dispatcher is not None:
        spec = MoESpec.from_dict({**spec.to_dict(), "dispatcher": dispatcher})
    model = create_moe_vit(
        config["backbone"], spec, pretrained=False, ep_group=ep_group, **config["timm_kwargs"]
    )
    try:
        state = load_file(folder / _WEIGHTS_FILE)
        model.load_state_dict(state, strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder / _WEIGHTS_FILE} does not fit its config: {error}") from error
    return model.to(device).eval()


def _moe_config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "moe_config", None)
    if config is not None:
        return _with_current_head(model, config)
    from gmoe_ltdr.collect import moe_layers

    layers = moe_layers(model)
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not layers or not name:
        raise ValueError(
            "save_model needs a sparse model made from a timm name: use create_moe_vit, or "
            "upcycle_ on a model of timm.create_model"
        )
    kwargs = dict(getattr(model, "_model_args", {}))
    kwargs.setdefault("num_classes", model.num_classes)
    img_size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if img_size is not None:
        kwargs.setdefault("img_size", list(img_size))
    spec = next(iter(layers.values())).spec
    return {"backbone": name, "timm_kwargs": kwargs, "spec": spec.to_dict()}


def _with_current_head(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    """`reset_classifier` changes the head after the model was made."""
    num_classes = getattr(model, "num_classes", None)
    if num_classes is None:
        return config
    return {**config, "timm_kwargs": {**config["timm_kwargs"], "num_classes": num_classes}}


def _register(prefix: str, dense_name: str) -> None:
    """Register `<prefix>_<dense name>` with timm: the dense model, upcycled with a preset."""

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        spec = kwargs.pop("spec", None) or preset(prefix)
        cfg = kwargs.get("pretrained_cfg")
        if cfg is not None and not isinstance(cfg, (str, dict)):
            # timm passes the registered configuration of the sparse name; the dense one is meant
            kwargs["pretrained_cfg"] = replace(cfg, architecture=dense_name)
        kwargs = {k: v for k, v in kwargs.items() if v is not None}
        return create_moe_vit(dense_name, spec, pretrained=pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = f"{prefix}_{dense_name}"
    entrypoint.__doc__ = f"{dense_name} of timm with sparse layers, preset {prefix!r}."
    globals()[entrypoint.__name__] = register_model(entrypoint)


_DENSE_NAMES = tuple(
    f"{family}_{size}_patch16_224"
    for family in ("deit", "vit")
    for size in ("tiny", "small", "base")
)


def _dense_cfgs(prefix: str) -> dict[str, dict[str, Any]]:
    """The dense models' pretrained configurations under the sparse names, all their tags."""
    cfgs = {}
    for dense_name in _DENSE_NAMES:
        for full_name in timm.list_models(f"{dense_name}.*", include_tags=True):
            cfg = get_pretrained_cfg(full_name)
            if cfg is not None:
                cfgs[f"{prefix}_{full_name}"] = {
                    k: v for k, v in cfg.to_dict().items() if k not in ("architecture", "tag")
                }
    return cfgs


# timm reads pretrained configurations from `default_cfgs` of the module that registers a model
default_cfgs = generate_default_cfgs({**_dense_cfgs("ltdr"), **_dense_cfgs("gmoe")})

for _prefix in ("ltdr", "gmoe"):
    for _dense_name in _DENSE_NAMES:
        _register(_prefix, _dense_name)
