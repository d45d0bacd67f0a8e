"""Capacity: slots, who keeps them, and what dropping leaves behind."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gmoe_ltdr import MoE, MoESpec, collect_routing, preset
from gmoe_ltdr.capacity import expert_capacity, limit_as_specified, limit_to_capacity
from gmoe_ltdr.losses import balance_loss, load_balancing_loss
from gmoe_ltdr.routers.token_choice import route
from gmoe_ltdr.routing import Modality, TokenContext
from gmoe_ltdr.tail import TailRule
from tests.vectors import logits, vision

NO_TAIL = TailRule(kind="none")


def decide(probs, top_k, **kwargs):
    probs = torch.as_tensor(probs)
    options = {"tail_top_k": top_k, "tail_rule": NO_TAIL, "weighting": "renormalize", **kwargs}
    return route(logits(probs), vision(1, len(probs)), top_k=top_k, **options)


@pytest.mark.parametrize(
    ("arguments", "convention", "slots"),
    [
        ((4, 2, 1, 1.0), "tutel", 2),
        ((4, 2, 1, 1.5), "tutel", 3),
        ((18912, 6, 1, 1.5), "tutel", 4728),
        ((3, 3, 2, 1.0), "tutel", 2),
        ((10, 4, 2, 1.5), "deepspeed", 8),
        ((10, 4, 2, 2.0), "deepspeed", 10),
        ((3, 3, 2, 0.5), "deepspeed", 1),
        ((10, 4, 2, 1.0), "vmoe", 8),
    ],
)
def test_slots(arguments, convention, slots):
    assert expert_capacity(*arguments, convention=convention) == slots


def slots_by_hand(num_tokens, num_experts, top_k, factor, convention) -> int:
    """The three conventions in Python's own arithmetic."""
    if convention == "tutel":
        return top_k * int(factor * math.ceil(num_tokens / num_experts))
    slots = math.ceil(num_tokens / num_experts * top_k * factor)
    return slots if convention == "deepspeed" else math.ceil(slots / 4) * 4


@pytest.mark.parametrize("convention", ["tutel", "vmoe", "deepspeed"])
def test_slots_are_exact_for_any_number_of_tokens(convention):
    num_tokens = torch.cat([torch.arange(1200), torch.tensor([12608, 18912, 100_001, 2**31 + 7])])
    for num_experts in (1, 3, 4, 6, 49):
        for top_k, factor in ((1, 1.5), (2, 1.0), (2, 1.25), (3, 0.7), (1, 1.1)):
            found = expert_capacity(num_tokens, num_experts, top_k, factor, convention=convention)
            expected = [
                slots_by_hand(n, num_experts, top_k, factor, convention)
                for n in num_tokens.tolist()
            ]
            assert found.dtype == torch.int64
            assert found.tolist() == expected


@pytest.mark.gpu
@pytest.mark.parametrize("convention", ["tutel", "vmoe", "deepspeed"])
def test_slots_are_counted_on_the_gpu_and_nobody_waits(convention):
    spec = preset("gmoe", router_options={"capacity_convention": convention})
    num_tokens = torch.arange(20_000)
    on_gpu = num_tokens.cuda()
    plan = route(
        torch.randn(394, 6).cuda(),
        vision(2, 197).cuda(),
        top_k=1,
        tail_top_k=1,
        tail_rule=NO_TAIL,
        weighting="raw",
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = expert_capacity(on_gpu, 49, 2, 1.1, convention=convention)
        limited = limit_as_specified(plan, spec, training=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = expert_capacity(num_tokens, 49, 2, 1.1, convention=convention)
    assert torch.equal(found.cpu(), expected)
    assert limited.tokens_per_expert_E.max() <= slots_by_hand(394, 6, 1, 1.5, convention)


def test_impossible_capacities():
    with pytest.raises(ValueError, match="capacity_factor=0"):
        expert_capacity(10, 2, 1, 0.0)
    assert expert_capacity(1, 4, 1, 0.1, convention="deepspeed", min_capacity=4) == 4


@pytest.mark.parametrize("convention", ["tutel", "vmoe", "deepspeed"])
def test_of_no_token_none_is_kept(convention):
    assert expert_capacity(0, 4, 1, 1.0, convention=convention) == 0
    spec = preset("gmoe", router_options={"capacity_convention": convention})
    for modality_BL in (vision(0, 5), vision(2, 0), torch.full((1, 3), int(Modality.PADDING))):
        layer = MoE(8, 16, spec, context_of=lambda x, m=modality_BL: TokenContext(m))
        x = torch.randn(*modality_BL.shape, 8, requires_grad=True)
        with collect_routing(layer) as routings:
            out = layer(x)
        assert out.shape == x.shape
        assert (out == 0).all()
        loss = out.sum() + balance_loss(routings, spec)
        loss.backward()
        assert loss.item() == 0
        assert (x.grad == 0).all()


FOUR = [[0.6, 0.4], [0.9, 0.1], [0.7, 0.3], [0.8, 0.2]]


@pytest.mark.parametrize(
    ("capacity", "prioritised", "kept"),
    [(2, False, {0, 1}), (2, True, {1, 3}), (3, False, {0, 1, 2}), (3, True, {1, 2, 3})],
)
def test_who_keeps_a_slot(capacity, prioritised, kept):
    limited = limit_to_capacity(decide(FOUR, 1), capacity, prioritised=prioritised)
    assert set(limited.dispatch_mask_TE[:, 0].nonzero().flatten().tolist()) == kept
    # dropped tokens leave the layer as zero; kept ones have their old weight
    dropped = [t for t in range(4) if t not in kept]
    assert limited.combine_weights_TE[dropped].sum() == 0
    assert limited.requested_mask_TE.sum() == 4


@pytest.mark.parametrize(("num_padding", "kept"), [(0, 2), (8, 2), (9, 2)])
def test_padding_makes_no_room(num_padding, kept):
    spec = MoESpec(num_experts=2, top_k=1, tail_rule=NO_TAIL, capacity_factor=1.0)
    modality_BL = torch.tensor([[Modality.VISION] * 4 + [Modality.PADDING] * num_padding])
    plan = route(
        logits([[0.6, 0.4]] * (4 + num_padding)),
        modality_BL,
        top_k=1,
        tail_top_k=1,
        tail_rule=NO_TAIL,
        weighting="raw",
    )
    limited = limit_as_specified(plan, spec, training=True)
    assert limited.dispatch_mask_TE.sum() == kept
    assert not limited.dispatch_mask_TE[4:].any()


def test_a_vit_keeps_what_gmoe_keeps():
    """Without padding the slots are those of all tokens: 1 * int(1.5 * ceil(394 / 6)) = 99."""
    spec = preset("gmoe")
    logits_TE = torch.randn(394, 6, generator=torch.Generator().manual_seed(0))
    logits_TE[:, 0] += 1.0
    plan = route(
        logits_TE,
        vision(2, 197),
        top_k=1,
        tail_top_k=1,
        tail_rule=NO_TAIL,
        weighting=spec.weighting,
    )
    limited = limit_as_specified(plan, spec, training=True)
    by_hand = limit_to_capacity(plan, 99)
    assert plan.tokens_per_expert_E.max() > 99
    assert limited.tokens_per_expert_E.max() == 99
    assert torch.equal(limited.dispatch_mask_TE, by_hand.dispatch_mask_TE)
    assert torch.equal(limited.combine_weights_TE, by_hand.combine_weights_TE)


THREE = [[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.7, 0.1, 0.2]]


@pytest.mark.parametrize(
    ("prioritised", "kept"),
    [(False, [[1, 1], [1, 1], [0, 1]]), (True, [[1, 1], [0, 1], [1, 1]])],
)
def test_first_choices_are_served_first(prioritised, kept):
    plan = decide(THREE, 2)
    limited = limit_to_capacity(plan, 2, prioritised=prioritised)
    order = plan.logits_TE.argsort(descending=True, stable=True)[:, :2]
    assert limited.dispatch_mask_TE.gather(1, order).int().tolist() == kept


def test_deepspeed_renormalises_after_dropping():
    plan = decide([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.7, 0.2, 0.1]], 2)
    assert load_balancing_loss(plan).item() == pytest.approx(1.8)
    limited = limit_to_capacity(plan, 2, prioritised=False, renormalize=True)
    expected = [[0.666667, 0.333333, 0], [0.555556, 0.444444, 0], [0, 0, 0]]
    torch.testing.assert_close(
        limited.combine_weights_TE, torch.tensor(expected), atol=1e-6, rtol=0
    )
    assert load_balancing_loss(limited).item() == pytest.approx(1.8)  # counted before dropping
    only_first = limit_to_capacity(plan, 1, prioritised=False, renormalize=True)
    assert only_first.dispatch_mask_TE.any(1).tolist() == [True, False, False]


def test_tutel_keeps_weights_as_they_were():
    plan = decide(THREE, 2)
    limited = limit_to_capacity(plan, 1)
    kept = limited.dispatch_mask_TE
    assert torch.equal(limited.combine_weights_TE[kept], plan.combine_weights_TE[kept])


def test_extra_choices_of_tail_tokens_come_last():
    # token 1 is tail and wants both experts; token 0's first choice is served before its second
    plan = decide(
        [[0.45, 0.55], [0.9, 0.1]], 1, tail_top_k=2, tail_rule=TailRule(), weighting="raw"
    )
    assert plan.experts_per_token_T.tolist() == [1, 2]
    limited = limit_to_capacity(plan, 1)
    assert limited.dispatch_mask_TE.tolist() == [[False, True], [True, False]]


def test_a_drawn_second_expert_is_a_second_choice():
    # token 0 draws expert 2, its last by probability; token 1's second is expert 2 as well
    gumbel = torch.tensor([[0.0, 0.0, 9.0], [0.0, 0.0, 0.0]])
    plan = decide([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4]], 2, gumbel_TE=gumbel)
    assert plan.dispatch_mask_TE.tolist() == [[True, False, True]] * 2
    limited = limit_to_capacity(plan, 1, prioritised=False)
    # both are second choices, so the earlier token keeps the slot
    assert limited.dispatch_mask_TE.tolist() == [[True, False, True], [False, False, False]]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(2, 6), st.integers(0, 8), st.booleans(), st.integers(0, 99))
def test_capacity_is_never_exceeded_and_monotone(tokens, experts, capacity, prioritised, seed):
    generator = torch.Generator().manual_seed(seed)
    plan = route(
        torch.randn(tokens, experts, generator=generator),
        vision(1, tokens),
        top_k=min(2, experts),
        tail_top_k=experts,
        tail_rule=TailRule(),
        weighting="renormalize",
    )
    limited = limit_to_capacity(plan, capacity, prioritised=prioritised)
    assert (limited.tokens_per_expert_E <= capacity).all()
    assert torch.equal(limited.tokens_per_expert_E, plan.tokens_per_expert_E.clamp(max=capacity))
    wider = limit_to_capacity(plan, capacity + 1, prioritised=prioritised)
    assert not (limited.dispatch_mask_TE & ~wider.dispatch_mask_TE).any()
    assert (limited.combine_weights_TE[~limited.dispatch_mask_TE] == 0).all()
