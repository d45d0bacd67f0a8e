"""Weight averaging: a run's predictions from the mean of many steps' weights instead of the last.

    ema     an exponential moving average over the whole run
    swad    the plain mean over one stretch of it, from where the validation loss stops falling to
            where it has risen (Cha et al. 2021, arXiv 2102.08604)

An average lives beside the weights that are trained. In evaluation mode the two change places, so
that whatever an algorithm does to predict, it does with the average; in training mode they are
back. A state dict holds both, each always under its own name. docs/weight_averaging.md says which
record holds which number.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from domainbed_ext.distributed import current_ranks
from domainbed_ext.loss_valley import LossValley
from gmoe_ltdr.sharding import gather_tensors, shard_tensors

RAW = "raw"  # weights that are not averaged
DEFAULT_EMA_DECAY = 0.999


def averaging_kind(hparams: Mapping[str, Any]) -> str:
    """ "none", "ema" or "swad". A decay alone has always meant "ema"."""
    kind = str(hparams.get("weight_averaging", "none"))
    return "ema" if kind == "none" and hparams.get("ema_decay", 0.0) > 0 else kind


def create_average(
    modules: Mapping[str, nn.Module], hparams: Mapping[str, Any]
) -> WeightAverage | None:
    """The average that hyper-parameters ask for, of the modules that make the predictions."""
    kind = averaging_kind(hparams)
    if kind == "ema":
        return ExponentialAverage(modules, decay=hparams.get("ema_decay") or DEFAULT_EMA_DECAY)
    if kind == "swad":
        options = ("n_converge", "n_tolerance", "tolerance_ratio")
        return ValleyAverage(modules, LossValley(*(hparams[f"swad_{name}"] for name in options)))
    return None


class WeightAverage(nn.Module):
    """An average of the parameters and buffers of some modules, and the switch between both.

    What is no floating-point number is not averaged: of that, the average has the latest value.

    Args:
        modules: By name. Their tensors are exchanged; the modules stay where they are.

    Attributes:
        averaged: Copies of the modules, which hold the average or, while it is deployed, the
            trained weights.
    """

    kind: ClassVar[str]

    def __init__(self, modules: Mapping[str, nn.Module]):
        super().__init__()
        trained = nn.ModuleDict(modules)
        self._trained = [trained]  # a list, to be no part of the state
        self.averaged = copy.deepcopy(trained).requires_grad_(False)
        self._is_deployed = self._is_withheld = False

    @property
    def ready(self) -> bool:
        """Whether there is an average to predict with."""
        raise NotImplementedError

    @property
    def module(self) -> nn.Module:
        """The copy of the module "network", for what changes its weights by hand between steps."""
        return self.averaged["network"]

    @property
    def weights_in_evaluation(self) -> str:
        """Whose weights an evaluation sees at this point of the run: "raw", "ema" or "swad"."""
        return self.kind if self.ready and not self._is_withheld else RAW

    def update(self) -> None:
        """Called after each step of the optimizer."""
        raise NotImplementedError

    def deploy_(self, wanted: bool) -> None:
        """Have the modules hold the average, if there is one; or else the trained weights."""
        wanted = wanted and self.weights_in_evaluation != RAW
        if wanted == self._is_deployed:
            return
        pairs = zip(_tensors_of(self._trained[0]), _tensors_of(self.averaged), strict=True)
        # a tensor made in inference mode could not be trained any more
        with torch.inference_mode(False):
            for trained, averaged in pairs:
                trained.data, averaged.data = averaged.data, trained.data
        self._is_deployed = wanted

    @contextmanager
    def withheld(self) -> Iterator[None]:
        """Evaluations inside see the trained weights, whatever average there is."""
        self._is_withheld = True
        try:
            yield
        finally:
            self._is_withheld = False

    def _trained_tensors(self) -> list[Tensor]:
        if self._is_deployed:
            raise RuntimeError(
                "weights are averaged while they train; call train() before update()"
            )
        return _tensors_of(self._trained[0])


class ExponentialAverage(WeightAverage):
    """Exponential moving average whose memory grows with the run, so that early steps fade.

    Args:
        modules: See `WeightAverage`.
        decay: What remains of the average in a step, once (1 + n) / (10 + n) has reached it.
    """

    kind = "ema"

    def __init__(self, modules: Mapping[str, nn.Module], *, decay: float):
        super().__init__(modules)
        self.decay = decay
        self.num_averaged = 0

    @property
    def ready(self) -> bool:
        return self.num_averaged > 0

    def update(self) -> None:
        n = self.num_averaged
        weight = 1 - min(self.decay, (1 + n) / (10 + n)) if n else 1.0
        _move_towards(_tensors_of(self.averaged), self._trained_tensors(), weight)
        self.num_averaged += 1

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.num_averaged)

    def set_extra_state(self, state: Tensor) -> None:
        self.num_averaged = int(state)


@dataclass
class Stretch:
    """The mean of the weights after some steps in a row.

    Attributes:
        tensors: The means, in the order of the modules' tensors.
        steps: The first step to the one behind the last.
    """

    tensors: list[Tensor]
    steps: range

    def take(self, tensors: Sequence[Tensor]) -> None:
        """One step more."""
        _move_towards(self.tensors, tensors, 1 / (len(self.steps) + 1))
        self.steps = range(self.steps.start, self.steps.stop + 1)

    def __add__(self, later: Stretch) -> Stretch:
        steps = range(self.steps.start, later.steps.stop)
        tensors = [tensor.clone() for tensor in self.tensors]
        _move_towards(tensors, later.tensors, len(later.steps) / len(steps))
        return Stretch(tensors, steps)


class ValleyAverage(WeightAverage):
    """SWAD: the mean over every step of the window that `LossValley` finds.

    There is no average before `finish`. `observe` has to be told the validation loss of the trained
    weights at every evaluation, which DomainBed's own training loop does not do.
    """

    kind = "swad"

    def __init__(self, modules: Mapping[str, nn.Module], valley: LossValley):
        super().__init__(modules)
        self.valley = valley
        self.steps = range(0)  # that are averaged, once finished
        self._num_steps = 0
        self._since_evaluation: Stretch | None = None

    @property
    def ready(self) -> bool:
        return len(self.steps) > 0

    def update(self) -> None:
        tensors, step = self._trained_tensors(), self._num_steps
        if self._since_evaluation is None:
            first = [tensor.detach().clone() for tensor in tensors]
            self._since_evaluation = Stretch(first, range(step, step + 1))
        else:
            self._since_evaluation.take(tensors)
        self._num_steps += 1

    def observe(self, loss: float) -> None:
        """Take the validation loss after the steps since the last evaluation."""
        assert self._since_evaluation is not None
        self.valley.observe(loss, self._since_evaluation)
        self._since_evaluation = None

    def finish(self) -> None:
        """The run is over, or the window: from here on there is an average."""
        stretch = self.valley.result()
        _move_towards(_tensors_of(self.averaged), stretch.tensors, 1.0)
        self.steps = stretch.steps

    def describe(self) -> str:
        """The finished average, in a sentence."""
        what = f"SWAD: the mean of the weights after steps {self.steps[0]} to {self.steps[-1]}"
        if self.valley.threshold is None:
            return f"{what}, the last ones, since the validation loss has not converged"
        return f"{what}; the threshold was a validation loss of {self.valley.threshold:.6g}"

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.steps.start, self.steps.stop])

    def set_extra_state(self, state: Tensor) -> None:
        self.steps = range(*state.tolist())

    def training_state(self) -> dict[str, Any]:
        """What a resumed run needs besides the state dict. All ranks that share experts call it."""
        valley = self.valley
        return {
            "num_steps": self._num_steps,
            "since_evaluation": self._described(self._since_evaluation),
            "threshold": valley.threshold,
            "window": self._described(valley.window),
            "beyond": self._described(valley.beyond),
            "num_beyond": valley.num_beyond,
            "recent": [[loss, self._described(stretch)] for loss, stretch in valley.recent],
        }

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Puts back what `training_state` gave, on any number of ranks."""
        valley = self.valley
        self._num_steps = state["num_steps"]
        self._since_evaluation = self._stretch_of(state["since_evaluation"])
        valley.threshold = state["threshold"]
        valley.window = self._stretch_of(state["window"])
        valley.beyond = self._stretch_of(state["beyond"])
        valley.num_beyond = state["num_beyond"]
        valley.recent = [(loss, self._stretch_of(described)) for loss, described in state["recent"]]

    def _described(self, stretch: Stretch | None) -> dict[str, Any] | None:
        if stretch is None:
            return None
        tensors = dict(zip(_names_of(self.averaged), stretch.tensors, strict=True))
        return {
            "start": stretch.steps.start,
            "stop": stretch.steps.stop,
            "tensors": gather_tensors(tensors, self.averaged),
        }

    def _stretch_of(self, described: Mapping[str, Any] | None) -> Stretch | None:
        if described is None:
            return None
        saved = shard_tensors(described["tensors"], self.averaged)
        likes = dict(zip(_names_of(self.averaged), _tensors_of(self.averaged), strict=True))
        tensors = [saved[name].to(like.device, copy=True) for name, like in likes.items()]
        return Stretch(tensors, range(described["start"], described["stop"]))


@torch.no_grad()
def renew_batch_norm_(algorithm: nn.Module, batches: Iterable[Tensor]) -> None:
    """Measure again what BatchNorm layers know of their inputs, under the weights that predict.

    The means of weights see other activations than the weights did, so the mean of their statistics
    is not the statistics of the mean. Layers that are kept in evaluation mode are left alone;
    without any other, no batch is taken.

    Args:
        algorithm: In training mode, and left in it.
        batches: Images to `predict`.
    """
    layers = [
        module
        for name, module in algorithm.named_modules()
        if isinstance(module, _BatchNorm)
        and module.training
        and module.track_running_stats
        and not name.startswith("average.")
    ]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    algorithm.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean over all batches
        layer.train()
    for x in batches:
        algorithm.predict(x)  # type: ignore[operator]
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        if current_ranks().size > 1:
            for statistic in (layer.running_mean, layer.running_var):
                assert statistic is not None
                torch.distributed.all_reduce(statistic)
                statistic.div_(current_ranks().size)
    algorithm.train()


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _names_of(module: nn.Module) -> list[str]:
    named = chain(module.named_parameters(), module.named_buffers())
    return [name for name, _ in named]


@torch.no_grad()
def _move_towards(averages: Sequence[Tensor], values: Sequence[Tensor], weight: float) -> None:
    """averages += weight * (values - averages), in place. Whole numbers, and buffers that have
    another shape by now, are taken as they are."""
    pairs = list(zip(averages, values, strict=True))
    mixed = [(a, v) for a, v in pairs if a.is_floating_point() and a.shape == v.shape]
    taken = [(a, v) for a, v in pairs if not a.is_floating_point() or a.shape != v.shape]
    if mixed:
        torch._foreach_lerp_([a for a, _ in mixed], [v for _, v in mixed], weight)
    for average, value in taken:
        average.data = value.detach().clone()
