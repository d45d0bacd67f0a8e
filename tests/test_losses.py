"""Balance losses: worked numbers, gradients, and who is left out of them."""

from dataclasses import replace

import pytest
import torch

from gmoe_ltdr.losses import (
    balance_loss,
    importance_load_loss,
    importance_loss,
    load_balancing_loss,
    load_loss,
    router_z_loss,
)
from gmoe_ltdr.routers.token_choice import route
from gmoe_ltdr.routing import Modality
from gmoe_ltdr.spec import MoESpec, preset
from gmoe_ltdr.tail import TailRule
from tests.vectors import logits

V, T, P = Modality.VISION, Modality.LANGUAGE, Modality.PADDING
FOUR = [[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]]


def decide(probs=None, kinds=None, top_k=1, *, logits_TE=None):
    logits_TE = logits(probs) if logits_TE is None else logits_TE
    kinds = [V] * len(logits_TE) if kinds is None else kinds
    return route(
        logits_TE,
        torch.tensor([kinds], dtype=torch.uint8),
        top_k=top_k,
        tail_top_k=top_k,
        tail_rule=TailRule(kind="none"),
        weighting="renormalize",
    )


@pytest.mark.parametrize(
    ("probs", "loss"),
    [(FOUR, 1.15), ([[0.9, 0.1], [0.1, 0.9]], 1.0), ([[1, 0], [1, 0]], 2.0)],
)
def test_load_balancing_loss(probs, loss):
    plan = decide(torch.tensor(probs).float().clamp(min=1e-30))
    assert load_balancing_loss(plan).item() == pytest.approx(loss)
    unscaled = load_balancing_loss(plan, scale="none").item()
    assert unscaled == pytest.approx(loss / 2)


def test_load_balancing_gradient():
    logits_TE = logits(FOUR).requires_grad_()
    load_balancing_loss(decide(logits_TE=logits_TE)).backward()
    column = torch.tensor([0.0225, 0.04, 0.06, 0.0525])
    torch.testing.assert_close(logits_TE.grad, torch.stack([column, -column], 1))


def test_counting_all_choices():
    plan = decide([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5]], top_k=2)
    assert load_balancing_loss(plan).item() == pytest.approx(1.0)
    assert load_balancing_loss(plan, count="all").item() == pytest.approx(1.066667, abs=1e-6)


def test_importance():
    plan = decide(FOUR)
    assert importance_loss(plan, unbiased=True).item() == pytest.approx(0.18)
    assert importance_loss(plan).item() == pytest.approx(0.09)


NOISY = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])


def test_load_in_both_variants():
    plan = decide(logits_TE=NOISY)
    vmoe = load_loss(plan, top_k=1, noise_std=1.0)
    assert vmoe.item() == pytest.approx(0.092611, abs=1e-6)
    assert importance_loss(plan).item() == pytest.approx(0.023728, abs=1e-6)
    tutel = {"top_k": 1, "noise_std": 1.0, "variant": "tutel", "unbiased": True}
    assert load_loss(plan, **tutel).item() == pytest.approx(0.082315, abs=1e-6)
    assert importance_loss(plan, unbiased=True).item() == pytest.approx(0.047456, abs=1e-6)
    assert importance_load_loss(plan, **tutel).item() == pytest.approx(0.064885, abs=1e-6)


def test_without_noise_importance_stands_alone():
    plan = decide(FOUR)
    assert importance_load_loss(plan, top_k=1, noise_std=0).item() == pytest.approx(0.09)
    with pytest.raises(ValueError, match="needs gate noise"):
        load_loss(plan, top_k=1, noise_std=0)


def test_one_expert_has_nothing_to_balance():
    plan = decide([[1.0], [1.0]])
    both = importance_load_loss(plan, top_k=1, noise_std=1.0, unbiased=True)
    assert both.item() == 0


def test_z_loss():
    plan = decide(logits_TE=torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    expected = (0.6931472**2 + 1.6931472**2) / 2
    assert router_z_loss(plan).item() == pytest.approx(expected)


MIXED = [[0.9, 0.05, 0.05], [0.8, 0.1, 0.1], [0.5, 0.3, 0.2], [0.2, 0.6, 0.2]]
KINDS = [V, V, T, T]


def mixed_loss(spec: MoESpec, probs=MIXED, kinds=KINDS) -> float:
    return balance_loss([decide(probs, kinds)], spec).item()


@pytest.mark.parametrize(("modalities", "loss"), [({T}, 1.2), ({T, V}, 1.546875), ({V}, 2.55)])
def test_which_modalities_are_balanced(modalities, loss):
    spec = MoESpec(balance_weight=1.0, balanced_modalities=frozenset(modalities))
    assert mixed_loss(spec) == pytest.approx(loss, abs=1e-6)


def test_literal_reading_has_no_factor():
    spec = preset("ltdr_v1_literal", balance_weight=1.0)
    assert mixed_loss(spec) == pytest.approx(0.4)


def test_weights_per_modality_make_two_losses():
    spec = MoESpec(router_options={"balance_weights": {"vision": 1.0, "language": 1.0}})
    assert mixed_loss(spec) == pytest.approx(3.75)
    spec = preset("reduced_balance")
    assert mixed_loss(spec) == pytest.approx(0.001 * 2.55 + 0.01 * 1.2, abs=1e-7)


def test_padding_changes_nothing():
    spec = MoESpec(balance_weight=1.0, balanced_modalities=frozenset({T, V}))
    padded = mixed_loss(spec, [*MIXED, [0.1, 0.1, 0.8]], [*KINDS, P])
    assert padded == pytest.approx(1.546875, abs=1e-6)
    plan = decide([*MIXED, [0.1, 0.1, 0.8]], [*KINDS, P])
    for loss in (load_balancing_loss, importance_loss, router_z_loss):
        assert loss(plan).item() == pytest.approx(loss(decide(MIXED, KINDS)).item(), abs=1e-6)


@pytest.mark.parametrize("balance", ["none", "switch", "importance_load", "importance_load_tutel"])
def test_padding_may_hold_nan(balance):
    spec = MoESpec(balance=balance, balance_weight=1.0, balanced_modalities=frozenset({T, V}))
    nan = torch.full((1, 3), torch.nan)
    logits_TE = torch.cat([logits(MIXED), nan])
    loss = balance_loss([decide(None, [*KINDS, P], logits_TE=logits_TE)], spec)
    assert loss.item() == pytest.approx(mixed_loss(spec), abs=1e-6)


def test_vision_tokens_get_no_gradient_from_ltdr():
    logits_TE = logits(MIXED).requires_grad_()
    plan = decide(None, KINDS, logits_TE=logits_TE)
    balance_loss([plan], MoESpec(balance_weight=1.0)).backward()
    assert (logits_TE.grad[:2] == 0).all()
    expected = torch.tensor([[0.075, 0.045, -0.12], [0.03, 0.09, -0.12]])
    torch.testing.assert_close(logits_TE.grad[2:], expected)


@pytest.mark.parametrize("balance", ["none", "switch", "importance_load", "importance_load_tutel"])
def test_nothing_to_balance_is_a_connected_zero(balance):
    logits_TE = logits(FOUR).requires_grad_()
    plan = decide(None, logits_TE=logits_TE)
    loss = balance_loss({"a": plan, "b": plan}, MoESpec(balance=balance))
    assert loss.item() == 0
    loss.backward()
    assert (logits_TE.grad == 0).all()


def test_layers_are_summed():
    spec = preset("baseline", balance_weight=0.01)
    plan = decide(MIXED, KINDS)
    one = balance_loss([plan], spec).item()
    assert one == pytest.approx(0.01546875)
    assert balance_loss([plan, plan], spec).item() == pytest.approx(2 * one)


def test_gmoe_trains_with_the_tutel_variant():
    spec = preset("gmoe")
    plan = decide(logits_TE=NOISY)
    # sigma is the spec's noise over its experts; give the plan a spec with two
    two = replace(spec, num_experts=2)
    assert balance_loss([plan], two).item() == pytest.approx(0.01 * 0.064885, abs=1e-8)


def test_no_routing_is_an_error():
    with pytest.raises(ValueError, match="collect_routing"):
        balance_loss({}, MoESpec())


def test_a_router_can_have_losses_of_its_own():
    own = torch.tensor(0.25, requires_grad=True)
    plan = replace(
        decide(logits_TE=torch.zeros(2, 3)), router_losses={"task": own, "width": own * 2}
    )
    total = balance_loss([plan, plan], preset("ltdr"))
    assert total.item() == pytest.approx(1.5)  # 2 layers x (0.25 + 0.5); nothing to balance
    total.backward()
    assert own.grad.item() == pytest.approx(6.0)
    detached = plan.detach().router_losses
    assert detached["width"].item() == 0.5
    assert not detached["width"].requires_grad
