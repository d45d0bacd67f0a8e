"""The transforms of image files, in two halves: pixels in a worker process, numbers on the device.

DomainBed's recipe, with torchvision's random numbers in their order: a crop of 70 to 100 % of the
area, a mirror image, colour jitter, now and then grey. What is done with them is our own, since a
worker's time is what a GPU waits for: one resampling of the cropped part, a change of hue without
a journey through 8-bit HSV, and uint8 on the way to the device, a quarter of float's bytes.
Shapes: N images, H and W pixels, colours last (HWC) as decoded, first (CHW) as models want them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

if TYPE_CHECKING:
    from PIL import Image

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

_CROPPED_AREA = (0.7, 1.0)
_CROPPED_ASPECT = (3 / 4, 4 / 3)
_JITTER = (0.7, 1.3)  # the range of the factors of brightness, contrast and saturation
_HUE_SHIFT = (-0.3, 0.3)  # in turns of the colour circle
_MIRRORED, _GREY = 0.5, 0.1  # probabilities

_GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601's, which torchvision takes


@dataclass(frozen=True)
class FileTransform:
    """What becomes of a decoded image: `normalize(pixels(image))`.

    Attributes:
        size: Height and width of the result.
        augmented: Whether it is for training. Random numbers come from torch's global generator.
    """

    size: tuple[int, int]
    augmented: bool

    def __call__(self, image: Image.Image | np.ndarray) -> Tensor:
        """float32 (3, H, W), with ImageNet's normalisation, of an RGB image."""
        return self.normalize(self.pixels(image)[None])[0]

    def pixels(self, image: Image.Image | np.ndarray) -> Tensor:
        """uint8 (3, H, W) of an RGB image or array (H, W, 3), which is only read."""
        pixels_HWC = image if isinstance(image, np.ndarray) else np.array(image)
        pixels_CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)
        return self._augment(pixels_CHW) if self.augmented else _resized(pixels_CHW, self.size)

    def normalize(self, pixels_NCHW: Tensor) -> Tensor:
        """float32 of the same shape and device."""
        # In place: fresh memory is what a large batch costs most on a CPU. Numbers, not tensors
        # made of them: copying those to a GPU would wait for the step before.
        x_NCHW = pixels_NCHW.float().div_(255)
        for x_NHW, mean, std in zip(x_NCHW.unbind(1), _IMAGENET_MEAN, _IMAGENET_STD, strict=True):
            x_NHW.sub_(mean).div_(std)
        return x_NCHW

    def _augment(self, pixels_CHW: Tensor) -> Tensor:
        # each random number is drawn when its turn is, as by a chain of torchvision's transforms
        from torchvision.transforms import ColorJitter, RandomResizedCrop

        top, left, height, width = RandomResizedCrop.get_params(
            pixels_CHW, list(_CROPPED_AREA), list(_CROPPED_ASPECT)
        )
        cropped = pixels_CHW[:, top : top + height, left : left + width]
        pixels_CHW = _resized(cropped, self.size)
        if torch.rand(1) < _MIRRORED:
            pixels_CHW = pixels_CHW.flip(-1)
        order, brightness, contrast, saturation, hue = ColorJitter.get_params(
            list(_JITTER), list(_JITTER), list(_JITTER), list(_HUE_SHIFT)
        )
        x_CHW = pixels_CHW.float()
        for number in order.tolist():
            if number == 0:
                x_CHW.mul_(brightness).clamp_(0, 255)
            elif number == 1:
                _blend_(x_CHW, _grey(x_CHW).mean(), contrast)
            elif number == 2:
                _blend_(x_CHW, _grey(x_CHW), saturation)
            else:
                x_CHW = _turn_hue(x_CHW, hue)
        if torch.rand(1) < _GREY:
            x_CHW = _grey(x_CHW).expand_as(x_CHW)
        return x_CHW.round().to(torch.uint8)


def _resized(pixels_CHW: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(pixels_CHW.shape[1:]) != size:
        pixels_CHW = interpolate(
            pixels_CHW[None], size, mode="bilinear", antialias=True, align_corners=False
        )[0]
    return pixels_CHW.contiguous()


def _grey(x_CHW: Tensor) -> Tensor:
    red, green, blue = _GREY_WEIGHTS
    return (x_CHW[0] * red).add_(x_CHW[1], alpha=green).add_(x_CHW[2], alpha=blue)


def _blend_(x_CHW: Tensor, grey: Tensor, factor: float) -> None:
    x_CHW.mul_(factor).add_(grey, alpha=1 - factor).clamp_(0, 255)


def _turn_hue(x_CHW: Tensor, turns: float) -> Tensor:
    """The image with its hues moved on around the colour circle; HSV's value and saturation stay.

    Hue runs from 0 to 6. A colour has its largest value where hue is near that colour, its
    smallest opposite, and goes from one to the other between: three ramps of |hue - middle|.
    """
    red, green, blue = x_CHW
    largest, smallest = x_CHW.amax(0), x_CHW.amin(0)
    chroma = largest - smallest
    # Grey pixels get a hue too, which their chroma of zero makes of no effect.
    hue = torch.where(
        largest == red,
        green - blue,
        torch.where(
            largest == green,
            (blue - red).add_(chroma, alpha=2),
            (red - green).add_(chroma, alpha=4),
        ),
    )
    hue = hue.div_(chroma.clamp_min(1e-6)).add_(6 * turns)
    hue -= hue.div(6).floor_().mul_(6)
    ramps = (hue - x_CHW.new_tensor([3.0, 2.0, 4.0])[:, None, None]).abs_()
    ramps[0].sub_(1)
    ramps[1:].neg_().add_(2)
    return ramps.clamp_(0, 1).mul_(chroma).add_(smallest)
