"""MoE-LLaVA's own classes, tiny, with random weights: for tests beside its checkout, which
MOE_LLAVA_DIR names.

Needs the transformers that MoE-LLaVA runs on, 4.37. With DeepSpeed installed its layers are
DeepSpeed's, without it they are hulls that can only be converted.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import SimpleNamespace

import torch

from gmoe_ltdr.vlm.deepspeed_stub import deepspeed_stub
from tests.vlm.goldens import golden

CHECKOUT = os.environ.get("MOE_LLAVA_DIR", "")
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
          "num_attention_heads", "num_key_value_heads", "max_position_embeddings")  # fmt: skip
FAMILIES = {  # module, name of the classes, what its configuration wants besides
    "stablelm": ("llava_stablelm_moe", "MoELLaVAStablelm", {"rope_pct": 0.25}),
    "phi": ("llava_phi_moe", "MoELLaVAPhi", {}),
    "qwen1_5": ("llava_qwen1_5_moe", "MoELLaVAQwen1_5", {}),
    "qwen": (
        "llava_qwen_moe",
        "MoELLaVAQWen",
        {"intermediate_size": 256, "kv_channels": 16, "seq_length": 256, "no_bias": True,
         "use_flash_attn": False, "fp32": True, "bf16": False, "fp16": False},
    ),
}  # fmt: skip


def why_not() -> str:
    """What is missing; empty if nothing is."""
    if not Path(CHECKOUT, "moellava").is_dir():
        return "MOE_LLAVA_DIR names no checkout of MoE-LLaVA"
    try:
        import transformers
    except ImportError:
        return "transformers is missing"
    return "" if transformers.__version__.startswith("4.37") else "needs transformers 4.37"


def start_deepspeed(port: int) -> None:
    """For one process, or for a rank of the group that is there already."""
    rank, size = 0, 1
    if torch.distributed.is_initialized():
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(size))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def write_tower_here() -> None:
    """The golden CLIP in the working directory, where an image tower looks for it by name."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(**{k: v for k, v in golden().clip.items() if v is not None})
    tower = CLIPVisionModel(config)
    prefix = "model.image_tower.image_tower."
    state = {k.removeprefix(prefix): v for k, v in golden().state.items() if prefix in k}
    tower.load_state_dict(state, strict=False)
    tower.save_pretrained("openai/clip-tiny")
    side = golden().clip["image_size"]
    crop = {"height": side, "width": side}
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size=crop).save_pretrained(
        "openai/clip-tiny"
    )


def model_of(family: str, *, trained: bool = False, moe: dict | None = None, **changes):
    """A model, experts and gates told apart, not converted; the same whenever it is made.

    Args:
        family: Of `FAMILIES`.
        trained: The class for training, with its layers put in as the host's trainer does.
        moe: Changed settings of its sparse layers.
        **changes: Of its configuration.
    """
    module, name, own = FAMILIES[family]
    with deepspeed_stub():
        classes = importlib.import_module(f"moellava.model.language_model.{module}")
    vision = ("mm_image_tower", "mm_hidden_size", "image_projector_type",
              "mm_vision_select_layer", "mm_vision_select_feature", "use_mm_proj")  # fmt: skip
    values = {key: golden().config[key] for key in _SIZES}
    settings = {**golden().config["moe"], "capacity_factor": 4.0, **(moe or {})}
    if not trained:
        values.update({key: golden().config[key] for key in vision})
    config = getattr(classes, f"{name}Config")(**{**values, **own, **changes})
    config.tokenizer_padding_side = changes.get("tokenizer_padding_side", "right")
    config.use_cache = changes.get("use_cache", True)
    torch.manual_seed(0)
    if trained:
        model = getattr(classes, f"{name}ForCausalLM")(config)
        settings["num_experts"] = settings["num_experts"][:1]  # the host repeats it
        model.initialize_moe_modules(SimpleNamespace(**settings))
        model.get_model().initialize_vision_modules(_vision_arguments())
    else:
        config.moe = settings
        model = getattr(classes, f"Eval{name}ForCausalLM")(config)
        model.get_image_tower().load_model()
    decoder = model.get_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (decoder.layers if hasattr(decoder, "layers") else decoder.h).parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _vision_arguments() -> SimpleNamespace:
    return SimpleNamespace(
        image_tower="openai/clip-tiny", video_tower=None, mm_vision_select_layer=-2,
        mm_vision_select_feature="patch", pretrain_mm_mlp_adapter=None,
        image_projector_type="mlp2x_gelu", video_projector_type="linear",
        video_global_proj=False, video_temproal_proj=False, video_spatial_proj=False,
    )  # fmt: skip


def batch() -> dict:
    """Two rows with an image each, the second padded on the right."""
    g = golden()
    names = ("input_ids", "attention_mask", "labels", "images")
    return {name: getattr(g, name) for name in names} | {"return_dict": True}
