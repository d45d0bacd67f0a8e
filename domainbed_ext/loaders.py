"""Batches as a pure function of seed and step.

Batch ``step`` is the same whatever was drawn before and however many workers decode: a run resumes
by asking for ``start_step`` and needs no sampler state. In-memory images are indexed and
transformed as whole batches in this process; image files are decoded by workers, each making
whole batches, which become floats on the device.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from domainbed_ext.datasets.base import EnvSplit, Transform
from domainbed_ext.datasets.file_transforms import FileTransform
from domainbed_ext.decoding_workers import Batch, from_workers
from domainbed_ext.distributed import Ranks
from domainbed_ext.errors import UsageError

_ORDER, _AUGMENTATION = 0, 1  # what a random stream is for


class TrainBatches:
    """Endless augmented training batches of one split.

    Each epoch is a permutation of the split without its incomplete last batch; with weights, each
    batch is drawn independently with replacement instead, as DomainBed does.

    Args:
        split: What to draw from.
        batch_size: Images per batch; must not exceed the split.
        seed: Of the run. Splits with different names draw differently under one seed.
        transform: The data set's train transform.
        num_workers: Processes that decode image files; ignored for in-memory data.
        start_step: The first batch's step.
        weights: A sampling weight per image of the split.
        pin_memory: Have the decoded batches in page-locked memory.
        device: Where batches come out, and in-memory data are transformed; their augmentation draws
            from that device's generator, that of image files from the CPU's.
        share: Part of each batch that comes out; the images are those of the whole batch.
    """

    def __init__(
        self,
        split: EnvSplit,
        *,
        batch_size: int,
        seed: int,
        transform: Transform,
        num_workers: int = 0,
        start_step: int = 0,
        weights: Tensor | None = None,
        pin_memory: bool = False,
        device: str | torch.device = "cpu",
        share: slice = slice(None),
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size={batch_size} is below 1; choose a positive number")
        if len(split) < batch_size:
            raise UsageError(
                f"{split.name} (environment {split.environment.name}) has {len(split)} images, "
                f"fewer than batch_size={batch_size}; pass --hparams "
                f"'{{\"batch_size\": {max(len(split), 1)}}}' or less"
            )
        if weights is not None and len(weights) != len(split):
            raise ValueError(f"{len(weights)} weights for the {len(split)} images of {split.name}")
        self.start_step = start_step
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self._batches = _TrainSteps(split, batch_size, seed, transform, device, weights, share)

    def __iter__(self) -> Iterator[Batch]:
        return _iterate(self._batches, count(self.start_step), self.num_workers, self.pin_memory)


class EvalBatches:
    """Each image of a split once, in order.

    Args:
        split: What to go through.
        batch_size: Images per batch; the last one may be smaller.
        transform: The data set's eval transform.
        num_workers: Processes that decode image files; ignored for in-memory data.
        pin_memory: Have the decoded batches in page-locked memory.
        device: Where batches come out, and in-memory data are transformed.
        ranks: Processes that go through the split together: each takes its part of the images, all
            the same number of batches. Where images do not suffice, a batch is one image with the
            label -1, which counts nowhere.
    """

    def __init__(
        self,
        split: EnvSplit,
        *,
        batch_size: int,
        transform: Transform,
        num_workers: int = 0,
        pin_memory: bool = False,
        device: str | torch.device = "cpu",
        ranks: Ranks | None = None,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"eval_batch_size={batch_size} is below 1; choose a positive number")
        self.split = split
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self._batches = _EvalSteps(split, batch_size, transform, device, ranks or Ranks())

    @property
    def uses_workers(self) -> bool:
        return self.num_workers > 0 and not self.split.environment.in_memory

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return _iterate(self._batches, range(len(self)), self.num_workers, self.pin_memory)


def eval_stream(loaders: Mapping[str, EvalBatches]) -> Iterator[tuple[str, Batch]]:
    """The batches of several splits, one split after the other, each with its split's name.

    The same worker processes decode the images of all splits: they are started once, and the end
    of one split is no pause.
    """
    by_workers = {name: loader for name, loader in loaders.items() if loader.uses_workers}
    for name, loader in loaders.items():
        if name not in by_workers:
            yield from ((name, batch) for batch in loader)
    if by_workers:
        chain = _Chain([loader._batches for loader in by_workers.values()])
        names = list(by_workers)
        num_workers = max(loader.num_workers for loader in by_workers.values())
        pin_memory = any(loader.pin_memory for loader in by_workers.values())
        batches = from_workers(chain, range(len(chain)), num_workers, pin_memory)
        for (part, _), batch in zip(chain.places, batches, strict=True):
            yield names[part], chain.parts[part].finish(batch)


class _Chain:
    """The batches of several splits as those of one."""

    def __init__(self, parts: Sequence[_EvalSteps]) -> None:
        self.parts = parts
        self.places = [
            (number, step) for number, part in enumerate(parts) for step in range(len(part))
        ]

    def __len__(self) -> int:
        return len(self.places)

    def load(self, index: int) -> Batch:
        number, step = self.places[index]
        return self.parts[number].load(step)


class _Steps:
    """Item `step` is a whole batch: what `load` makes of it, in a worker or not, finished here."""

    def __init__(self, split: EnvSplit, transform: Transform, device: str | torch.device) -> None:
        self.split = split
        self.transform = transform
        self.device = device

    def __getitem__(self, step: int) -> Batch:
        return self.finish(self.load(step))

    def load(self, step: int) -> Batch:
        """The batch, of image files on the CPU and as uint8."""
        raise NotImplementedError

    def finish(self, batch: Batch) -> Batch:
        """The batch on the device, as a model sees it."""
        x, y = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        if isinstance(self.transform, FileTransform):
            x = self.transform.normalize(x)
        return x, y

    def _load(
        self, positions: np.ndarray, seed: Sequence[int], share: slice = slice(None)
    ) -> Batch:
        environment = self.split.environment
        keys = self.split.keys[positions]
        y = torch.from_numpy(environment.labels[keys])[share]
        if environment.in_memory:
            generator = torch.Generator(self.device).manual_seed(_mix(seed))
            images = environment.images(keys).to(self.device)
            # all of them, so that a share's images are drawn as those of the whole batch
            return self.transform(images, generator)[share], y.to(self.device)
        read: Callable[[int], Any] = environment.image
        transform = self.transform
        if isinstance(transform, FileTransform):
            read, transform = environment.pixels, transform.pixels
        x = []
        for position, key in list(enumerate(keys))[share]:
            image = read(int(key))
            with _seeded(_mix([*seed, position])):
                x.append(transform(image))
        return torch.stack(x), y


class _TrainSteps(_Steps):
    def __init__(
        self,
        split: EnvSplit,
        batch_size: int,
        seed: int,
        transform: Transform,
        device: str | torch.device,
        weights: Tensor | None,
        share: slice,
    ) -> None:
        super().__init__(split, transform, device)
        self.batch_size = batch_size
        self.share = share
        # Domains of equal size must not be shuffled alike.
        self.seed = (seed, zlib.crc32(split.name.encode("utf-8")))
        self.weights = weights
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def load(self, step: int) -> Batch:
        return self._load(self._positions(step), [*self.seed, _AUGMENTATION, step], self.share)

    def _positions(self, step: int) -> np.ndarray:
        if self.weights is not None:
            generator = torch.Generator().manual_seed(_mix([*self.seed, _ORDER, step]))
            return torch.multinomial(
                self.weights, self.batch_size, replacement=True, generator=generator
            ).numpy()
        epoch, batch = divmod(step, len(self.split) // self.batch_size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_mix([*self.seed, _ORDER, epoch]))
            self._order = torch.randperm(len(self.split), generator=generator).numpy()
            self._epoch = epoch
        return self._order[batch * self.batch_size : (batch + 1) * self.batch_size]


class _EvalSteps(_Steps):
    def __init__(
        self,
        split: EnvSplit,
        batch_size: int,
        transform: Transform,
        device: str | torch.device,
        ranks: Ranks,
    ) -> None:
        super().__init__(split, transform, device)
        self.batch_size = batch_size * ranks.size
        self.ranks = ranks

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def load(self, step: int) -> Batch:
        start = step * self.batch_size
        positions = np.arange(start, min(start + self.batch_size, len(self.split)))
        mine = positions[self.ranks.share(len(positions))]
        if len(mine):
            return self._load(mine, [step])
        x, y = self._load(positions[:1], [step])
        return x, torch.full_like(y, -1)


def _mix(words: Sequence[int]) -> int:
    """A well mixed 64-bit seed out of small, similar numbers."""
    return int(np.random.SeedSequence(list(words)).generate_state(1, np.uint64)[0])


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global CPU generator, which torchvision draws from, seeded for the length of a block.

    Not torch.manual_seed: it would seed the accelerator's generators too and not put them back.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _iterate(
    batches: _Steps, steps: Iterable[int], num_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    if num_workers == 0 or batches.split.environment.in_memory:
        return (batches[step] for step in steps)
    loaded = from_workers(batches, steps, num_workers, pin_memory)
    return (batches.finish(batch) for batch in loaded)
