"""`vit_dim48_patch56_224`, a ViT that costs a CPU next to nothing beside decoding a photograph.

An accelerator computes while the processor loads: what is left to wait for is loading. A run of
this network shows that part on a machine without one. Importing this module tells timm of it.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

default_cfgs = generate_default_cfgs(
    {
        "vit_dim48_patch56_224.untrained": {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)


@register_model
def vit_dim48_patch56_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Width 48, four blocks, 17 tokens of a 224-pixel image: 0.6 M parameters."""
    arguments = {"img_size": 224, "patch_size": 56, "embed_dim": 48, "depth": 4, "num_heads": 2}
    return build_model_with_cfg(
        VisionTransformer, "vit_dim48_patch56_224", pretrained, **{**arguments, **kwargs}
    )
