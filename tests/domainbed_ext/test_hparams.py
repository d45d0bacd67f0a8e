from __future__ import annotations

import json

import pytest
from upstream_checkout import ask_upstream, needs_upstream

from domainbed_ext import hparams as registry
from domainbed_ext.errors import UsageError
from domainbed_ext.hparam_values import VALUES
from domainbed_ext.hparams import (
    SMALL_DATASET_DEFAULTS,
    VIT_ALGORITHMS,
    HParam,
    default_hparams,
    hparam_names,
    hparam_pairs,
    order_algorithms,
    parse_hparams,
    random_hparams,
    registered_hparams,
    split_hparams,
    validate_hparams,
)
from domainbed_ext.table_names import UPSTREAM_ENVIRONMENTS

ALGORITHMS = ("ERM", *VIT_ALGORITHMS)
BENCHMARKS = ("PACS", "VLCS", "OfficeHome", "TerraIncognita", "DomainNet", "folder:/somewhere")
DATASETS = (*BENCHMARKS, *SMALL_DATASET_DEFAULTS)

# Printed by DomainBed b93c22a for ERM on PACS: default_hparams and random_hparams(.., 1).
ERM_PACS = {
    "data_augmentation": True,
    "resnet18": False,
    "resnet50_augmix": True,
    "dinov2": False,
    "vit": False,
    "vit_attn_tune": False,
    "freeze_bn": False,
    "lars": False,
    "linear_steps": 500,
    "resnet_dropout": 0.0,
    "vit_dropout": 0.0,
    "class_balanced": False,
    "nonlinear_classifier": False,
    "lr": 5e-05,
    "weight_decay": 0.0,
    "batch_size": 32,
}
ERM_PACS_SEED_1 = {
    "lr": 2.1013712179831686e-05,
    "weight_decay": 0.00464042443007805,
    "batch_size": 32,
    "resnet_dropout": 0.5,
    "vit_dropout": 0.0,
}


def test_erm_is_domainbeds():
    assert default_hparams("ERM", "PACS") == ERM_PACS
    assert list(default_hparams("ERM", "PACS")) == list(ERM_PACS)
    assert random_hparams("ERM", "PACS", 1) == ERM_PACS | ERM_PACS_SEED_1


def test_erm_takes_small_images_as_domainbed_does():
    for dataset in ("Debug28", "RotatedDigits", "ColoredDigits"):
        assert default_hparams("ERM", dataset)["lr"] == 0.001
        assert default_hparams("ERM", dataset)["batch_size"] == 64


def test_a_domain_of_digits_fills_every_batch_that_is_drawn():
    for algorithm in ALGORITHMS:
        draws = [random_hparams(algorithm, "RotatedDigits", seed) for seed in range(200)]
        assert max(draw["batch_size"] for draw in draws) <= 1797 // 6 * 4 // 5


@pytest.mark.upstream
@needs_upstream
def test_erm_is_upstreams_on_every_data_set_and_many_seeds():
    datasets = list(UPSTREAM_ENVIRONMENTS)
    code = """
from domainbed.hparams_registry import default_hparams, random_hparams
answer = {
    name: [default_hparams("ERM", name), *(random_hparams("ERM", name, s) for s in range(60))]
    for name in question
}
print(json.dumps(answer))
"""
    ours = {
        name: [
            default_hparams("ERM", name),
            *(random_hparams("ERM", name, seed) for seed in range(60)),
        ]
        for name in datasets
    }
    assert ours == ask_upstream(code, datasets)


@pytest.mark.upstream
@needs_upstream
def test_the_order_of_names_is_upstreams():
    code = """
from domainbed import algorithms, datasets
names = datasets.DATASETS
environments = {name: list(datasets.get_dataset_class(name).ENVIRONMENTS) for name in names}
print(json.dumps([algorithms.ALGORITHMS, environments]))
"""
    algorithms, environments = ask_upstream(code, None)
    assert list(registry.UPSTREAM_ALGORITHMS) == algorithms
    assert list(UPSTREAM_ENVIRONMENTS) == list(environments)
    assert {name: list(names) for name, names in UPSTREAM_ENVIRONMENTS.items()} == environments


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_defaults_and_draws_are_possible_and_plain(algorithm, dataset):
    default = default_hparams(algorithm, dataset)
    for hparams in [default, *(random_hparams(algorithm, dataset, seed) for seed in range(20))]:
        assert validate_hparams(hparams, algorithm, dataset) == hparams
        assert json.loads(json.dumps(hparams)) == hparams
        for name, value in hparams.items():
            assert type(value) in (bool, int, float, str)
            assert type(value) is type(default[name])


@pytest.mark.parametrize("algorithm", VIT_ALGORITHMS)
def test_the_dense_vit_and_its_sparse_twins_share_one_grid(algorithm):
    for seed in range(5):
        dense, sparse = (random_hparams(name, "PACS", seed) for name in ("ERM_ViT", algorithm))
        assert dense == {name: sparse[name] for name in dense}


def test_what_upstreams_training_needs_is_there():
    for algorithm in ALGORITHMS:
        names = hparam_names(algorithm, "PACS")
        assert {"data_augmentation", "class_balanced", "batch_size"} <= set(names)


@pytest.mark.parametrize(
    ("dataset", "lr", "weight_decay"),
    [
        ("PACS", 3e-5, 1e-6),
        ("VLCS", 3e-5, 1e-6),
        ("OfficeHome", 1e-5, 1e-6),
        ("TerraIncognita", 5e-5, 1e-4),
        ("DomainNet", 5e-5, 0.0),
        ("manifest:/images.csv", 3e-5, 1e-6),
    ],
)
def test_gmoe_is_the_published_recipe(dataset, lr, weight_decay):
    hparams = default_hparams("GMOE", dataset)
    assert (
        hparams
        | {
            "backbone": "deit_small_patch16_224",
            "pretrained": True,
            "optimizer": "adam",
            "schedule": "constant",
            "augmentation": "domainbed",
            "lr": lr,
            "weight_decay": weight_decay,
            "batch_size": 32,
            "drop_path": 0.1,
            "grad_clip": 0.0,
            "moe_num_experts": 6,
            "moe_top_k": 1,
            "moe_capacity_factor": 1.5,
            "moe_noise_std": 1.0,
            "moe_expert_dropout": 0.1,
            "moe_balance_weight": 0.01,
        }
        == hparams
    )


def test_ltdr_differs_from_gmoe_only_where_it_should():
    gmoe, ltdr = (default_hparams(name, "PACS") for name in ("GMOE", "LTDR"))
    assert {name: ltdr[name] for name in gmoe if gmoe[name] != ltdr[name]} == {
        "moe_top_k": 2,
        "moe_capacity_factor": 0.0,
    }
    assert {name: value for name, value in ltdr.items() if name not in gmoe} == {
        "ltdr_tail_top_k": 0,
        "ltdr_tail_scope": "batch",
        "ltdr_eval_tail_scope": "image",
        "ltdr_selection": "vtt",
        "ltdr_selection_fraction": 0.15,
        "ltdr_second_expert": "argmax",
        "ltdr_sharpening": "none",
        "ltdr_sharpening_strength": 0.0,
        "ltdr_balance": "language",
    }
    assert default_hparams("GMOE_DAR", "PACS") == {n: ltdr[n] for n in gmoe}
    # GMOE_EEA has a balance of its own
    assert default_hparams("GMOE_EEA", "PACS") | {"ltdr_balance": "language"} == ltdr


def test_draws_stay_where_vits_train():
    draws = [random_hparams("LTDR", "PACS", seed) for seed in range(200)]
    assert all(1e-5 <= draw["lr"] <= 1e-4 for draw in draws)
    assert all(8 <= draw["batch_size"] <= 45 for draw in draws)
    assert {draw["moe_num_experts"] for draw in draws} == {4, 6, 8}
    assert {draw["moe_top_k"] for draw in draws} == {1, 2}
    small = [random_hparams("LTDR", "RotatedDigits", seed) for seed in range(200)]
    assert all(10**-3.5 <= draw["lr"] <= 10**-2.5 for draw in small)


def test_a_draw_depends_on_its_own_name_and_the_seed_alone(monkeypatch):
    before = random_hparams("LTDR", "PACS", 3)
    added = HParam("aaa_new", 0.0, lambda random: random.uniform())
    monkeypatch.setattr(
        registry, "_vit", lambda dataset, original=registry._vit: [added, *original(dataset)]
    )
    after = random_hparams("LTDR", "PACS", 3)
    assert after.pop("aaa_new") > 0
    assert after == before


def test_hparam_pairs_are_defaults_and_draws():
    pairs = hparam_pairs("LTDR", "PACS", 7)
    assert {name: pair[0] for name, pair in pairs.items()} == default_hparams("LTDR", "PACS")
    assert {name: pair[1] for name, pair in pairs.items()} == random_hparams("LTDR", "PACS", 7)


def test_every_hyper_parameter_has_a_meaning_and_none_is_left_over():
    used = {
        hparam.name
        for algorithm in ALGORITHMS
        for dataset in DATASETS
        for hparam in registered_hparams(algorithm, dataset)
    }
    assert used == set(VALUES)
    assert all(values.meaning and values.describe() for values in VALUES.values())


def test_parse_returns_only_what_was_given():
    text = '{"moe_num_experts": 4, "moe_top_k": 1, "lr": 1e-4, "moe_layers": [8, 10]}'
    assert parse_hparams(text, "LTDR", "PACS") == {
        "moe_num_experts": 4,
        "moe_top_k": 1,
        "lr": 1e-4,
        "moe_layers": [8, 10],
    }
    assert parse_hparams(None, "LTDR", "PACS") == {}
    assert parse_hparams("  ", "LTDR", "PACS") == {}


def test_an_integer_is_taken_for_a_float():
    parsed = parse_hparams('{"lr": 1, "drop_path": 0}', "LTDR", "PACS")
    assert parsed == {"lr": 1.0, "drop_path": 0.0}
    assert {type(value) for value in parsed.values()} == {float}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"lr": 1', "line 1 column 9.*delimiter"),
        ("{lr: 1}", "line 1 column 2.*double quotes"),
        ("[1, 2]", "not an object"),
        ('{"lr": 1, "lr": 2}', "'lr' twice"),
        ('{"l_r": 1}', "unknown hparam 'l_r' for algorithm LTDR; did you mean 'lr'"),
        ('{"moe_experts": 4}', "did you mean 'moe_num_experts'"),
        ('{"resnet18": true}', "unknown hparam 'resnet18' for algorithm LTDR"),
        ('{"lr": "1e-4"}', "lr='1e-4' is impossible; expected a number above 0"),
        ('{"lr": 0}', "lr=0 is impossible; expected a number above 0"),
        ('{"lr": NaN}', "lr=nan is impossible"),
        ('{"lr": Infinity}', "lr=inf is impossible"),
        ('{"lr": true}', "lr=true is impossible"),
        ('{"lr": null}', "lr=null is impossible"),
        (f'{{"lr": 1{"0" * 400}}}', "is impossible"),
        ('{"batch_size": 8.5}', "batch_size=8.5 is impossible; expected a whole number"),
        ('{"batch_size": 0}', "of at least 1"),
        ('{"pretrained": 1}', "pretrained=1 is impossible; expected true or false"),
        ('{"precision": "fp16"}', 'expected one of "fp32", "bf16"'),
        ('{"backbone": ""}', "expected a name"),
        ('{"drop_path": 1}', "drop_path=1 is impossible.* below 1"),
        ('{"moe_layers": []}', r"a list of different block indices such as \[8, 10\]"),
        ('{"moe_layers": [8, 8]}', "moe_layers"),
        ('{"moe_layers": [-1]}', "moe_layers"),
        ('{"moe_layers": "even"}', "moe_layers='even' is impossible"),
        ('{"moe_num_experts": 4, "moe_top_k": 5}', "moe_top_k=5 exceeds moe_num_experts=4"),
        ('{"moe_num_experts": 4, "ltdr_tail_top_k": 5}', "ltdr_tail_top_k=5 exceeds"),
        ('{"moe_top_k": 2, "ltdr_tail_top_k": 1}', "fewer experts"),
        ('{"ltdr_selection": "expert_choice", "ltdr_tail_scope": "ema"}', "of the 'batch' or of"),
        ('{"ltdr_selection": "expert_choice", "ltdr_tail_top_k": 4}', "has no meaning with"),
        (
            '{"ltdr_selection": "vtt", "ltdr_selection_fraction": 0.2}',
            "0.2 has no meaning with ltdr_selection='vtt'",
        ),
        (
            '{"ltdr_sharpening": "none", "ltdr_sharpening_strength": 1}',
            "has no meaning without ltdr_sharpening",
        ),
    ],
)
def test_bad_hparams_are_refused_in_one_line(text, complaint):
    with pytest.raises(UsageError, match=complaint) as caught:
        parse_hparams(text, "LTDR", "PACS")
    assert "\n" not in str(caught.value)


def test_an_unknown_algorithm_is_refused():
    with pytest.raises(UsageError, match="unknown algorithm 'LTRD'; did you mean 'LTDR'"):
        default_hparams("LTRD", "PACS")


def test_a_sweeps_hparams_reach_those_who_take_them():
    text = '{"lr": 1e-4,   "moe_top_k": 2}'
    split = split_hparams(text, ["ERM", "ERM_ViT", "GMOE"], "PACS")
    # Where all fits the text is untouched, blanks included: it is part of the job's hash.
    assert split == {"ERM": '{"lr": 0.0001}', "ERM_ViT": '{"lr": 0.0001}', "GMOE": text}
    assert split_hparams('{"moe_top_k": 2}', ["ERM", "LTDR"], "PACS")["ERM"] is None
    assert split_hparams(None, ["ERM", "LTDR"], "PACS") == {"ERM": None, "LTDR": None}
    assert split_hparams("{}", ["ERM"], "PACS") == {"ERM": None}


def test_a_sweeps_bad_hparams_are_refused():
    with pytest.raises(UsageError, match="any of ERM, LTDR; did you mean 'moe_top_k'"):
        split_hparams('{"moe_topk": 2}', ["ERM", "LTDR"], "PACS")
    with pytest.raises(UsageError, match="for algorithm ERM"):
        split_hparams('{"moe_top_k": 2}', ["ERM"], "PACS")
    with pytest.raises(UsageError, match="moe_top_k=0"):
        split_hparams('{"moe_top_k": 0}', ["ERM", "LTDR"], "PACS")


def test_rows_come_in_domainbeds_order_then_ours_then_the_rest():
    names = ["Mine", "LTDR", "ERM_ViT", "IRM", "ERM", "LTDR", "Another"]
    assert order_algorithms(names) == ["ERM", "IRM", "ERM_ViT", "LTDR", "Mine", "Another"]
