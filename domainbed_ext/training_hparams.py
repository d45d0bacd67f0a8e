"""Hyper-parameters of how a network is trained, whichever algorithm trains it.

The ViT algorithms have them in all runs. ERM is DomainBed's to the last hyper-parameter, so it has
them only in a run that asks for one. What the names mean is said in `hparam_values.py`.
"""

from __future__ import annotations

from domainbed_ext.hparam_draws import HParam, fixed


def averaging(dataset: str) -> list[HParam]:
    return [
        fixed("weight_averaging", "none"),
        fixed("ema_decay", 0.0),
        fixed("swad_n_converge", 3),
        fixed("swad_n_tolerance", 6),
        # as SWAD was published
        fixed("swad_tolerance_ratio", 0.2 if dataset == "VLCS" else 0.3),
        fixed("evaluate_raw", False),
    ]


def speed() -> list[HParam]:
    return [
        fixed("fused_optimizer", "auto"),
        fixed("channels_last", False),
    ]


def erm() -> list[HParam]:
    """What ERM takes beyond DomainBed's."""
    return [fixed("precision", "fp32"), fixed("eval_batch_size", 64), *speed()]
