"""From images to the tensors a model sees, in training and in evaluation.

Images in memory are transformed as whole batches of tensors; every random number comes from the
generator that is passed, each image having its own. Image files are transformed one by one
(`file_transforms`) and draw from torch's global generator, which the loaders seed per image.
Shapes: N images, C channels, H and W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from domainbed_ext.datasets.file_transforms import FileTransform
from domainbed_ext.errors import UsageError

AUGMENTATIONS = ("domainbed", "style", "none")


def get_transforms(
    augmentation: str, input_shape: tuple[int, int, int], *, in_memory: bool
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The transforms of a data set for training and for evaluation.

    Args:
        augmentation: "domainbed": for files DomainBed's crops, flips and colour jitter; in memory
            small shifts, scales and changes of contrast, nothing that turns or mirrors. "style":
            for drawings on white, in memory; strong geometry, filled shapes and outlines turned
            into each other. "none": as in evaluation.
        input_shape: (C, H, W) of what a model sees.
        in_memory: Whether images arrive as uint8 batches (N, C, H, W), with a generator as the
            second argument, or as PIL images one at a time.

    Returns:
        The two transforms. In memory they give values in [-1, 1], for files ImageNet's
        normalisation.

    Raises:
        UsageError: The augmentation is unknown, or not meant for this kind of images.
    """
    if augmentation not in AUGMENTATIONS:
        raise UsageError(
            f"augmentation {augmentation!r} is unknown; choose among {', '.join(AUGMENTATIONS)}"
        )
    size = (input_shape[1], input_shape[2])
    if in_memory:
        augmented: dict[str, Callable[..., Tensor]] = {
            "domainbed": Jitter(size),
            "style": Style(size),
            "none": Plain(size),
        }
        return augmented[augmentation], Plain(size)
    if augmentation == "style":
        raise UsageError(
            "augmentation 'style' is for data sets held in memory, such as EmojiDG; "
            "for image files choose 'domainbed' or 'none'"
        )
    evaluated = FileTransform(size, augmented=False)
    if augmentation == "none":
        return evaluated, evaluated
    return FileTransform(size, augmented=True), evaluated


@dataclass(frozen=True)
class Plain:
    """Scales to [-1, 1], and to another size if need be."""

    size: tuple[int, int]

    def __call__(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        x_NCHW = images.float() / 127.5 - 1
        if tuple(images.shape[-2:]) != self.size:
            x_NCHW = F.interpolate(
                x_NCHW, self.size, mode="bilinear", antialias=True, align_corners=False
            )
        return x_NCHW


@dataclass(frozen=True)
class Jitter:
    """DomainBed's recipe, mildly, for small images of any kind.

    Turning and mirroring are left out: RotatedDigits differ by angle, and a mirrored digit is none.
    """

    size: tuple[int, int]
    scale: float = 0.1
    shift: float = 0.1
    contrast: float = 0.3

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        draw = _Draws(images, generator)
        x_NCHW = images.float() / 127.5 - 1
        zoom = draw.uniform(1 - self.scale, 1 + self.scale)
        zero = torch.zeros_like(zoom)
        row_x = torch.stack([zoom, zero, draw.uniform(-self.shift, self.shift)], 1)
        row_y = torch.stack([zero, zoom, draw.uniform(-self.shift, self.shift)], 1)
        grid = F.affine_grid(
            torch.stack([row_x, row_y], 1), [*images.shape[:2], *self.size], align_corners=False
        )
        x_NCHW = F.grid_sample(x_NCHW, grid, padding_mode="border", align_corners=False)
        mean = x_NCHW.mean((1, 2, 3), keepdim=True)
        factor = _per_pixel(draw.uniform(1 - self.contrast, 1 + self.contrast))
        return (mean + (x_NCHW - mean) * factor).clamp(-1, 1)


@dataclass(frozen=True)
class Style:
    """Another drawing of the same thing, for dark or coloured drawings on white.

    Geometry: turned, mirrored, scaled, sheared, shifted, bent. Style, each with its probability:
    only the edges, grey, black and white, thicker or thinner strokes, blurred, a piece missing.
    All of it works on ink (1 - brightness), whose background is zero, so that nothing has borders.

    Attributes:
        size: Height and width of the result.
        geometry: Factor on all ranges of the geometry.
    """

    size: tuple[int, int]
    geometry: float = 1.4
    edges: float = 0.3
    grey: float = 0.4
    threshold: float = 0.25
    stroke: float = 0.25
    blur: float = 0.2
    erase: float = 0.3

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        # Every number is drawn for every image: whether an image is changed then changes no other.
        draw = _Draws(images, generator)
        ink = self._bend(1 - images.float() / 255, draw)
        low, steep = draw.uniform(0.05, 0.25), draw.uniform(2, 6)
        ink = _apply(draw.chance(self.edges), ink, _edges, low, steep)
        ink = _apply(draw.chance(self.grey), ink, _grey)
        level, steep = draw.uniform(0.2, 0.75), draw.uniform(6, 20)
        ink = _apply(draw.chance(self.threshold), ink, _threshold, level, steep)
        thicker, strength = draw.chance(0.5), draw.uniform(0.3, 1)
        ink = _apply(draw.chance(self.stroke), ink, _change_stroke, thicker, strength)
        ink = _apply(draw.chance(self.blur), ink, _blur)
        centre_y, centre_x = draw.uniform(0, 1), draw.uniform(0, 1)
        half_height, half_width = draw.uniform(0.06, 0.2), draw.uniform(0.06, 0.2)
        box = (centre_y, centre_x, half_height, half_width)
        ink = _apply(draw.chance(self.erase), ink, _erase, *box)
        return 1 - 2 * ink

    def _bend(self, ink: Tensor, draw: _Draws) -> Tensor:
        """One resampling for the affine map, the elastic one and the output size."""
        g = self.geometry
        angle = draw.uniform(-20, 20) * (g * math.pi / 180)
        scale = (draw.uniform(-0.22, 0.22) * g).exp()
        aspect = (draw.uniform(-0.15, 0.15) * g).exp()
        shear = draw.uniform(-0.2, 0.2) * g
        mirror = 1 - 2 * draw.chance(0.5).float()
        shift_x, shift_y = draw.uniform(-0.15, 0.15) * g, draw.uniform(-0.15, 0.15) * g
        cos, sin = angle.cos(), angle.sin()
        wide, high = scale * aspect, scale / aspect
        row_x = torch.stack([mirror * cos * wide, (shear * cos - sin) * wide, shift_x], 1)
        row_y = torch.stack([mirror * sin * high, (shear * sin + cos) * high, shift_y], 1)
        grid_NHW2 = F.affine_grid(
            torch.stack([row_x, row_y], 1), [*ink.shape[:2], *self.size], align_corners=False
        )
        coarse = draw.normal(2, 4, 4) * _per_pixel(draw.uniform(0, 0.06 * g))
        fine = F.interpolate(coarse, self.size, mode="bicubic", align_corners=True)
        return F.grid_sample(ink, grid_NHW2 + fine.permute(0, 2, 3, 1), align_corners=False)


class _Draws:
    """Random numbers for the images of a batch, one each, from one generator."""

    def __init__(self, images: Tensor, generator: Generator) -> None:
        self.n = len(images)
        self.device = images.device
        self.generator = generator

    def uniform(self, low: float, high: float) -> Tensor:
        drawn = torch.rand(self.n, generator=self.generator, device=self.device)
        return low + (high - low) * drawn

    def chance(self, probability: float) -> Tensor:
        return torch.rand(self.n, generator=self.generator, device=self.device) < probability

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.n, *shape, generator=self.generator, device=self.device)


def _per_pixel(values_N: Tensor) -> Tensor:
    return values_N[:, None, None, None]


def _apply(
    chosen_N: Tensor, ink: Tensor, change: Callable[..., Tensor], *arguments_N: Tensor
) -> Tensor:
    """`change` for the chosen images, the others as they are."""
    if ink.is_cuda:  # no wait for the number of the chosen ones
        return torch.where(_per_pixel(chosen_N), change(ink, *arguments_N), ink)
    rows = chosen_N.nonzero().squeeze(1)
    if len(rows):
        ink[rows] = change(ink[rows], *(a[rows] for a in arguments_N)).expand(
            -1, ink.shape[1], -1, -1
        )
    return ink


def _edges(ink: Tensor, low_N: Tensor, steep_N: Tensor) -> Tensor:
    padded = F.pad(ink, (1, 1, 1, 1))
    dx = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    dy = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    strength = (dx.square() + dy.square()).amax(1, keepdim=True).sqrt()
    return ((strength - _per_pixel(low_N)) * _per_pixel(steep_N)).clamp(0, 1)


def _grey(ink: Tensor) -> Tensor:
    return ink.mean(1, keepdim=True)


def _threshold(ink: Tensor, level_N: Tensor, steep_N: Tensor) -> Tensor:
    return ((_grey(ink) - _per_pixel(level_N)) * _per_pixel(steep_N)).sigmoid()


def _change_stroke(ink: Tensor, thicker_N: Tensor, strength_N: Tensor) -> Tensor:
    sign = 1 - 2 * (~_per_pixel(thicker_N)).float()
    grown = sign * F.max_pool2d(sign * ink, 3, stride=1, padding=1)
    return ink + (grown - ink) * _per_pixel(strength_N)


def _blur(ink: Tensor) -> Tensor:
    return F.avg_pool2d(ink, 3, stride=1, padding=1)


def _erase(ink: Tensor, y_N: Tensor, x_N: Tensor, half_height_N: Tensor, half_width_N: Tensor):
    rows = torch.linspace(0, 1, ink.shape[-2], device=ink.device)[:, None]
    columns = torch.linspace(0, 1, ink.shape[-1], device=ink.device)
    inside_y = (rows - _per_pixel(y_N)).abs() < _per_pixel(half_height_N)
    inside_x = (columns - _per_pixel(x_N)).abs() < _per_pixel(half_width_N)
    return ink * ~(inside_y & inside_x)
