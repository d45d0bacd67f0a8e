"""Routing-probability variance and the tail rule: hand-worked numbers and properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gmoe_ltdr.routing import Modality, place_in_row
from gmoe_ltdr.tail import TailRule, routing_probability_variance, tail_tokens, top_share
from tests.vectors import ABCD, B

MEAN = TailRule()


def rpv(probs) -> torch.Tensor:
    return routing_probability_variance(torch.as_tensor(probs, dtype=torch.float32))


def everything(*shape):
    return torch.ones(shape, dtype=torch.bool)


def test_variance_of_four_experts():
    torch.testing.assert_close(rpv(ABCD), torch.tensor([0, 0.0125, 0.0675, 0.1728]))
    sample = routing_probability_variance(ABCD, unbiased=True)
    torch.testing.assert_close(sample, torch.tensor([0, 0.016667, 0.09, 0.2304]), atol=1e-6, rtol=0)


def test_variance_of_other_expert_counts():
    assert rpv([[0.75, 0.25]]).item() == pytest.approx(0.0625)
    assert rpv([[0.5, 0.3, 0.2]]).item() == pytest.approx(0.015556, abs=1e-6)
    assert rpv([[1.0]]).item() == 0
    for num_experts, maximum in (
        (2, 0.25),
        (4, 0.1875),
        (6, 0.138889),
        (8, 0.109375),
        (64, 0.015381),
    ):
        certain = torch.eye(num_experts)[:1]
        assert rpv(certain).item() == pytest.approx(maximum, abs=1e-6)


def test_variance_of_near_uniform_tokens_survives_float32():
    probs = torch.tensor([[0.001, 0, 0, -0.001]]).softmax(-1)
    assert rpv(probs).item() == pytest.approx(3.125e-8, rel=0.02)


def test_batch_scope_takes_one_mean():
    tail = tail_tokens(rpv(ABCD).view(1, 4), everything(1, 4), MEAN)
    assert tail.tolist() == [[False, False, True, True]]


def test_image_scope_takes_a_mean_per_image():
    tail = tail_tokens(rpv(ABCD).view(2, 2), everything(2, 2), MEAN, scope="image")
    assert tail.tolist() == [[False, True], [False, True]]


def test_rule_does_not_depend_on_the_kind_of_variance():
    sample = routing_probability_variance(ABCD, unbiased=True).view(1, 4)
    assert tail_tokens(sample, everything(1, 4), MEAN).tolist() == [[False, False, True, True]]


def test_text_tokens_never_enter_the_mean():
    # a fifth token equal to D: with it, the mean .08512 would lose C
    values = rpv(torch.cat([ABCD, ABCD[3:]])).view(1, 5)
    vision = torch.tensor([[True, True, True, True, False]])
    assert tail_tokens(values, vision, MEAN).tolist() == [[False, False, True, True, False]]


def test_single_vision_token_is_head():
    assert not tail_tokens(rpv(ABCD[3:]).view(1, 1), everything(1, 1), MEAN).any()


@pytest.mark.parametrize("num_experts", [2, 3, 4, 5, 6, 7, 8, 16, 64])
@pytest.mark.parametrize("num_tokens", [7, 197, 18912])
def test_equal_tokens_have_no_tail(num_experts, num_tokens):
    logits = torch.zeros(num_experts)
    logits[0], logits[1] = 1.3, -0.2
    values = rpv(logits.softmax(-1).expand(num_tokens, -1)).view(1, -1)
    assert not tail_tokens(values, everything(1, num_tokens), MEAN).any()


def test_the_margin_is_what_keeps_equal_tokens_head():
    # the float32 mean of seven equal values may lie below them; strict compares without a margin,
    # against a float64 mean, and a value just above the others stays tail
    values = torch.tensor([[0.1, 0.1, 0.1 + 1e-5]])
    assert tail_tokens(values, everything(1, 3), MEAN).tolist() == [[False, False, True]]
    barely = torch.tensor([[0.1, 0.1, 0.1 + 2e-8]])
    assert not tail_tokens(barely, everything(1, 3), MEAN).any()
    assert tail_tokens(barely, everything(1, 3), TailRule(strict=True)).any()


def test_head_selection_is_the_complement():
    values = rpv(ABCD).view(1, 4)
    rule = TailRule(select="head")
    assert tail_tokens(values, everything(1, 4), rule).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        ("vision", [False, True, True]),
        ("exclude", [False, False, True]),
        ("always_tail", [True, False, True]),
    ],
)
def test_class_token_policies(cls, expected):
    values = rpv([[0.5, 0.5], [0.75, 0.25], [0.2, 0.8]]).view(1, 3)
    is_cls = torch.tensor([[True, False, False]])
    tail = tail_tokens(values, everything(1, 3), TailRule(cls=cls), is_cls_BL=is_cls)
    assert tail.tolist() == [expected]


SCORES = torch.tensor([[0.05, 0.30, 0.10, 0.02, 0.20, 0.08, 0.15, 0.10]])


@pytest.mark.parametrize(("share", "expected"), [(0.15, {1}), (0.25, {1, 4}), (0.375, {1, 4, 6})])
def test_share_by_attention(share, expected):
    rule = TailRule(kind="attention", value=share)
    tail = tail_tokens(torch.zeros(1, 8), everything(1, 8), rule, attention_BL=SCORES)
    assert set(tail[0].nonzero().flatten().tolist()) == expected


def test_share_counts():
    scores = torch.rand(1, 576, generator=torch.Generator().manual_seed(0))
    assert top_share(scores, everything(1, 576), 0.15).sum() == 86
    assert top_share(scores, everything(1, 576), 0.13).sum() == 74
    # ties go to the lower index
    assert top_share(torch.ones(1, 20), everything(1, 20), 0.15)[0, :3].all()


@pytest.mark.parametrize("exporting", [False, True])
def test_places_are_those_of_a_stable_order(exporting, monkeypatch):
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: exporting)
    scores = torch.tensor([[0.5, 0.9, 0.5, -torch.inf, 0.9], [1.0, 1.0, 1.0, 1.0, 1.0]])
    assert place_in_row(scores).tolist() == [[2, 0, 3, 4, 1], [0, 1, 2, 3, 4]]
    assert place_in_row(torch.zeros(2, 0)).shape == (2, 0)
    ties = torch.randint(0, 9, (3, 300), generator=torch.Generator().manual_seed(0)).double()
    by_hand = [sorted(range(300), key=lambda i, row=row: -row[i]) for row in ties.tolist()]
    assert place_in_row(ties).argsort(1).tolist() == by_hand  # Python sorts stably


def test_attention_without_scores_is_an_error():
    with pytest.raises(ValueError, match="attention scores"):
        tail_tokens(torch.zeros(1, 2), everything(1, 2), TailRule(kind="attention"))


def test_quantile_per_image_and_per_batch():
    values = rpv(ABCD).view(2, 2)
    rule = TailRule(kind="quantile", value=0.5)
    assert tail_tokens(values, everything(2, 2), rule).tolist() == [[False, False], [True, True]]
    per_image = tail_tokens(values, everything(2, 2), rule, scope="image")
    assert per_image.tolist() == [[False, True], [False, True]]


def test_absolute_threshold():
    rule = TailRule(kind="threshold", value=0.0675001)
    tail = tail_tokens(rpv(ABCD).view(1, 4), everything(1, 4), rule)
    assert tail.tolist() == [[False, False, False, True]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "median"},
        {"scope": "world"},
        {"eval_scope": "everywhere"},
        {"kind": "threshold"},
        {"kind": "quantile", "value": 0.0},
        {"kind": "attention", "value": 1.5},
        {"kind": "mean", "value": 0.2},
        {"kind": "learned", "value": 1.0},
        {"kind": "none", "value": 0.0},
        {"kind": "quantile", "scope": "ema"},
        {"cls": "ignore"},
    ],
)
def test_impossible_rules_are_refused(wrong):
    with pytest.raises(ValueError, match="TailRule"):
        TailRule(**wrong)


def test_language_may_be_the_candidate():
    assert TailRule(modality="language").candidate_modality == Modality.LANGUAGE


probabilities = st.integers(2, 8).flatmap(
    lambda experts: st.lists(
        st.lists(st.floats(-4, 4), min_size=experts, max_size=experts), min_size=1, max_size=12
    )
)


@settings(max_examples=60, deadline=None)
@given(probabilities)
def test_properties_of_the_mean_rule(rows):
    values = rpv(torch.tensor(rows).softmax(-1)).view(1, -1)
    length = values.shape[1]
    tail = tail_tokens(values, everything(1, length), MEAN)
    assert not tail.all()  # at least one token is head
    if values.max() > values.min() * (1 + 1e-4) + 1e-9:
        assert tail.any()  # unless all are equal, at least one is tail
    # replicating the batch changes nothing
    doubled = tail_tokens(values.repeat(2, 1), everything(2, length), MEAN)
    assert torch.equal(doubled, tail.repeat(2, 1))
    # permuting tokens permutes the answer
    order = torch.randperm(length, generator=torch.Generator().manual_seed(length))
    permuted = tail_tokens(values[:, order], everything(1, length), MEAN)
    assert torch.equal(permuted, tail[:, order])


def test_permuting_experts_changes_no_variance():
    assert rpv([B]).item() == pytest.approx(rpv([B[::-1]]).item())
