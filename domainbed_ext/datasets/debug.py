"""Random images: enough to see that code runs, nothing to learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from domainbed_ext.datasets.base import ArrayEnvironment, MultipleDomainDataset

IMAGES_PER_ENVIRONMENT = 16


class Debug(MultipleDomainDataset):
    """Three environments of 16 random images in two classes; the same ones every time."""

    N_STEPS = 301
    DEFAULT_AUGMENTATION = "none"
    ENVIRONMENTS = ("0", "1", "2")
    INPUT_SHAPE: ClassVar[tuple[int, int, int]]

    def __init__(
        self, root: str | None, test_envs: Sequence[int], hparams: Mapping[str, Any]
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (IMAGES_PER_ENVIRONMENT, *self.INPUT_SHAPE)
        environments = []
        for name in self.ENVIRONMENTS:
            images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            labels = torch.randint(0, 2, (IMAGES_PER_ENVIRONMENT,), generator=generator)
            environments.append(ArrayEnvironment(name, images, labels.numpy()))
        super().__init__(
            environments,
            ("0", "1"),
            input_shape=self.INPUT_SHAPE,
            test_envs=test_envs,
            hparams=hparams,
        )


class Debug28(Debug):
    """Random images of 28 x 28 pixels."""

    INPUT_SHAPE = (3, 28, 28)


class Debug224(Debug):
    """Random images of 224 x 224 pixels."""

    INPUT_SHAPE = (3, 224, 224)
