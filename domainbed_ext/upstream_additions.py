"""What a DomainBed checkout gets added to, module by module, right after each has run.

Nothing that the checkout has is changed: a name it already has keeps its meaning, and its own
algorithms get their hyper-parameters, splits and networks from its own code. A version of DomainBed
that this does not fit costs one line on stderr, never an import.
"""

from __future__ import annotations

import ast
import functools
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from domainbed_ext.errors import UsageError
from domainbed_ext.hparams import VIT_ALGORITHMS, hparam_names, hparam_pairs, validate_hparams
from domainbed_ext.upstream_job_lock import hold_job, leave_to_others
from domainbed_ext.upstream_programs import (
    datasets_asked_for,
    program,
    records_to_tabulate,
    train_flags,
)

# What the additions need of each module of a checkout.
NEEDED: dict[str, tuple[str, ...]] = {
    "algorithms": ("ALGORITHMS",),
    "hparams_registry": ("_hparams",),
    "datasets": ("DATASETS",),
    "networks": ("Featurizer",),
    "command_launchers": ("REGISTRY",),
}
DIGITS = ("RotatedDigits", "ColoredDigits")
# DomainBed gives "small images" other learning rates, and knows them by name.
_SAME_GRID_AS = {"RotatedDigits": "RotatedMNIST", "ColoredDigits": "ColoredMNIST"}
_DEFAULT_STEPS = 5001

_logger = logging.getLogger(__name__)
_complaints: list[str] = []


class UnknownVersionError(Exception):
    """The checkout lacks something that the additions build on."""


def extend(module: ModuleType) -> None:
    """Adds to one module of a checkout. Running it again changes nothing.

    Raises:
        SystemExit: The job that this process was to run is another's, or done; nothing else.
    """
    name = module.__name__.rpartition(".")[2]
    try:
        lacking = [needed for needed in NEEDED[name] if not hasattr(module, needed)]
        if lacking:
            raise UnknownVersionError(f"{module.__name__} has no {', '.join(lacking)}")
        _EXTENSIONS[name](module)
    except Exception as error:
        _complain(module, error)


def lacking_names(package: Path) -> list[str]:
    """What the additions need and a checkout's files do not define, without importing them."""
    lacking = []
    for module, names in NEEDED.items():
        try:
            tree = ast.parse((package / f"{module}.py").read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            lacking.append(f"domainbed.{module}")
            continue
        defined = {name for statement in tree.body for name in _names_defined_by(statement)}
        lacking += [f"domainbed.{module}.{name}" for name in names if name not in defined]
    return lacking


def _names_defined_by(statement: ast.stmt) -> list[str]:
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _complain(module: ModuleType, error: Exception) -> None:
    if isinstance(error, UsageError):
        _logger.warning("gmoe-ltdr: %s", error)
        return
    reason = (str(error).splitlines() or [""])[0]
    if not isinstance(error, UnknownVersionError):
        reason = f"{type(error).__name__}: {reason}"
    if not _complaints:
        # One line per process: the first reason is usually that of the others.
        _logger.warning(
            "gmoe-ltdr: this DomainBed is a version it does not know (%s, in %s), so not all of "
            "gmoe-ltdr is to be had there; DomainBed itself is as it was. `python -m "
            "domainbed_ext.scripts.sweep` needs no checkout, DOMAINBED_EXT=off ends this message",
            reason,
            getattr(module, "__file__", "an unknown place"),
        )
    _complaints.append(reason)


def _add_algorithms(module: Any) -> None:
    from domainbed_ext.algorithms import get_algorithm_class

    theirs = [name for name in VIT_ALGORITHMS if _is_theirs(module, name)]
    if theirs:
        _logger.warning(
            "gmoe-ltdr: this DomainBed has its own %s, which it keeps", ", ".join(theirs)
        )
    for name in VIT_ALGORITHMS:
        if name not in theirs:
            setattr(module, name, in_checkout(get_algorithm_class(name)))
            _list_name(module.ALGORITHMS, name)


def in_checkout(algorithm_class: Any) -> Any:
    """The algorithm, with a check of its hyper-parameters, which DomainBed does not do."""

    class InCheckout(algorithm_class):
        __doc__ = algorithm_class.__doc__

        def __init__(self, input_shape, num_classes, num_domains, hparams):
            checked = _checked_hparams(algorithm_class.__name__, hparams)
            if algorithm_class.__name__ == "DISTILL":
                _check_teacher(checked)
            super().__init__(input_shape, num_classes, num_domains, checked)

    InCheckout.__name__ = InCheckout.__qualname__ = algorithm_class.__name__
    return InCheckout


def _checked_hparams(algorithm: str, hparams: Mapping[str, Any]) -> dict[str, Any]:
    # A sweep passes the same --hparams to all algorithms: what concerns others is no error here.
    names = hparam_names(algorithm, "PACS")
    lacking = [name for name in names if name not in hparams]
    if lacking:
        raise UsageError(
            f"{algorithm} needs the hparams {', '.join(lacking)}, which this version of "
            "domainbed.hparams_registry does not ask gmoe-ltdr for; pass them all with --hparams"
        )
    others = [name for name in hparams if name not in names]
    if others:
        _logger.warning("%s takes no hparam %s: ignored", algorithm, ", ".join(others))
    own = {name: hparams[name] for name in names}
    if own["weight_averaging"] == "swad":
        raise UsageError(
            f"{algorithm}: weight_averaging='swad' needs the validation loss of each evaluation, "
            "which DomainBed's training does not tell an algorithm; take 'ema', or run `python -m "
            "domainbed_ext.scripts.train`"
        )
    return {**hparams, **validate_hparams(own, algorithm, "PACS")}


def _check_teacher(hparams: Mapping[str, Any]) -> None:
    """Which domains a run tests on, DomainBed does not tell an algorithm, but its flags do."""
    from domainbed_ext.algorithms.distill import check_teacher

    if program() == "train":
        check_teacher(hparams, asdict(train_flags()))


def _add_hparams(module: Any) -> None:
    leave_to_others()
    original = _without_addition(module._hparams)

    @functools.wraps(original)
    def _hparams(algorithm: str, dataset: str, random_seed: Any) -> dict[str, tuple[Any, Any]]:
        hold_job()  # the first thing that train asks for when its flags are read and in order
        if algorithm not in VIT_ALGORITHMS or _is_theirs(
            sys.modules.get("domainbed.algorithms"), algorithm
        ):
            pairs = original(algorithm, _SAME_GRID_AS.get(dataset, dataset), random_seed)
            if dataset in _SAME_GRID_AS:
                # but batches that a domain of digits can fill
                erm = hparam_pairs("ERM", dataset, _as_seed(random_seed))
                pairs = {**pairs, "batch_size": erm["batch_size"]}
            return pairs
        pairs = hparam_pairs(algorithm, dataset, _as_seed(random_seed))
        # DomainBed does not tell an algorithm how long its run is.
        steps = _num_steps(dataset)
        return {**pairs, "schedule_steps": (steps, steps)}

    module._hparams = _hparams


def _as_seed(random_seed: Any) -> int:
    # Versions before November 2020, and SWAD's, hand over a generator instead of a seed.
    if isinstance(random_seed, np.random.RandomState):
        random_seed = random_seed.randint(2**31)
    return int(random_seed)


def _num_steps(dataset: str) -> int:
    datasets = sys.modules.get("domainbed.datasets")
    default = getattr(getattr(datasets, dataset, None), "N_STEPS", _DEFAULT_STEPS)
    return train_flags().steps or default


def _add_datasets(module: Any) -> None:
    from domainbed_ext.datasets import get_dataset_class
    from domainbed_ext.upstream_datasets import (
        EmojiDGIsElsewhere,
        dataset_in_checkout,
        recorded_dataset,
    )

    recorded = records_to_tabulate()
    asked_for = [name for name in datasets_asked_for() if name not in recorded]
    for name in (*DIGITS, *recorded, *asked_for):
        if _is_theirs(module, name):
            continue
        if name in recorded:
            setattr(module, name, recorded_dataset(name, recorded[name]))
        else:
            setattr(module, name, dataset_in_checkout(get_dataset_class(name)))
        _list_name(module.DATASETS, name)
    for name in ("EmojiDG", "EmojiDG6"):
        if not hasattr(module, name):
            setattr(module, name, EmojiDGIsElsewhere)


def _add_featurizer(module: Any) -> None:
    """The 16-pixel digits, for which DomainBed has no network; ERM's here is of the same shape as
    its 28-pixel one."""
    original = _without_addition(module.Featurizer)

    @functools.wraps(original)
    def Featurizer(input_shape, hparams):
        if tuple(input_shape[1:]) == (16, 16):
            from domainbed_ext.networks import SmallConvNet

            return SmallConvNet(input_shape[0])
        return original(input_shape, hparams)

    module.Featurizer = Featurizer


def _add_launchers(module: Any) -> None:
    from domainbed_ext.upstream_launcher import ltdr_local, ltdr_slurm

    module.REGISTRY.setdefault("ltdr_local", ltdr_local)
    module.REGISTRY.setdefault("ltdr_slurm", ltdr_slurm)


def _without_addition(function: Any) -> Any:
    """DomainBed's function, if this one is our wrapper around it."""
    # not __module__, which functools.wraps copies
    ours = getattr(function, "__globals__", {}).get("__name__") == __name__
    return function.__wrapped__ if ours else function


def _list_name(names: list[str], name: str) -> None:
    # The sweep reads the lists for its defaults only, and those stay DomainBed's; the tables read
    # them for what to show, and in which order.
    if name not in names and program() != "sweep":
        names.append(name)


def _is_theirs(module: ModuleType | None, name: str) -> bool:
    """Whether a checkout has that name by itself."""
    found = getattr(module, name, None)
    return found is not None and not str(found.__module__).startswith("domainbed_ext.")


_EXTENSIONS: dict[str, Callable[[ModuleType], None]] = {
    "algorithms": _add_algorithms,
    "hparams_registry": _add_hparams,
    "datasets": _add_datasets,
    "networks": _add_featurizer,
    "command_launchers": _add_launchers,
}
