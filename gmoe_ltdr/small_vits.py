"""Small dense ViTs for images of 16 to 64 pixels, trained from scratch and registered with timm.

`vit_dim64_patch4_16` and `vit_dim64_patch4_28` cut digits into plain patches.
`vit_dim128_stem16_64` looks at drawings: fixed oriented-gradient energies, which do not change
when a filled shape becomes an outline or a colour another one, then a convolutional stem, then
transformer blocks; `vit_dim128_stem16_reg1_64` adds a token that is no patch. Their blocks are
timm's, so `upcycle_` makes any of them sparse.
Shapes: B images, C channels, D width, H and W pixels, K orientations, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import (
    VisionTransformer,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)
from torch import Tensor, nn


class OrientedGradients(nn.Module):
    """A drawing on white as `num_orientations` gradient energies and its darkness, half the size.

    The part of histograms of oriented gradients (HOG) that carries over from one artist to the
    next: strength of the edges by their orientation, relative to the strength around them. Colours
    and 2x2 pixels are summed as structure tensors, so the sign of an edge does not count. Nothing
    is learnt.

    Args:
        num_orientations: How many directions the half circle is divided into.
    """

    _FLOOR = 0.4  # cosine below which a direction gets nothing, so that neighbours overlap little
    _NEIGHBOURHOOD = 5  # pixels of the output over which energy is compared

    directions: Tensor

    def __init__(self, num_orientations: int = 8):
        super().__init__()
        angles = torch.arange(num_orientations) * (2 * math.pi / num_orientations)
        directions = torch.stack([angles.cos(), angles.sin()], dim=1)
        self.register_buffer("directions", directions[:, :, None, None], persistent=False)
        self.out_channels = num_orientations + 1

    @torch.no_grad()
    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Images in [-1, 1], white 1, to (B, num_orientations + 1, H / 2, W / 2)."""
        ink = (1 - x_BCHW) * 0.5
        padded = F.pad(ink, (1, 1, 1, 1))
        dx = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
        dy = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
        # twice the gradient's angle: opposite directions coincide, so channels and pixels add up
        cosine = F.avg_pool2d((dx * dx - dy * dy).sum(1, keepdim=True), 2)
        sine = F.avg_pool2d((2 * dx * dy).sum(1, keepdim=True), 2)
        squared = (cosine.square() + sine.square() + 1e-6).sqrt()
        along_BKHW = F.conv2d(torch.cat([cosine, sine], 1) / squared, self.directions)
        energy = (along_BKHW - self._FLOOR).relu() * (squared.sqrt() / (1 - self._FLOOR))
        size = self._NEIGHBOURHOOD
        around = F.avg_pool2d(energy.square().sum(1, keepdim=True), size, 1, size // 2)
        darkness = F.avg_pool2d(ink.mean(1, keepdim=True), 2)
        return torch.cat([energy / (around + 0.01).sqrt(), darkness], dim=1)


class ResidualConvs(nn.Module):
    """Two 3x3 convolutions, each after normalisation and ReLU, beside the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x_inner = self.conv1(self.norm1(x).relu())
        return x + self.conv2(self.norm2(x_inner).relu())


class GradientStem(nn.Module):
    """timm `embed_layer`: oriented gradients, then convolutions down to one token per patch.

    Args:
        img_size: Height and width of the images, multiples of `patch_size`.
        patch_size: Pixels per token and side: 2 of the gradients times 2 for each stage.
        in_chans: Channels of the images.
        embed_dim: Width of the tokens.
        widths: Channels of the stages; each halves the size.
        **_: What timm passes to every embedding and this one does not need.

    Raises:
        ValueError: The sizes do not fit together.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 64,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 128,
        widths: Sequence[int] = (32, 64, 128),
        **_: Any,
    ):
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if patch_size != 2 ** (len(widths) + 1):
            raise ValueError(
                f"patch_size={patch_size} does not fit {len(widths)} stages; "
                f"it is {2 ** (len(widths) + 1)}"
            )
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"img_size={height}x{width} is not a multiple of patch_size={patch_size}"
            )
        self.img_size = (height, width)
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (height // patch_size, width // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.gradients = OrientedGradients()
        stages: list[nn.Module] = []
        channels = self.gradients.out_channels
        for stage_width in widths:
            stages += [
                nn.Conv2d(channels, stage_width, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(stage_width),
                nn.ReLU(),
                ResidualConvs(stage_width),
            ]
            channels = stage_width
        self.stages = nn.Sequential(*stages)
        self.proj = nn.Conv2d(channels, embed_dim, 1)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels per token, as timm's embeddings report it."""
        return self.patch_size[0] if as_scalar else self.patch_size

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if tuple(x_BCHW.shape[-2:]) != self.img_size:
            raise ValueError(
                f"images are {tuple(x_BCHW.shape[-2:])}, the model was built for {self.img_size}; "
                "pass img_size to create_model"
            )
        # channels last saves a twelfth of a training step on a CPU
        gradients = self.gradients(x_BCHW).contiguous(memory_format=torch.channels_last)
        return self.proj(self.stages(gradients)).flatten(2).transpose(1, 2)


def _cfg(size: int, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 16,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "fixed_input_size": True,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "vit_dim64_patch4_16.untrained": _cfg(16),
        "vit_dim64_patch4_28.untrained": _cfg(28),
        "vit_dim128_stem16_64.untrained": _cfg(64, first_conv="patch_embed.stages.0"),
        "vit_dim128_stem16_reg1_64.untrained": _cfg(64, first_conv="patch_embed.stages.0"),
    }
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> VisionTransformer:
    return build_model_with_cfg(VisionTransformer, name, pretrained, **kwargs)


@register_model
def vit_dim64_patch4_16(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Width 64, three blocks, 4x4 patches of 16-pixel images: 0.15 M parameters."""
    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 4}
    return _create("vit_dim64_patch4_16", pretrained, **{**arguments, **kwargs})


@register_model
def vit_dim64_patch4_28(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Width 64, three blocks, 4x4 patches of 28-pixel images: 0.16 M parameters."""
    arguments = {"img_size": 28, "patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 4}
    return _create("vit_dim64_patch4_28", pretrained, **{**arguments, **kwargs})


@register_model
def vit_dim128_stem16_64(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Oriented gradients, three convolutional stages to 4x4 tokens, width 128, four blocks: 1.3 M
    parameters, 30 M multiply-adds for a 64-pixel drawing on white."""
    return _create_with_stem("vit_dim128_stem16_64", pretrained, **kwargs)


@register_model
def vit_dim128_stem16_reg1_64(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """`vit_dim128_stem16_64` with one register token, for routers that tell it from patches: the
    head reads the mean patch in both."""
    arguments = {"reg_tokens": 1, "no_embed_class": True, **kwargs}
    return _create_with_stem("vit_dim128_stem16_reg1_64", pretrained, **arguments)


def _create_with_stem(name: str, pretrained: bool, **kwargs: Any) -> VisionTransformer:
    arguments = {
        "img_size": 64,
        "patch_size": 16,
        "embed_dim": 128,
        "depth": 4,
        "num_heads": 4,
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": True,
        "embed_layer": partial(GradientStem, widths=(32, 64, 128)),
    }
    return _create(name, pretrained, **{**arguments, **kwargs})
