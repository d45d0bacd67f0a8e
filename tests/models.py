"""Small models for tests."""

from __future__ import annotations

import torch
from torch import nn

from gmoe_ltdr import MoESpec, create_moe_vit
from gmoe_ltdr.models import create_dense_vit

TINY = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 5,
}


def tiny_dense_vit(name: str = "vit_tiny_patch16_224", *, seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    return create_dense_vit(name, **{**TINY, **kwargs})


def tiny_moe_vit(
    spec: MoESpec, name: str = "vit_tiny_patch16_224", *, seed: int = 0, **kwargs
) -> nn.Module:
    torch.manual_seed(seed)
    return create_moe_vit(name, spec, **{**TINY, **kwargs})
