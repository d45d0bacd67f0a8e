"""MoESpec: one description of a sparse model, and the named presets.

A spec travels as JSON: it is stored in every checkpoint and built from flat hyper-parameters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from gmoe_ltdr.routing import Modality
from gmoe_ltdr.tail import TailRule

_CHOICES: dict[str, tuple[str, ...]] = {
    "gate": ("cosine", "linear"),
    "weighting": ("renormalize", "raw", "softmax_of_probs"),
    "balance": ("none", "switch", "importance_load", "importance_load_tutel"),
    "dispatcher": ("local", "all_to_all", "tutel", "auto"),
}
_LAYER_NAMES = ("gmoe", "every_other", "last_two")

# What `router_options` may hold for every router; a router adds its own.
OPTIONS = {
    "balance_scale": ("experts", "none"),
    "balance_count": ("first", "all"),
    "balance_scope": ("rank", "global"),  # whose tokens are counted in distributed training
    "balance_weights": None,  # {"vision": 0.001, "language": 0.01}
}


@dataclass(frozen=True)
class MoESpec:
    """Which layers are sparse, how their router decides and what training adds to the loss.

    The defaults are LTDR in a vision model.

    Attributes:
        router: A name in `available_routers()`.
        num_experts: Experts per layer.
        layers: "gmoe" (the last two even blocks: 8 and 10 of 12), "every_other" (0, 2, 4, ...),
            "last_two", or block indices.
        gate: Scorer of the experts.
        top_k: Experts per ordinary token.
        tail_top_k: Experts per tail token; None is all of them, `top_k` switches EEA off.
        tail_rule: Which tokens are tail tokens.
        weighting: "renormalize" divides the chosen probabilities by their sum, "raw" takes them as
            they are (LTDR v1 Eq. 12), "softmax_of_probs" is v2's Eq. 12. A token with one expert
            keeps its raw probability in every mode, or its router would get no gradient.
        noise_std: Gate noise in training, divided by `num_experts`.
        expert_dropout: Between the two linear layers of an expert, in training.
        capacity_factor: None drops nothing.
        balance: Which balance loss; see `gmoe_ltdr.losses`.
        balanced_modalities: Whose tokens it looks at. LTDR balances language only, so a plain ViT
            has nothing to balance.
        balance_weight: Weight of the balance loss, summed over layers.
        expert_split: Into how many pieces the dense network is split: each expert has a hidden
            width of 1 / expert_split of it (fine-grained experts, DeepSeekMoE). Upcycled, the
            pieces of one network sum to it.
        shared_experts: Experts of full width that every token uses with weight 1, without a router.
        init_scale_shared: What an upcycled shared expert's output is multiplied by. At 1 it is the
            dense network's, and the routed experts' comes on top.
        dispatcher: How tokens reach their experts; see `gmoe_ltdr.dispatch.create_dispatcher`.
        router_options: Further options of the router and its losses, by name.

    Raises:
        ValueError: A value that cannot be; the message says which and what to do.
    """

    router: str = "token_choice"
    num_experts: int = 6
    layers: str | tuple[int, ...] = "gmoe"
    gate: Literal["cosine", "linear"] = "cosine"
    top_k: int = 2
    tail_top_k: int | None = None
    tail_rule: TailRule = field(default_factory=TailRule)
    weighting: Literal["renormalize", "raw", "softmax_of_probs"] = "renormalize"
    noise_std: float = 1.0
    expert_dropout: float = 0.1
    capacity_factor: float | None = None
    balance: Literal["none", "switch", "importance_load", "importance_load_tutel"] = "switch"
    balanced_modalities: frozenset[Modality] = frozenset({Modality.LANGUAGE})
    balance_weight: float = 0.01
    expert_split: int = 1
    shared_experts: int = 0
    init_scale_shared: float = 1.0
    dispatcher: Literal["local", "all_to_all", "tutel", "auto"] = "local"
    router_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}"
                )
        if isinstance(self.layers, str):
            if self.layers not in _LAYER_NAMES:
                raise ValueError(
                    f"layers={self.layers!r} is not one of {', '.join(_LAYER_NAMES)} "
                    "or a tuple of block indices"
                )
        else:
            object.__setattr__(self, "layers", tuple(int(i) for i in self.layers))
        object.__setattr__(
            self, "balanced_modalities", frozenset(Modality(m) for m in self.balanced_modalities)
        )
        if self.num_experts < 1:
            raise ValueError(f"num_experts={self.num_experts} must be at least 1")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} must lie between 1 and num_experts={self.num_experts}; "
                "lower top_k or add experts"
            )
        if self.tail_top_k is not None and not self.top_k <= self.tail_top_k <= self.num_experts:
            raise ValueError(
                f"tail_top_k={self.tail_top_k} must lie between top_k={self.top_k} and "
                f"num_experts={self.num_experts}; None means all experts"
            )
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(
                f"capacity_factor={self.capacity_factor} must be positive; None drops nothing"
            )
        if not 0 <= self.expert_dropout < 1:
            raise ValueError(f"expert_dropout={self.expert_dropout} must lie in [0, 1)")
        if self.expert_split < 1 or self.num_experts % self.expert_split:
            raise ValueError(
                f"expert_split={self.expert_split} does not divide num_experts={self.num_experts}: "
                "the pieces would make no whole networks"
            )
        if self.init_scale_shared != 1 and not self.shared_experts:
            raise ValueError(
                f"init_scale_shared={self.init_scale_shared} scales shared experts, but "
                "shared_experts=0"
            )
        for name in ("noise_std", "balance_weight", "shared_experts", "init_scale_shared"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if Modality.PADDING in self.balanced_modalities:
            raise ValueError("balanced_modalities must not hold PADDING: padding is in no loss")
        for name, allowed in OPTIONS.items():
            value = self.router_options.get(name)
            if value is not None and allowed is not None and value not in allowed:
                raise ValueError(
                    f"router_options[{name!r}]={value!r} is not one of {', '.join(allowed)}"
                )
        _check_balance_weights(self.router_options.get("balance_weights"))

    @property
    def resolved_tail_top_k(self) -> int:
        return self.num_experts if self.tail_top_k is None else self.tail_top_k

    @property
    def activates_tail(self) -> bool:
        """Whether tail tokens get more experts than others (EEA on)."""
        return self.tail_rule.kind != "none" and self.resolved_tail_top_k > self.top_k

    def block_indices(self, depth: int) -> tuple[int, ...]:
        """The sparse blocks of a model with `depth` blocks, ascending.

        Raises:
            ValueError: An index outside the model, or one named twice.
        """
        if self.layers == "gmoe":
            return tuple(range(0, depth, 2))[-2:]
        if self.layers == "every_other":
            return tuple(range(0, depth, 2))
        if self.layers == "last_two":
            return tuple(range(max(depth - 2, 0), depth))
        assert not isinstance(self.layers, str)  # the names are dealt with above
        indices = tuple(i + depth if i < 0 else i for i in self.layers)
        if not indices or len(set(indices)) != len(indices):
            raise ValueError(f"layers={self.layers} must name at least one block, and each once")
        if min(indices) < 0 or max(indices) >= depth:
            raise ValueError(f"layers={self.layers}: the model has blocks 0 to {depth - 1}")
        return tuple(sorted(indices))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["tail_rule"] = asdict(self.tail_rule)
        values["layers"] = self.layers if isinstance(self.layers, str) else list(self.layers)
        values["balanced_modalities"] = sorted(m.name.lower() for m in self.balanced_modalities)
        values["router_options"] = dict(self.router_options)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MoESpec:
        """The inverse of `to_dict`.

        Raises:
            ValueError: A key that a spec does not have.
        """
        values = dict(values)
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"MoESpec has no field {', '.join(sorted(unknown))}")
        if isinstance(values.get("tail_rule"), Mapping):
            values["tail_rule"] = TailRule(**values["tail_rule"])
        if "balanced_modalities" in values:
            values["balanced_modalities"] = frozenset(
                Modality[m.upper()] if isinstance(m, str) else Modality(m)
                for m in values["balanced_modalities"]
            )
        if isinstance(values.get("layers"), list):
            values["layers"] = tuple(values["layers"])
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> MoESpec:
        return cls.from_dict(json.loads(text))


def _check_balance_weights(weights: Any) -> None:
    if weights is None:
        return
    names = [m.name.lower() for m in Modality if m is not Modality.PADDING]
    if not isinstance(weights, Mapping) or not all(
        isinstance(name, str)
        and name.lower() in names
        and isinstance(weight, (int, float))
        and not isinstance(weight, bool)
        and 0 <= weight < math.inf
        for name, weight in weights.items()
    ):
        raise ValueError(
            f"router_options['balance_weights']={weights!r} must give {' or '.join(names)} tokens "
            "a weight that is not negative, as in {'vision': 0.001, 'language': 0.01}"
        )


_VISION_TOO = frozenset({Modality.LANGUAGE, Modality.VISION})
_NO_TAIL = TailRule(kind="none")

# Table 6: one shared expert and routed ones, of which so many are active that a token uses two
# networks' width in all. Raw weights and a balance loss over all choices, as in DeepSeekMoE.
_DEEPSEEK: dict[str, Any] = {
    "tail_rule": _NO_TAIL,
    "weighting": "raw",
    "balanced_modalities": _VISION_TOO,
    "shared_experts": 1,
    "router_options": {"balance_count": "all"},
}

# Table 11: vision and language tokens have experts of their own, in equal numbers.
_GROUPS: dict[str, Any] = {
    "router": "groups",
    "num_experts": 4,
    "top_k": 1,
    "tail_rule": _NO_TAIL,
    "balanced_modalities": _VISION_TOO,
}
_GROUPS_DAR: dict[str, Any] = {**_GROUPS, "router_options": {"balanced_groups": "second"}}

# Every preset as what it changes in the defaults. Sources: routing of GMoE's released code; LTDR
# (arXiv 2507.01351) v1 and v2 read literally; ablations of its table 3 and of v2's additions.
_PRESETS: dict[str, dict[str, Any]] = {
    "ltdr": {},
    "ltdr_v1_literal": {"weighting": "raw", "router_options": {"balance_scale": "none"}},
    "ltdr_v2_literal": {"weighting": "softmax_of_probs"},
    "gmoe": {
        "top_k": 1,
        "tail_rule": _NO_TAIL,
        "capacity_factor": 1.5,
        "balance": "importance_load_tutel",
        "balanced_modalities": _VISION_TOO,
    },
    "gmoe_dropless": {
        "top_k": 1,
        "tail_rule": _NO_TAIL,
        "balance": "importance_load_tutel",
        "balanced_modalities": _VISION_TOO,
    },
    # LTDR's two modules, each alone, against the same two-expert baseline
    "gmoe_dar": {"tail_rule": _NO_TAIL, "balance": "none"},
    "gmoe_eea": {"balance": "importance_load_tutel", "balanced_modalities": _VISION_TOO},
    # table 3, with text: the baseline balances all tokens and activates nothing more
    "baseline": {"tail_rule": _NO_TAIL, "balanced_modalities": _VISION_TOO},
    "dar": {"tail_rule": _NO_TAIL},
    "eea": {"balanced_modalities": _VISION_TOO},
    "no_language_balance": {
        "tail_rule": _NO_TAIL,
        "balanced_modalities": frozenset({Modality.VISION}),
    },
    "no_balance": {"tail_rule": _NO_TAIL, "balance": "none"},
    "swapped": {
        "tail_rule": TailRule(modality="language"),
        "balanced_modalities": frozenset({Modality.VISION}),
    },
    "reduced_balance": {
        "tail_rule": _NO_TAIL,
        "balanced_modalities": _VISION_TOO,
        "router_options": {"balance_weights": {"vision": 0.001, "language": 0.01}},
    },
    # comparison routers
    "dynamic": {
        "router": "dynamic",
        "num_experts": 8,
        "top_k": 1,
        "tail_rule": _NO_TAIL,
        "noise_std": 0.0,
        "balance": "none",
        "router_options": {"initial_experts": 6},
    },
    "evomoe": {
        "router": "dtr",
        "num_experts": 4,
        "top_k": 1,
        "tail_rule": _NO_TAIL,
        "noise_std": 0.0,
        "balanced_modalities": _VISION_TOO,
        "balance_weight": 0.001,
    },
    # v2, table XVII: "LTDR + Dynamic"
    "ltdr_expert_choice": {"router": "expert_choice", "tail_rule": _NO_TAIL},
    # table 6, named as there: number x width of the shared and of the routed experts
    "deepseek_1x1.0+3x1.0": {**_DEEPSEEK, "num_experts": 3, "top_k": 1},
    "deepseek_1x1.0+12x0.25": {**_DEEPSEEK, "num_experts": 12, "top_k": 4, "expert_split": 4},
    "deepseek_1x1.0+16x0.25": {**_DEEPSEEK, "num_experts": 16, "top_k": 4, "expert_split": 4},
    # table 11, named as there, DAR upon its first row: experts and top-k of vision and of text
    "groups_v2Top1-t2Top1": _GROUPS,
    "groups_v4Top2-t4Top2": {**_GROUPS, "num_experts": 8, "top_k": 2, "expert_split": 2},
    "groups_v2Top1-t2Top1-DAR": _GROUPS_DAR,
    "groups_v2Top1-t2Top1-DAR-shared": {**_GROUPS_DAR, "shared_experts": 1},
}

PRESETS = tuple(_PRESETS)


def preset(name: str, **overrides: Any) -> MoESpec:
    """A named specification; `overrides` replace single fields.

    Args:
        name: One of `PRESETS`: "ltdr", "gmoe", "gmoe_dropless", "ltdr_v1_literal",
            "ltdr_v2_literal", "gmoe_dar", "gmoe_eea", the ablations with text, and the settings of
            comparison routers.

    Raises:
        ValueError: No such preset.
    """
    if name not in _PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    values = {**_PRESETS[name], **overrides}
    if name == "ltdr_v2_literal" and "tail_top_k" not in overrides:
        spec = MoESpec(**values)
        # v2: four experts for tail tokens, twelve where there are 64
        values["tail_top_k"] = max(
            spec.top_k, min(spec.num_experts, 12 if spec.num_experts >= 64 else 4)
        )
    return MoESpec(**values)
