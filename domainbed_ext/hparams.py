"""Hyper-parameters: every algorithm's names, defaults and random draws.

As in DomainBed, a sweep's hparams seed 0 means the defaults and any other seed a random draw, and
each hyper-parameter is drawn from its own generator, seeded by its name. So adding one never
changes the draws of the others. ERM is DomainBed's to the last digit. The ViT algorithms share one
grid among themselves, so that a dense ViT and its sparse twins are tuned alike. Why that grid is
narrower than the one GMoE was published with is told in docs/domainbed.md.

This module needs no torch: the command lines that only read records stay fast.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from domainbed_ext.errors import UsageError
from domainbed_ext.hparam_conflicts import check_together
from domainbed_ext.hparam_draws import (
    Draw,
    HParam,
    always,
    fixed,
    log_uniform,
    one_of,
    power_of_two,
)
from domainbed_ext.hparam_values import check_value, read_json_object
from domainbed_ext.router_hparams import ROUTER_HPARAMS
from domainbed_ext.training_hparams import averaging, erm, speed

# Row order of tables: DomainBed's algorithms in its order, then ours.
UPSTREAM_ALGORITHMS: tuple[str, ...] = tuple(
    "ERM ERMPlusPlus Fish IRM GroupDRO Mixup MLDG CORAL MMD DANN CDANN MTL SagNet ARM VREx RSC SD "
    "ANDMask SANDMask IGA SelfReg Fishr TRM IB_ERM IB_IRM CAD CondCAD Transfer CausIRL_CORAL "
    "CausIRL_MMD EQRM RDM ADRMX URM".split()
)
VIT_ALGORITHMS: tuple[str, ...] = ("ERM_ViT", *ROUTER_HPARAMS)
# What a sweep runs when it is not told which: the paper's question, without the comparison routers.
CORE_ALGORITHMS: tuple[str, ...] = ("ERM", "ERM_ViT", "GMOE", "GMOE_DAR", "GMOE_EEA", "LTDR")
ALGORITHM_ORDER: tuple[str, ...] = UPSTREAM_ALGORITHMS + VIT_ALGORITHMS

SMALL_IMAGES: tuple[str, ...] = (
    "Debug28",
    "RotatedMNIST",
    "ColoredMNIST",
    "RotatedDigits",
    "ColoredDigits",
)

# Learning rate and weight decay of the GMoE recipe; other data sets take PACS's.
BENCHMARK_LR_AND_WEIGHT_DECAY: dict[str, tuple[float, float]] = {
    "PACS": (3e-5, 1e-6),
    "VLCS": (3e-5, 1e-6),
    "OfficeHome": (1e-5, 1e-6),
    "TerraIncognita": (5e-5, 1e-4),
    "DomainNet": (5e-5, 0.0),
}

_FROM_SCRATCH: dict[str, Any] = {
    "pretrained": False,
    "optimizer": "adamw",
    "lr": 1e-3,
    "weight_decay": 0.05,
}
_DIGITS = {
    **_FROM_SCRATCH,
    "backbone": "vit_dim64_patch4_16",
    "batch_size": 32,
    "augmentation": "domainbed",
}
_MNIST = {
    **_FROM_SCRATCH,
    "backbone": "vit_dim64_patch4_28",
    "batch_size": 64,
    "augmentation": "none",
}
_EMOJI = {
    **_FROM_SCRATCH,
    "backbone": "vit_dim128_stem16_64",
    "batch_size": 32,
    "augmentation": "style",
    "schedule": "cosine",
    "warmup_fraction": 0.1,
    "label_smoothing": 0.1,
    "drop_path": 0.1,
    "grad_clip": 1.0,
}
# Where the ViT algorithms start from scratch on small images: what differs from the benchmarks'
# defaults.
SMALL_DATASET_DEFAULTS: dict[str, dict[str, Any]] = {
    "Debug28": {**_MNIST, "batch_size": 8},
    "Debug224": {
        **_FROM_SCRATCH,
        "backbone": "vit_tiny_patch16_224",
        "batch_size": 4,
        "augmentation": "none",
    },
    "RotatedMNIST": _MNIST,
    "ColoredMNIST": _MNIST,
    "RotatedDigits": _DIGITS,
    "ColoredDigits": _DIGITS,
    "EmojiDG": _EMOJI,
    "EmojiDG6": _EMOJI,
}


def registered_hparams(algorithm: str, dataset: str) -> list[HParam]:
    """All hyper-parameters of an algorithm's runs on a data set, in order."""
    if algorithm == "ERM":
        return _erm(dataset)
    if algorithm not in VIT_ALGORITHMS:
        raise UsageError(
            f"unknown algorithm {algorithm!r}{_did_you_mean(algorithm, ('ERM', *VIT_ALGORITHMS))}"
        )
    hparams = _vit(dataset)
    if algorithm in ROUTER_HPARAMS:
        hparams += ROUTER_HPARAMS[algorithm]()
    return hparams


def optional_hparams(algorithm: str, dataset: str) -> list[HParam]:
    """Further ones that an algorithm takes: all of them are in a run for which one is given."""
    return [*averaging(dataset), *erm()] if algorithm == "ERM" else []


def default_hparams(algorithm: str, dataset: str) -> dict[str, Any]:
    """The defaults, which a sweep's hparams seed 0 stands for."""
    return {hparam.name: hparam.default for hparam in registered_hparams(algorithm, dataset)}


def random_hparams(algorithm: str, dataset: str, seed: int) -> dict[str, Any]:
    """A random draw. Training passes `seed_hash(hparams_seed, trial_seed)`, as DomainBed does."""
    return {hparam.name: hparam.random(seed) for hparam in registered_hparams(algorithm, dataset)}


def hparam_pairs(algorithm: str, dataset: str, seed: int) -> dict[str, tuple[Any, Any]]:
    """(default, random value) by name: the form of DomainBed's own registry, for use beside a
    checkout of it.
    """
    return {
        hparam.name: (hparam.default, hparam.random(seed))
        for hparam in registered_hparams(algorithm, dataset)
    }


def hparam_names(algorithm: str, dataset: str) -> list[str]:
    """The keys that --hparams takes for an algorithm."""
    known = registered_hparams(algorithm, dataset) + optional_hparams(algorithm, dataset)
    return [hparam.name for hparam in known]


def with_overrides(
    hparams: Mapping[str, Any], overrides: Mapping[str, Any], algorithm: str, dataset: str
) -> dict[str, Any]:
    """A run's hyper-parameters: the defaults or a draw, then what --hparams changes."""
    optional = {h.name: h.default for h in optional_hparams(algorithm, dataset)}
    further = optional if optional.keys() & overrides.keys() else {}
    return {**hparams, **further, **overrides}


def parse_hparams(json_text: str | None, algorithm: str, dataset: str) -> dict[str, Any]:
    """The overrides given as --hparams, checked.

    Args:
        json_text: A JSON object such as `{"lr": 1e-4, "moe_num_experts": 4}`; None or "" mean none.
        algorithm: The algorithm that is to take them.
        dataset: And on which data set.

    Returns:
        Only what was given. An integer given for a float comes back as a float.
    """
    return validate_hparams(read_json_object(json_text), algorithm, dataset)


def validate_hparams(hparams: Mapping[str, Any], algorithm: str, dataset: str) -> dict[str, Any]:
    """Checks names, types, ranges and combinations; a subset of the names is fine.

    Returns:
        The hyper-parameters, integers given for floats turned into floats.
    """
    known = hparam_names(algorithm, dataset)
    for name in hparams:
        if name not in known:
            raise UsageError(
                f"unknown hparam {name!r} for algorithm {algorithm}{_did_you_mean(name, known)}"
            )
    checked = {name: check_value(name, value) for name, value in hparams.items()}
    check_together(checked)
    return checked


def split_hparams(
    json_text: str | None, algorithms: Sequence[str], dataset: str
) -> dict[str, str | None]:
    """What of --hparams each algorithm of a sweep is to get.

    A key that no algorithm takes is refused; a key that only some take reaches only those. An
    algorithm that takes all keys gets the very text that was given, since the text is part of the
    name of a job's folder.

    Returns:
        For each algorithm the JSON text to pass on, or None when nothing of it concerns the
        algorithm.
    """
    given = read_json_object(json_text)
    takes = {algorithm: set(hparam_names(algorithm, dataset)) for algorithm in algorithms}
    known = sorted(set().union(*takes.values()))
    for name in given:
        if name not in known:
            which = (
                f"algorithm {algorithms[0]}"
                if len(algorithms) == 1
                else f"any of {', '.join(algorithms)}"
            )
            raise UsageError(f"unknown hparam {name!r} for {which}{_did_you_mean(name, known)}")
    texts: dict[str, str | None] = {}
    for algorithm in algorithms:
        own = {name: value for name, value in given.items() if name in takes[algorithm]}
        validate_hparams(own, algorithm, dataset)
        texts[algorithm] = (
            (json_text if len(own) == len(given) else json.dumps(own)) if own else None
        )
    return texts


def order_algorithms(names: Iterable[str]) -> list[str]:
    """Names in the order of table rows: the known ones first, then others as they came."""
    unique = list(dict.fromkeys(names))
    return [name for name in ALGORITHM_ORDER if name in unique] + [
        n for n in unique if n not in ALGORITHM_ORDER
    ]


def _erm(dataset: str) -> list[HParam]:
    small = dataset in SMALL_IMAGES
    if dataset in ("RotatedDigits", "ColoredDigits"):
        # DomainBed's MNIST has batches up to 512; a domain of 1797 digits in six cannot fill those.
        batch_size, draw_batch_size = 64, power_of_two(3, 7.5)
    elif small:
        batch_size, draw_batch_size = 64, power_of_two(3, 9)
    elif dataset == "DomainNet":
        batch_size, draw_batch_size = 32, power_of_two(3, 5)
    else:
        batch_size, draw_batch_size = 32, power_of_two(3, 5.5)
    return [
        fixed("data_augmentation", True),
        fixed("resnet18", False),
        fixed("resnet50_augmix", True),
        fixed("dinov2", False),
        fixed("vit", False),
        fixed("vit_attn_tune", False),
        fixed("freeze_bn", False),
        fixed("lars", False),
        fixed("linear_steps", 500),
        HParam("resnet_dropout", 0.0, one_of(0.0, 0.1, 0.5)),
        HParam("vit_dropout", 0.0, one_of(0.0, 0.1, 0.5)),
        fixed("class_balanced", False),
        fixed("nonlinear_classifier", False),
        HParam(
            "lr",
            1e-3 if small else 5e-5,
            log_uniform(-4.5, -2.5) if small else log_uniform(-5, -3.5),
        ),
        fixed("weight_decay", 0.0) if small else HParam("weight_decay", 0.0, log_uniform(-6, -2)),
        HParam("batch_size", batch_size, draw_batch_size),
    ]


def _vit(dataset: str) -> list[HParam]:
    lr, weight_decay = BENCHMARK_LR_AND_WEIGHT_DECAY.get(
        dataset, BENCHMARK_LR_AND_WEIGHT_DECAY["PACS"]
    )
    hparams = [
        fixed("data_augmentation", True),
        fixed("class_balanced", False),
        fixed("backbone", "deit_small_patch16_224"),
        fixed("pretrained", True),
        fixed("augmentation", "domainbed"),
        fixed("optimizer", "adam"),
        HParam("lr", lr, log_uniform(-5, -4)),
        HParam("weight_decay", weight_decay, log_uniform(-6, -2)),
        HParam("batch_size", 32, power_of_two(3, 5 if dataset == "DomainNet" else 5.5)),
        fixed("schedule", "constant"),
        fixed("schedule_steps", 0),
        fixed("warmup_fraction", 0.0),
        fixed("label_smoothing", 0.0),
        HParam("drop_path", 0.1, one_of(0.0, 0.1, 0.2)),
        fixed("grad_clip", 0.0),
        *averaging(dataset),
        fixed("precision", "fp32"),
        fixed("eval_batch_size", 256),
        *speed(),
        fixed("compile", "none"),
    ]
    overrides = SMALL_DATASET_DEFAULTS.get(dataset)
    if overrides is None:
        return hparams
    # From scratch and decoupled: other scales of both, and batches that a small split can fill.
    draws: dict[str, Draw] = {"lr": log_uniform(-3.5, -2.5), "weight_decay": log_uniform(-3, -1)}
    draws["batch_size"] = (
        always(overrides["batch_size"]) if "Debug" in dataset else power_of_two(4, 6)
    )
    draws["drop_path"] = one_of(0.0, 0.1, 0.2)
    return [
        HParam(hparam.name, value, draws.get(hparam.name, always(value)))
        for hparam in hparams
        for value in [overrides.get(hparam.name, hparam.default)]
    ]


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? Known: " if close else "choose from "
    return f"; {hint}{', '.join(known)}"
