"""Our data sets in the form that a DomainBed checkout trains on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from domainbed_ext.datasets.base import Environment, Transform
from domainbed_ext.errors import UsageError
from domainbed_ext.records import Record
from domainbed_ext.table_names import environment_names
from domainbed_ext.upstream_programs import train_flags

_logger = logging.getLogger(__name__)


class TransformedEnvironment(Dataset):
    """One domain whose items are (x, y) as a model sees them.

    Args:
        environment: The domain.
        transform: Applied to every item; random numbers come from torch's global generator, which
            DomainBed seeds.
    """

    def __init__(self, environment: Environment, transform: Transform) -> None:
        self.environment = environment
        self.transform = transform

    def __len__(self) -> int:
        return len(self.environment)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.environment.in_memory:
            images = self.environment.images([index])
            x = self.transform(images, torch.default_generator)[0]
        else:
            x = self.transform(self.environment.image(index))
        return x, int(self.environment.labels[index])


def dataset_in_checkout(dataset_class: Any) -> Any:
    """The data set as DomainBed's own are: training domains augmented, test domains not."""

    class InCheckout(dataset_class):
        __doc__ = dataset_class.__doc__

        def __init__(
            self, root: str | None, test_envs: Sequence[int], hparams: Mapping[str, Any]
        ) -> None:
            super().__init__(root, test_envs, hparams)
            environments: list[Environment] = list(self.datasets)
            self.datasets: list[Any] = []
            for number, environment in enumerate(environments):
                trained = number not in test_envs
                if trained:
                    _check_batch_size(environment, hparams["batch_size"])
                transform = self.train_transform if trained else self.eval_transform
                self.datasets.append(TransformedEnvironment(environment, transform))

    InCheckout.__name__ = InCheckout.__qualname__ = dataset_class.__name__
    return InCheckout


def _check_batch_size(environment: Environment, batch_size: int) -> None:
    # DomainBed's loader would look for a whole batch for ever.
    num_images = len(environment) - int(len(environment) * train_flags().holdout_fraction)
    if num_images < batch_size:
        raise UsageError(
            f"environment {environment.name} has {num_images} training images, fewer than "
            f"batch_size={batch_size}; pass --hparams '{{\"batch_size\": {max(num_images, 1)}}}' "
            "or less"
        )


def recorded_dataset(name: str, records: Sequence[Record]) -> type:
    """What tables ask of a data set, as its records say: the images may be on another machine, and
    their folders may have other names by now.

    Args:
        name: Of the data set.
        records: Of its runs.
    """
    try:
        names = environment_names(name, records)
    except UsageError as error:
        _logger.warning("gmoe-ltdr: %s", error)
        named = [(record.get("provenance") or {}).get("environments") for record in records]
        count = max(len(names or ()) for names in named)
        names = [f"env{number}" for number in range(count)]
    return type(name, (_Recorded,), {"ENVIRONMENTS": tuple(names), "__module__": __name__})


class _Recorded:
    def __init__(self, *args: Any) -> None:
        raise UsageError(f"{type(self).__name__} is known from records alone, without images")


_ELSEWHERE = (
    "EmojiDG is split by code point, so that no concept is trained on in one style and tested in "
    "another; DomainBed's own training splits by image and would leak. Run it with `python -m "
    "domainbed_ext.scripts.sweep` (or train), which needs no checkout"
)


class _Refusing(type):
    @property
    def ENVIRONMENTS(cls) -> Sequence[str]:
        """What a sweep asks first, before it starts any job."""
        raise UsageError(_ELSEWHERE)


class EmojiDGIsElsewhere(metaclass=_Refusing):
    """In the place of EmojiDG: says why it is not to be had in a checkout, and where it is."""

    def __init__(self, *args: Any) -> None:
        raise UsageError(_ELSEWHERE)
