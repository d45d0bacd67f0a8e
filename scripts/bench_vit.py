"""`vit_dim48_pooled_224`, a ViT that costs a CPU next to nothing beside loading a photograph.

An accelerator computes while the processor loads: what is left to wait for is loading. A run of
this network shows that part on a machine without one. Importing this module tells timm of it.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

_SHRUNK = 8  # by so much, in height and width, before the image is cut into patches


class PooledPatches(PatchEmbed):
    """4 x 4 patches of an image that is shrunk first."""

    def __init__(self, img_size: int | tuple[int, int], patch_size: int, **kwargs: Any) -> None:
        side = img_size if isinstance(img_size, int) else img_size[0]
        super().__init__(side // _SHRUNK, patch_size, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.avg_pool2d(x, _SHRUNK))


default_cfgs = generate_default_cfgs(
    {
        "vit_dim48_pooled_224.untrained": {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)


@register_model
def vit_dim48_pooled_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Width 48, four blocks, 17 tokens: 0.1 M parameters before it is made sparse."""
    arguments = {"img_size": 224, "patch_size": 7, "embed_dim": 48, "depth": 4, "num_heads": 2}
    arguments["embed_layer"] = PooledPatches
    return build_model_with_cfg(
        VisionTransformer, "vit_dim48_pooled_224", pretrained, **{**arguments, **kwargs}
    )
