"""What every data set is made of: environments, their splits, and DomainBed's data set contract.

An `Environment` holds all images of one domain and no augmentation: that belongs to the loader, so
that validation images are never augmented. N images, C channels, H x W pixels.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from domainbed_ext.errors import UsageError
from domainbed_ext.seeds import seed_hash
from domainbed_ext.splits import split_dataset

if TYPE_CHECKING:
    from PIL import Image

    from domainbed_ext.datasets.image_cache import CachedImages

# In-memory data: (uint8 NCHW, generator) -> float NCHW. File images: PIL image -> float CHW; a
# FileTransform is applied in its two halves.
Transform = Callable[..., Tensor]


class Environment(Dataset):
    """All images of one domain.

    Attributes:
        name: What tables and messages call it.
        labels: int64, one per image.
        in_memory: Whether whole batches come from `images`; otherwise single ones from `image`.
        eval_transform: What `env[i]` applies, set by the data set that owns the environment.
    """

    in_memory: ClassVar[bool]

    def __init__(self, name: str, labels: Sequence[int] | np.ndarray) -> None:
        self.name = name
        self.labels = np.asarray(labels, dtype=np.int64)
        self.eval_transform: Transform | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """uint8 batch (N, C, H, W); in-memory environments only."""
        raise TypeError(f"environment {self.name} reads its images one by one; use image(index)")

    def image(self, index: int) -> Image.Image:
        """Decoded RGB image; environments that are not in memory only."""
        raise TypeError(f"environment {self.name} is in memory; use images(indices)")

    def pixels(self, index: int) -> np.ndarray:
        """The same as a uint8 array (H, W, 3)."""
        return np.array(self.image(index))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.eval_transform is None:
            raise RuntimeError(f"environment {self.name} belongs to no data set yet")
        if self.in_memory:
            x = self.eval_transform(self.images([index]), torch.Generator())[0]
        else:
            x = self.eval_transform(self.image(index))
        return x, int(self.labels[index])


class ArrayEnvironment(Environment):
    """A domain whose images lie in memory, or in a memory-mapped file, as one array."""

    in_memory = True

    def __init__(
        self,
        name: str,
        images: np.ndarray | Tensor,
        labels: Sequence[int] | np.ndarray,
        *,
        size: int | None = None,
    ) -> None:
        """Takes uint8 images (N, C, H, W); `size` is the side they are handed out with."""
        super().__init__(name, labels)
        stored = torch.as_tensor(images)
        if stored.dtype != torch.uint8 or stored.dim() != 4 or len(stored) != len(self.labels):
            raise ValueError(
                f"environment {name}: expected uint8 images (N, C, H, W) for {len(self.labels)} "
                f"labels, got {stored.dtype} {tuple(stored.shape)}"
            )
        self.size = size or stored.shape[-1]
        # Shrink once; enlarge per batch, or 224 pixels would cost twelve times the memory of 64.
        self._images = resize_images(stored, self.size) if self.size < stored.shape[-1] else stored

    def images(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        batch = self._images[torch.as_tensor(np.asarray(indices, dtype=np.int64))].contiguous()
        return resize_images(batch, self.size)


class FileEnvironment(Environment):
    """A domain whose images are files, decoded when they are asked for.

    Attributes:
        paths: The files.
        cache: Where decoded images are looked up first; see `image_cache`.
    """

    in_memory = False

    def __init__(self, name: str, paths: Sequence[str], labels: Sequence[int] | np.ndarray) -> None:
        super().__init__(name, labels)
        self.paths = list(paths)
        self.cache: CachedImages | None = None

    def image(self, index: int) -> Image.Image:
        if self.cache is not None:
            image = self.cache.image(index)
            if image is not None:
                return image
        path = self.paths[index]
        try:
            return read_image(path)
        except OSError as error:
            reason = str(error) if os.path.exists(path) else "it does not exist"
            raise UsageError(
                f"cannot read the image {path} (environment {self.name}): {reason}; "
                "replace or remove it"
            ) from error

    def pixels(self, index: int) -> np.ndarray:
        """Out of the cache where there is one."""
        cached = None if self.cache is None else self.cache.pixels(index)
        return super().pixels(index) if cached is None else cached


def read_image(path: str) -> Image.Image:
    """A file's image in RGB; an OSError says what is wrong with the file."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    # Broken PNG chunks are a SyntaxError, broken TIFFs a ValueError.
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(str(error)) from error


def resize_images(images: Tensor, size: int) -> Tensor:
    """Square uint8 images (N, C, H, W) at another side length, with antialiasing."""
    if images.shape[-1] == size:
        return images
    return interpolate(images, size=(size, size), mode="bicubic", antialias=True)


@dataclass(frozen=True, eq=False)
class EnvSplit:
    """Part of an environment: the images at `keys`, in that order.

    Attributes:
        environment: The whole domain.
        keys: int64 indices into it.
        name: As in the records' keys, e.g. "env0_in".
    """

    environment: Environment
    keys: np.ndarray
    name: str

    @property
    def labels(self) -> np.ndarray:
        return self.environment.labels[self.keys]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.environment[int(self.keys[index])]


def data_fingerprint(environments: Sequence[Environment], class_names: Sequence[str]) -> str:
    """A hash of the images per domain and class, names included: 16 hex digits."""
    counts = [
        [
            environment.name,
            dict(
                zip(
                    class_names,
                    np.bincount(environment.labels, minlength=len(class_names)).tolist(),
                    strict=True,
                )
            ),
        ]
        for environment in environments
    ]
    text = json.dumps(counts, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def file_order(environments: Sequence[Environment]) -> str | None:
    """A hash of the files' names in the order that splits and batches count in, wherever they are:
    16 hex digits; None for data in memory.
    """
    digest = hashlib.sha256()
    for environment in environments:
        if not isinstance(environment, FileEnvironment):
            return None
        # the class and the file: a data set may move
        names = ["/".join(path.rsplit(os.sep, 2)[-2:]) for path in environment.paths]
        digest.update("\n".join([environment.name, *names, ""]).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def balanced_weights(split: EnvSplit) -> Tensor:
    """A sampling weight per image so that every class of the split is drawn equally often."""
    _, inverse, counts = np.unique(split.labels, return_inverse=True, return_counts=True)
    return torch.from_numpy(1.0 / (counts[inverse] * len(counts)))


def backbone_image_size(hparams: Mapping[str, Any]) -> int | None:
    """The image side a backbone's name asks for: 224 in "deit_small_patch16_224", else None."""
    name = str(hparams.get("backbone") or "").split(".")[0]
    match = re.search(r"_(\d{2,4})$", name)
    return int(match.group(1)) if match else None


class MultipleDomainDataset:
    """A list of environments with the same classes, in DomainBed's form.

    Subclasses keep DomainBed's constructor ``(root, test_envs, hparams)`` and class attributes.

    Attributes:
        datasets: The environments, in the order that `test_envs` indexes.
        input_shape: (C, H, W) that the transforms produce.
        num_classes: Number of classes.
        class_names: Their names, by label.
        train_transform, eval_transform: See `Transform`.
        image_side: The shorter side that images were reduced to; None where they were not.
    """

    N_STEPS: ClassVar[int] = 5001
    CHECKPOINT_FREQ: ClassVar[int] = 100
    N_WORKERS: ClassVar[int] = 0
    ENVIRONMENTS: ClassVar[Sequence[str]] = ()
    INPUT_SHAPE: ClassVar[tuple[int, int, int] | None] = None
    DEFAULT_AUGMENTATION: ClassVar[str] = "domainbed"  # where hparams do not say
    image_side: int | None = None

    def __init__(
        self,
        environments: Sequence[Environment],
        class_names: Sequence[str],
        *,
        input_shape: tuple[int, int, int],
        test_envs: Sequence[int],
        hparams: Mapping[str, Any],
    ) -> None:
        from domainbed_ext.datasets.transforms import get_transforms

        self.datasets = list(environments)
        self.class_names = list(class_names)
        self.num_classes = len(self.class_names)
        self.input_shape = input_shape
        self._check_test_envs(test_envs)
        if hparams.get("data_augmentation", True):
            augmentation = str(hparams.get("augmentation", self.DEFAULT_AUGMENTATION))
        else:
            augmentation = "none"
        self.train_transform, self.eval_transform = get_transforms(
            augmentation, input_shape, in_memory=self.datasets[0].in_memory
        )
        for environment in self.datasets:
            environment.eval_transform = self.eval_transform

    def __getitem__(self, index: int) -> Environment:
        return self.datasets[index]

    def __len__(self) -> int:
        return len(self.datasets)

    def _check_test_envs(self, test_envs: Sequence[int]) -> None:
        for env in test_envs:
            if not 0 <= env < len(self.datasets):
                listing = ", ".join(f"{i} {e.name}" for i, e in enumerate(self.datasets))
                raise UsageError(
                    f"test environment {env} is out of range for {type(self).__name__}; "
                    f"choose among {listing}"
                )

    def fingerprint(self) -> str:
        """16 hex digits that differ when the number of images of any domain and class does.

        Reduced images are other data: their side is appended, as in "0123456789abcdef-256px".
        """
        reduced = "" if self.image_side is None else f"-{self.image_side}px"
        return data_fingerprint(self.datasets, self.class_names) + reduced

    @functools.cached_property
    def file_order(self) -> str | None:
        """See the function: what a run depends on beyond the `fingerprint`."""
        return file_order(self.datasets)

    def splits(
        self,
        env: int,
        *,
        holdout_fraction: float,
        trial_seed: int,
        uda_holdout_fraction: float = 0.0,
        test_envs: Sequence[int] = (),
    ) -> dict[str, EnvSplit]:
        """DomainBed's splits of one environment: "in", "out" and, where asked for, "uda".

        Args:
            env: Index of the environment.
            holdout_fraction: Part of the images that goes to "out".
            trial_seed: Changes the split.
            uda_holdout_fraction: Part of a test environment's "in" that goes to "uda".
            test_envs: Which environments are tested on.
        """
        _check_fraction("holdout_fraction", holdout_fraction)
        keys = np.arange(len(self.datasets[env]))
        seed = seed_hash(trial_seed, env)
        out, in_ = split_keys(keys, int(len(keys) * holdout_fraction), seed)
        parts = {"in": in_, "out": out}
        return self._named_splits(env, parts, uda_holdout_fraction, trial_seed, test_envs)

    def _named_splits(
        self,
        env: int,
        parts: dict[str, np.ndarray],
        uda_holdout_fraction: float,
        trial_seed: int,
        test_envs: Sequence[int],
    ) -> dict[str, EnvSplit]:
        _check_fraction("uda_holdout_fraction", uda_holdout_fraction)
        if env in test_envs and uda_holdout_fraction > 0:
            num_uda = int(len(parts["in"]) * uda_holdout_fraction)
            uda, in_ = split_keys(parts["in"], num_uda, seed_hash(trial_seed, env))
            parts = {**parts, "in": in_, "uda": uda}
        return {
            name: EnvSplit(self.datasets[env], keys, f"env{env}_{name}")
            for name, keys in parts.items()
        }


def split_keys(keys: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """DomainBed's random split applied to keys that may themselves be part of a split."""
    first, second = split_dataset(range(len(keys)), n, seed)
    return keys[np.asarray(first.keys, dtype=np.int64)], keys[np.asarray(second.keys, np.int64)]


def _check_fraction(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise UsageError(f"{name}={value} is not a fraction; choose a number from 0 to below 1")
