"""From flat hyper-parameters to networks: which backbone, with which weights, how sparse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from domainbed_ext.distributed import current_ranks
from domainbed_ext.errors import UsageError
from gmoe_ltdr import MoESpec, TailRule, preset
from gmoe_ltdr.models import PretrainedWeightsError
from gmoe_ltdr.upcycle import num_prefix_tokens

_SELECTIONS: dict[str, dict[str, Any]] = {
    "vtt": {"kind": "mean"},
    "vht": {"kind": "mean", "select": "head"},
    "vtt_fixed": {"kind": "quantile"},
    "vtt_learned": {"kind": "learned"},
    "iat": {"kind": "attention"},
}

# Fields of a MoESpec, as "moe_..." the hyper-parameters of the algorithms that have a use for them.
_SPEC_HPARAMS = (
    "moe_num_experts",
    "moe_top_k",
    "moe_layers",
    "moe_gate",
    "moe_weighting",
    "moe_noise_std",
    "moe_expert_dropout",
    "moe_capacity_factor",
    "moe_balance_weight",
    "moe_dispatcher",
)


def spec_from_hparams(preset_name: str, hparams: Mapping[str, Any], **further: Any) -> MoESpec:
    """The sparse model that flat hyper-parameters describe.

    Args:
        preset_name: What the hyper-parameters change.
        hparams: Those of the algorithm.
        **further: Fields of the spec that no common hyper-parameter sets, such as `router`;
            `router_options` are added to the preset's.

    Raises:
        UsageError: Values that do not go together.
    """
    changes: dict[str, Any] = {
        name.removeprefix("moe_"): hparams[name] for name in _SPEC_HPARAMS if name in hparams
    }
    if not isinstance(changes["layers"], str):
        changes["layers"] = tuple(changes["layers"])
    if "capacity_factor" in changes:
        changes["capacity_factor"] = changes["capacity_factor"] or None
    options: dict[str, Any] = {}
    try:
        if hparams.get("ltdr_selection") == "expert_choice":
            options.update(_experts_choose(preset_name, hparams))
            preset_name = "ltdr_expert_choice"
        elif "ltdr_selection" in hparams:
            changes["tail_top_k"] = hparams["ltdr_tail_top_k"] or None
            changes["tail_rule"] = _tail_rule(hparams)
        options.update(_choice_options(hparams))
        options.update(further.pop("router_options", {}))
        options = {**preset(preset_name).router_options, **options}
        return preset(preset_name, **{**changes, **further, "router_options": options})
    except ValueError as error:
        raise UsageError(f"hparams: {error}") from error


def _tail_rule(hparams: Mapping[str, Any]) -> TailRule:
    selection = hparams["ltdr_selection"]
    if selection not in _SELECTIONS:
        names = ", ".join((*_SELECTIONS, "expert_choice"))
        raise UsageError(f"hparam ltdr_selection={selection!r} is not one of {names}")
    rule = dict(_SELECTIONS[selection])
    if rule["kind"] in ("quantile", "attention"):
        rule["value"] = hparams["ltdr_selection_fraction"]
    return TailRule(
        scope=hparams["ltdr_tail_scope"], eval_scope=hparams["ltdr_eval_tail_scope"], **rule
    )


def _experts_choose(preset_name: str, hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the router in which experts choose tokens."""
    if preset_name != "ltdr":
        raise UsageError(
            "hparam ltdr_selection='expert_choice' is a variant of LTDR: balance losses and tail "
            "rules have no part in it; use the algorithm LTDR"
        )
    return {
        "scope": hparams["ltdr_tail_scope"],
        "eval_scope": hparams["ltdr_eval_tail_scope"],
    }


def _choice_options(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Options of token choice, where they are not what they are without being named."""
    options: dict[str, Any] = {}
    if hparams.get("ltdr_second_expert", "argmax") != "argmax":
        options["second_expert"] = hparams["ltdr_second_expert"]
    if hparams.get("ltdr_sharpening", "none") != "none":
        options["sharpening"] = hparams["ltdr_sharpening"]
    if hparams.get("ltdr_sharpening_strength"):
        options["sharpening_strength"] = hparams["ltdr_sharpening_strength"]
    return options


def expert_parallel_group(hparams: Mapping[str, Any]) -> ProcessGroup | None:
    """The ranks that share the experts: all, in a distributed run whose dispatcher can."""
    if hparams["moe_dispatcher"] == "local" or current_ranks().size == 1:
        return None
    return torch.distributed.group.WORLD


def timm_arguments(
    input_shape: Sequence[int], num_classes: int, hparams: Mapping[str, Any]
) -> dict[str, Any]:
    """What every backbone is built with."""
    return {
        "pretrained": hparams["pretrained"],
        "num_classes": num_classes,
        "in_chans": input_shape[0],
        "img_size": tuple(input_shape[1:]),
        "drop_path_rate": hparams["drop_path"],
    }


def check_class_token(
    network: nn.Module, hparams: Mapping[str, Any], what: str, *, instead: str = "modality"
) -> None:
    """Refuses a hyper-parameter that `what` begins to describe on a network without class or
    register tokens.
    """
    if not num_prefix_tokens(network):
        raise UsageError(
            f"{what} for the class token, but the blocks of backbone={hparams['backbone']!r} have "
            "neither that nor register tokens; choose one that has (on EmojiDG "
            f"'vit_dim128_stem16_reg1_64'), or {instead!r}"
        )


@contextmanager
def hparams_are_to_blame(hparams: Mapping[str, Any]) -> Iterator[None]:
    """Turn what is wrong with a backbone into one line about the hparams that chose it."""
    try:
        yield
    except PretrainedWeightsError as error:
        raise UsageError(
            f"the pretrained weights of backbone={hparams['backbone']!r} could not be loaded "
            f"({error.reason}); run this once where there is a network and take the cache along "
            "(HF_HOME, or ~/.cache/huggingface), or pass --hparams '{\"pretrained\": false}' to "
            "start from random weights"
        ) from error
    except (ValueError, TypeError, RuntimeError, AssertionError, ImportError) as error:
        raise UsageError(
            f"hparams backbone={hparams['backbone']!r}, pretrained={hparams['pretrained']}: {error}"
        ) from error


def weights_tag(hparams: Mapping[str, Any]) -> str:
    """Name of the weights a run starts from, so that tables do not mix them."""
    if not hparams["pretrained"]:
        return f"{hparams['backbone']}:random"
    from timm.models import get_pretrained_cfg

    cfg = get_pretrained_cfg(hparams["backbone"], allow_unregistered=True)
    tag = getattr(cfg, "tag", None)
    name = hparams["backbone"].split(".")[0]
    return f"{name}.{tag}" if tag else name
