"""A saved sparse model for DISTILL to learn from, made once."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch

from domainbed_ext.algorithms import get_algorithm_class
from domainbed_ext.hparams import default_hparams
from domainbed_ext.saved_models import save_algorithm

SHAPE, NUM_CLASSES, NUM_DOMAINS = (3, 28, 28), 2, 2
_folder = tempfile.TemporaryDirectory()  # goes with the process


@functools.cache
def untrained_teacher() -> str:
    """The folder of an LTDR model for Debug28 that no step was taken with."""
    torch.manual_seed(1)
    hparams = default_hparams("LTDR", "Debug28")
    teacher = get_algorithm_class("LTDR")(SHAPE, NUM_CLASSES, NUM_DOMAINS, hparams)
    info = {
        "args": {
            **{"algorithm": "LTDR", "dataset": "Debug28", "test_envs": [0], "trial_seed": 0},
            "holdout_fraction": 0.2,
        },
        "model_input_shape": list(SHAPE),
        "model_num_classes": NUM_CLASSES,
        "model_num_domains": NUM_DOMAINS,
        "model_hparams": hparams,
    }
    save_algorithm(Path(_folder.name), teacher, info)
    return _folder.name
