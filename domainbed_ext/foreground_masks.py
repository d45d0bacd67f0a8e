"""Masks of what is foreground in an image, as one truth value per token of a ViT."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from domainbed_ext.datasets.base import EnvSplit, FileEnvironment, read_image
from domainbed_ext.errors import UsageError

_SUFFIXES = (".png", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class ForegroundMasks:
    """Mask images in a folder laid out as the data set's: domain/class/name, any lossless format.

    A patch is foreground when more than half of its area is brighter than mid-grey. Masks are
    stretched to the network's square as evaluation images are; class and register tokens are not
    foreground.

    Args:
        folder: Of the masks.
        network: A timm ViT, whose patches and leading tokens count.
    """

    def __init__(self, folder: str | os.PathLike[str], network: nn.Module) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UsageError(f"--masks {self.folder} is no folder")
        embed: Any = network.patch_embed
        self.grid_size = tuple(embed.grid_size)
        self.num_prefix_tokens = int(getattr(network, "num_prefix_tokens", 0))

    def batches(self, split: EnvSplit, batch_size: int) -> Iterator[Tensor]:
        """Bool (B, L) for the images of a split, in order."""
        environment = split.environment
        if not isinstance(environment, FileEnvironment):
            raise UsageError("--masks needs a data set of image files, whose names masks can have")
        for start in range(0, len(split), batch_size):
            keys = split.keys[start : start + batch_size]
            yield torch.stack([self._tokens(environment.paths[int(key)]) for key in keys])

    def _tokens(self, image_path: str) -> Tensor:
        parts = Path(image_path).parts[-3:]
        named = self.folder.joinpath(*parts)
        path = next((p for s in _SUFFIXES if (p := named.with_suffix(s)).is_file()), None)
        if path is None:
            raise UsageError(f"no mask for {image_path}: expected {named.with_suffix('.png')}")
        try:
            mask = read_image(str(path)).convert("L")
        except OSError as error:
            raise UsageError(f"cannot read the mask {path}: {error}") from error
        bright_HW = torch.from_numpy(np.asarray(mask).copy()) > 127
        share = adaptive_avg_pool2d(bright_HW.float()[None, None], self.grid_size).flatten()
        prefix = torch.zeros(self.num_prefix_tokens, dtype=torch.bool)
        return torch.cat([prefix, share > 0.5])
