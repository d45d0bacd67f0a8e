"""Hyper-parameters that are possible one by one but not side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from domainbed_ext.errors import UsageError
from domainbed_ext.router_hparams import DEFAULT_SELECTION_FRACTION


def check_together(hparams: Mapping[str, Any]) -> None:
    """Refuses values that are possible one by one but not side by side. Looks only at the names
    present.
    """
    num_experts, top_k = hparams.get("moe_num_experts"), hparams.get("moe_top_k")
    tail_top_k = hparams.get("ltdr_tail_top_k")
    if num_experts is not None and top_k is not None and top_k > num_experts:
        raise UsageError(
            f"hparam moe_top_k={top_k} exceeds moe_num_experts={num_experts}; "
            "lower moe_top_k or add experts"
        )
    if tail_top_k and num_experts is not None and tail_top_k > num_experts:
        raise UsageError(
            f"hparam ltdr_tail_top_k={tail_top_k} exceeds moe_num_experts={num_experts}; "
            "lower it, or pass 0 for all"
        )
    if tail_top_k and top_k is not None and tail_top_k < top_k:
        raise UsageError(
            f"hparam ltdr_tail_top_k={tail_top_k} is below moe_top_k={top_k}: "
            "a tail token would get fewer experts than others; raise it, or pass 0 for all experts"
        )
    _check_expert_choice(hparams)
    _check_unused(hparams)
    _check_pool(hparams)
    _check_universal_expert(hparams)
    _check_stages(hparams)
    _check_distillation(hparams)
    _check_engine(hparams)
    _check_averaging(hparams)


def _check_distillation(hparams: Mapping[str, Any]) -> None:
    beta = hparams.get("distill_beta")
    if beta is not None and 0 < beta < 1:
        raise UsageError(
            f"hparam distill_beta={beta} has an infinite gradient where student and teacher agree; "
            "pass 0, or 1 or more"
        )


def _check_expert_choice(hparams: Mapping[str, Any]) -> None:
    if hparams.get("ltdr_selection") != "expert_choice":
        return
    for name in ("ltdr_tail_scope", "ltdr_eval_tail_scope"):
        if hparams.get(name, "batch") not in ("batch", "image"):
            raise UsageError(
                f"hparam {name}={hparams[name]!r}: with ltdr_selection='expert_choice' experts "
                "choose among the tokens of the 'batch' or of each 'image'"
            )
    if hparams.get("ltdr_tail_top_k"):
        raise UsageError(
            f"hparam ltdr_tail_top_k={hparams['ltdr_tail_top_k']} has no meaning with "
            "ltdr_selection='expert_choice', where a token has as many experts as choose it; pass 0"
        )


def _check_unused(hparams: Mapping[str, Any]) -> None:
    """Refuses what would change nothing."""
    fraction, selection = hparams.get("ltdr_selection_fraction"), hparams.get("ltdr_selection")
    is_given = fraction not in (None, DEFAULT_SELECTION_FRACTION)
    if is_given and selection not in (None, "vtt_fixed", "iat"):
        raise UsageError(
            f"hparam ltdr_selection_fraction={fraction} has no meaning with "
            f"ltdr_selection={selection!r}; pass 'vtt_fixed' or 'iat' too, or leave it out"
        )
    strength = hparams.get("ltdr_sharpening_strength")
    if strength and hparams.get("ltdr_sharpening") == "none":
        raise UsageError(
            f"hparam ltdr_sharpening_strength={strength} has no meaning without ltdr_sharpening; "
            "choose one of 'temperature', 'entropy', 'variance', or leave it out"
        )


def _check_pool(hparams: Mapping[str, Any]) -> None:
    initial, most = hparams.get("moe_num_experts"), hparams.get("dynamic_max_experts")
    if initial is not None and most is not None and most < initial:
        raise UsageError(
            f"hparam dynamic_max_experts={most} is below moe_num_experts={initial}, the size of "
            "the pool at the start; raise it, or start with fewer experts"
        )


def _check_universal_expert(hparams: Mapping[str, Any]) -> None:
    num_experts, top_k = hparams.get("moe_num_experts"), hparams.get("moe_top_k")
    if not hparams.get("cluster_universal") or num_experts is None or top_k is None:
        return
    if hparams.get("moe_capacity_factor"):
        raise UsageError(
            f"hparam moe_capacity_factor={hparams['moe_capacity_factor']} would keep images from "
            "the universal expert of cluster_universal=true, which computes every one; leave one "
            "of them out"
        )
    if top_k >= num_experts:
        raise UsageError(
            f"hparam cluster_universal=true leaves {num_experts - 1} of "
            f"moe_num_experts={num_experts} to choose from, fewer than moe_top_k={top_k}; lower "
            "moe_top_k or add experts"
        )


def _check_stages(hparams: Mapping[str, Any]) -> None:
    dense, evolution = hparams.get("evomoe_dense_share"), hparams.get("evomoe_evolution_share")
    if dense is not None and evolution is not None and dense + evolution >= 1:
        raise UsageError(
            f"hparams evomoe_dense_share={dense} and evomoe_evolution_share={evolution} leave no "
            "step to train a router; lower one of them"
        )
    if dense == 0 and hparams.get("evomoe_train_head") is False:
        raise UsageError(
            "hparams evomoe_dense_share=0.0 and evomoe_train_head=false would never train the "
            "classifier; raise the share, or pass true"
        )


def _check_engine(hparams: Mapping[str, Any]) -> None:
    if hparams.get("moe_backend") == "dense" and hparams.get("moe_dispatcher", "local") != "local":
        raise UsageError(
            f"hparam moe_backend='dense' computes all experts on one device, which "
            f"moe_dispatcher={hparams['moe_dispatcher']!r} does not; change one of them"
        )
    if hparams.get("moe_backend") == "dense" and "stgc_threshold" in hparams:
        raise UsageError(
            "hparam moe_backend='dense' computes all tokens with all experts, and STGC compares "
            "the gradients of each expert's own tokens; choose another one, or 'auto'"
        )


def _check_averaging(hparams: Mapping[str, Any]) -> None:
    if hparams.get("weight_averaging") == "swad" and hparams.get("ema_decay"):
        raise UsageError(
            f"hparam ema_decay={hparams['ema_decay']} belongs to weight_averaging='ema', not "
            "'swad'; leave one of them out"
        )
