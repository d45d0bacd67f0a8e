"""Specs: JSON both ways, presets, and what is refused."""

import pytest

from gmoe_ltdr import Modality, MoESpec, TailRule, preset
from gmoe_ltdr.spec import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_json_both_ways(name):
    spec = preset(name, layers=(1, 3))
    assert MoESpec.from_json(spec.to_json()) == spec


def test_defaults_are_ltdr():
    spec = MoESpec()
    assert spec == preset("ltdr")
    assert (spec.num_experts, spec.top_k, spec.resolved_tail_top_k) == (6, 2, 6)
    assert spec.tail_rule == TailRule(kind="mean", scope="batch", eval_scope="image")
    assert spec.balanced_modalities == {Modality.LANGUAGE}
    assert spec.activates_tail


def test_gmoe_is_the_released_recipe():
    spec = preset("gmoe")
    assert (spec.gate, spec.num_experts, spec.top_k) == ("cosine", 6, 1)
    assert (spec.noise_std, spec.capacity_factor, spec.expert_dropout) == (1.0, 1.5, 0.1)
    assert (spec.balance, spec.balance_weight) == ("importance_load_tutel", 0.01)
    assert Modality.VISION in spec.balanced_modalities
    assert not spec.activates_tail
    assert preset("gmoe_dropless").capacity_factor is None


def test_v2_gives_tail_tokens_four_experts_or_twelve():
    assert preset("ltdr_v2_literal").tail_top_k == 4
    assert preset("ltdr_v2_literal", num_experts=4).tail_top_k == 4
    assert preset("ltdr_v2_literal", num_experts=64, top_k=8).tail_top_k == 12
    assert preset("ltdr_v1_literal").router_options == {"balance_scale": "none"}


def test_ablations_differ_from_ltdr_in_one_module():
    assert preset("gmoe_dar").tail_rule.kind == "none"
    assert preset("gmoe_dar").balance == "none"
    assert preset("gmoe_eea").tail_rule == preset("ltdr").tail_rule
    assert preset("gmoe_eea").balance == "importance_load_tutel"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top_k": 8}, "lower top_k or add experts"),
        ({"top_k": 0}, "top_k=0"),
        ({"tail_top_k": 1}, "tail_top_k=1"),
        ({"tail_top_k": 7}, "tail_top_k=7"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"gate": "quadratic"}, "gate='quadratic'"),
        ({"layers": "some"}, "layers='some'"),
        ({"capacity_factor": 0.0}, "None drops nothing"),
        ({"expert_dropout": 1.0}, "expert_dropout"),
        ({"noise_std": -1.0}, "noise_std"),
        ({"balanced_modalities": frozenset({Modality.PADDING})}, "PADDING"),
        ({"router_options": {"balance_scale": "big"}}, "balance_scale"),
        *(
            (
                {"router_options": {"balance_weights": weights}},
                "balance_weights.*language or vision",
            )
            for weights in (
                {"visoin": 0.1},
                {"padding": 1.0},
                {Modality.VISION: 0.1},
                {"vision": -0.1},
                {"vision": "0.1"},
                {"vision": True},
                {"vision": float("nan")},
                {"vision": float("inf")},
                0.1,
                ["vision"],
            )
        ),
        ({"expert_split": 4}, "expert_split=4 does not divide num_experts=6"),
        ({"expert_split": 0}, "expert_split=0"),
        ({"init_scale_shared": 0.5}, "but shared_experts=0"),
        ({"init_scale_shared": -1.0, "shared_experts": 1}, "init_scale_shared=-1.0"),
    ],
)
def test_impossible_specs(wrong, message):
    with pytest.raises(ValueError, match=message):
        MoESpec(**wrong)


@pytest.mark.parametrize("weights", [None, {}, {"vision": 0}, {"vision": 0.001, "Language": 0.01}])
def test_weights_per_modality(weights):
    spec = MoESpec(router_options={"balance_weights": weights})
    assert MoESpec.from_json(spec.to_json()) == spec


def test_unknown_names():
    with pytest.raises(ValueError, match="no preset 'sgmoe'"):
        preset("sgmoe")
    with pytest.raises(ValueError, match="no field num_expert"):
        MoESpec.from_dict({"num_expert": 6})


@pytest.mark.parametrize("layers", [(0, 0), (12,), (-13,), ()])
def test_impossible_layers(layers):
    with pytest.raises(ValueError, match="layers"):
        MoESpec(layers=layers).block_indices(12)
