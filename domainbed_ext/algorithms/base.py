"""What every algorithm is, and the registry of their names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from domainbed_ext.errors import UsageError
from domainbed_ext.hparams import order_algorithms
from domainbed_ext.weight_averaging import RAW, WeightAverage

Minibatches = Sequence[tuple[Tensor, Tensor]]

_ALGORITHMS: dict[str, type[Algorithm]] = {}


def register_algorithm(cls: type[Algorithm]) -> type[Algorithm]:
    """Class decorator: make an algorithm available under its class name."""
    _ALGORITHMS[cls.__name__] = cls
    return cls


def get_algorithm_class(name: str) -> type[Algorithm]:
    """The algorithm of that name.

    Raises:
        UsageError: There is none.
    """
    if name not in _ALGORITHMS:
        raise UsageError(f"unknown algorithm {name!r}; there are {', '.join(_ALGORITHMS)}")
    return _ALGORITHMS[name]


def algorithm_names() -> list[str]:
    """All registered algorithms, in the order of table rows."""
    return order_algorithms(_ALGORITHMS)


class Algorithm(nn.Module):
    """DomainBed's contract, and `prepare` and `diagnostics`, which DomainBed does not call.

    Args:
        input_shape: (C, H, W) of the images.
        num_classes: Number of classes.
        num_domains: Number of training domains.
        hparams: Flat hyper-parameters, see `domainbed_ext.hparams`.

    Attributes:
        weights_tag: Which pretrained weights the model started from; "random" for none.
        average: Set it to average the weights that predict; evaluation mode then deploys it.
    """

    weights_tag = "random"

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        num_domains: int,
        hparams: Mapping[str, Any],
    ):
        super().__init__()
        self.hparams = hparams
        self._arguments = (input_shape, num_classes, num_domains)
        self.average: WeightAverage | None = None

    def prepare(self, environments: Sequence[Iterable[tuple[Tensor, Tensor]]]) -> None:
        """Called once, before the first step of a run. What it finds out belongs into buffers,
        which checkpoints hold.

        Args:
            environments: For each training domain its training images, not augmented, in batches
                (images, labels).
        """

    def update(
        self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None
    ) -> dict[str, float]:
        """One step on one batch per training domain.

        Args:
            minibatches: (images, labels) of each training domain, on the model's device.
            unlabeled: Images of the test domains, for domain adaptation; unused here.

        Returns:
            Numbers to be averaged and recorded.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define update")

    def diagnostics(self) -> dict[str, Any]:
        """What the next record is to hold besides averages of `update`'s numbers: JSON values under
        keys of their own, about the steps since the last record. Called once for each record, on
        all ranks; what it counts belongs into `training_state`. DomainBed does not call it.
        """
        return {}

    def predict(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        raise NotImplementedError(f"{type(self).__name__} does not define predict")

    @property
    def weights_in_evaluation(self) -> str:
        """Whose weights predict in evaluation mode: "raw", or the kind of average there is."""
        return RAW if self.average is None else self.average.weights_in_evaluation

    def train(self, mode: bool = True) -> Algorithm:
        super().train(mode)
        if self.average is not None:
            self.average.deploy_(not mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        with self._trained_weights():
            return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        with self._trained_weights():
            return super().load_state_dict(*args, **kwargs)

    @contextmanager
    def _trained_weights(self) -> Iterator[None]:
        """The trained weights under their own names, in either mode."""
        if self.average is not None:
            self.average.deploy_(False)
        try:
            yield
        finally:
            if self.average is not None:
                self.average.deploy_(not self.training)


def join(minibatches: Minibatches) -> tuple[Tensor, Tensor]:
    """All domains' images and labels as one batch."""
    images, labels = zip(*minibatches, strict=True)
    return torch.cat(images), torch.cat(labels)


def domains_of(minibatches: Minibatches) -> Tensor:
    """Each joined image's place among the training domains, int64 (B,)."""
    _, labels = zip(*minibatches, strict=True)
    return torch.cat([torch.full_like(y, domain) for domain, y in enumerate(labels)])
