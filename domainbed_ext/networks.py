"""The networks of ERM: DomainBed's choice by input shape.

Images below 32 pixels get a four-layer convolutional network of the shape that DomainBed uses for
28-pixel digits, larger ones a ResNet whose classifier is removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from domainbed_ext.errors import UsageError

_SMALL_IMAGE = 32


def create_featurizer(
    input_shape: tuple[int, int, int], hparams: Mapping[str, Any]
) -> SmallConvNet | ResNet:
    """A network from images (B, C, H, W) to features (B, n_outputs).

    Raises:
        UsageError: An hparam asks for a network that ERM does not have here.
    """
    for name, instead in (("vit", "ERM_ViT"), ("dinov2", "ERM_ViT"), ("lars", "the default Adam")):
        if hparams.get(name):
            raise UsageError(
                f"hparam {name!r} is not available for ERM here; use {instead} instead"
            )
    if input_shape[1] < _SMALL_IMAGE:
        return SmallConvNet(input_shape[0])
    return ResNet(input_shape[0], hparams)


class SmallConvNet(nn.Module):
    """Four 3x3 convolutions (64, 128, 128, 128 channels, the second with stride 2), each with ReLU
    and group normalisation after it, then the mean over positions."""

    n_outputs = 128
    weights_tag = "random"

    def __init__(self, in_chans: int):
        super().__init__()
        layers: list[nn.Module] = []
        for channels, stride in ((64, 1), (128, 2), (128, 1), (128, 1)):
            layers += [
                nn.Conv2d(in_chans, channels, 3, stride=stride, padding=1),
                nn.ReLU(),
                nn.GroupNorm(8, channels),
            ]
            in_chans = channels
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((-2, -1))


class ResNet(nn.Module):
    """A pretrained ResNet-50 (or 18) of timm without its classifier.

    Args:
        in_chans: Channels of the images.
        hparams: `resnet18`, `resnet50_augmix` (weights trained with AugMix), `resnet_dropout`,
            `freeze_bn`: as in DomainBed.

    Raises:
        UsageError: The pretrained weights could not be loaded.
    """

    n_outputs: int
    weights_tag: str

    def __init__(self, in_chans: int, hparams: Mapping[str, Any]):
        super().__init__()
        if hparams["resnet50_augmix"]:
            name = "resnet50.ram_in1k"
        else:
            name = "resnet18.tv_in1k" if hparams["resnet18"] else "resnet50.tv_in1k"
        try:
            self.network = timm.create_model(
                name, pretrained=True, in_chans=in_chans, num_classes=0
            )
        except Exception as error:
            first_line = (str(error).strip().splitlines() or [""])[0]
            raise UsageError(
                f"the pretrained weights of {name} could not be loaded ({first_line}); ERM needs "
                "them for images of 32 pixels and more. Load them once with a network, or "
                "use ERM_ViT with pretrained=false"
            ) from error
        self.weights_tag = name
        self.n_outputs = int(self.network.num_features)  # type: ignore[arg-type]
        self.dropout = nn.Dropout(hparams["resnet_dropout"])
        self.freeze_bn = bool(hparams["freeze_bn"])

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.network(x))

    def train(self, mode: bool = True) -> ResNet:
        super().train(mode)
        if self.freeze_bn:
            for module in self.network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


def create_classifier(in_features: int, num_classes: int, *, nonlinear: bool) -> nn.Module:
    """One linear layer, or three with the width halved twice."""
    if not nonlinear:
        return torch.nn.Linear(in_features, num_classes)
    return nn.Sequential(
        nn.Linear(in_features, in_features // 2),
        nn.ReLU(),
        nn.Linear(in_features // 2, in_features // 4),
        nn.ReLU(),
        nn.Linear(in_features // 4, num_classes),
    )
