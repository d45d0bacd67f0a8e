"""The controls that make vision tokens surer of their experts."""

import math

import pytest
import torch

from gmoe_ltdr import Modality, MoE, TokenContext, balance_loss, collect_routing, preset
from gmoe_ltdr.routers import create_router
from gmoe_ltdr.sharpening import Sharpening
from gmoe_ltdr.tail import routing_probability_variance
from tests.vectors import ABCD, logits

V, T, P = int(Modality.VISION), int(Modality.LANGUAGE), int(Modality.PADDING)


def router_of(**options):
    """A router whose logits are its tokens."""
    router = create_router(
        4,
        preset("baseline", num_experts=4, gate="linear", noise_std=0.0, router_options=options),
    )
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(4))
    return router


def context(kinds) -> TokenContext:
    return TokenContext(torch.tensor([kinds], dtype=torch.uint8))


def test_temperature_divides_the_logits_of_vision_tokens():
    router = router_of(sharpening="temperature").eval()
    routing = router(logits(ABCD), context([V, V, T, T]))
    # p^(1/0.7), normalised; language stays as it is
    powers = torch.tensor([0.4, 0.3, 0.2, 0.1]) ** (1 / 0.7)
    torch.testing.assert_close(routing.probs_TE[1], powers / powers.sum())
    torch.testing.assert_close(routing.probs_TE[0], ABCD[0])  # uniform stays uniform
    torch.testing.assert_close(routing.probs_TE[2:], ABCD[2:])
    assert routing.noisy_logits_TE is None
    warm = router_of(sharpening="temperature", sharpening_strength=1.0).eval()
    torch.testing.assert_close(warm(logits(ABCD), context([V] * 4)).probs_TE, ABCD)
    sharper = routing_probability_variance(routing.probs_TE)[1]
    assert sharper > routing_probability_variance(ABCD)[1]


def test_training_at_a_temperature_draws_from_the_distribution():
    """The largest of logits + Gumbel noise is a draw from the softmax of the logits, whatever the
    temperature that divides both."""
    torch.manual_seed(0)
    router = router_of(sharpening="temperature").train()
    num = 40_000
    routing = router(logits(ABCD[1:2]).expand(num, 4), context([V] * num))
    first = routing.selection_logits_TE.argmax(-1).bincount(minlength=4) / num
    torch.testing.assert_close(first, ABCD[1], atol=0.01, rtol=0)
    # and the weights are those of the tempered, noisy distribution
    noisy = routing.selection_logits_TE.softmax(-1)
    weights = noisy * routing.dispatch_mask_TE
    torch.testing.assert_close(routing.combine_weights_TE, weights / weights.sum(-1, keepdim=True))
    mixed = router(logits(ABCD), context([V, T, T, P]))
    torch.testing.assert_close(mixed.selection_logits_TE[1:], logits(ABCD)[1:])
    assert not torch.equal(mixed.selection_logits_TE[0], mixed.logits_TE[0])


def test_penalties():
    router = router_of(sharpening="entropy").train()
    loss = router(logits(ABCD), context([V, V, T, P])).router_losses["entropy_loss"]
    entropy = -sum(p * math.log(p) for p in ABCD[1].tolist())
    assert loss.item() == pytest.approx(0.01 * (math.log(4) + entropy) / 2, abs=1e-7)

    router = router_of(sharpening="variance", sharpening_strength=2.0).train()
    loss = router(logits(ABCD), context([T, T, V, V])).router_losses["variance_loss"]
    # TV-D1: RPV .0675 and .1728
    assert loss.item() == pytest.approx(-2.0 * (0.0675 + 0.1728) / 2, abs=1e-6)

    assert router.eval()(logits(ABCD), context([V] * 4)).router_losses == {}


@pytest.mark.parametrize("kind", ["entropy", "variance"])
def test_following_a_penalty_makes_vision_tokens_surer(kind):
    router = router_of(sharpening=kind).train()
    # no logits are equal, which would be a saddle point
    tokens = torch.tensor([[0.3, 0.1, 0.0, -0.2], [0.3, 0.1, 0.0, -0.2]], requires_grad=True)
    routing = router(tokens, context([V, T]))
    spec = preset("no_balance", num_experts=4)
    balance_loss([routing], spec).backward()
    assert (tokens.grad[1] == 0).all()
    with torch.no_grad():
        moved = tokens - 100 * tokens.grad
    before, after = (routing_probability_variance(x.softmax(-1)) for x in (tokens, moved))
    assert after[0] > before[0]


def test_nothing_to_sharpen():
    for kind in ("entropy", "variance", "temperature"):
        router = router_of(sharpening=kind).train()
        tokens = torch.full((2, 4), torch.nan)
        tokens[0] = 1.0
        tokens.requires_grad_()
        routing = router(tokens, context([T, P]))
        loss = sum(routing.router_losses.values(), torch.zeros(()))
        assert loss.item() == 0
        if loss.requires_grad:
            loss.backward()
            assert (tokens.grad[0] == 0).all()


def test_certain_tokens_have_a_finite_gradient():
    sure = torch.tensor([[200.0, 0, 0, 0]], requires_grad=True)
    for kind in ("entropy", "variance"):
        sure.grad = None
        losses = router_of(sharpening=kind).train()(sure, context([V])).router_losses
        sum(losses.values()).backward()
        assert sure.grad.isfinite().all()


def test_without_sharpening_nothing_is_drawn():
    router, state = router_of().train(), torch.get_rng_state()
    assert router(logits(ABCD), context([V] * 4)).router_losses == {}
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["temperature", "entropy", "variance"])
def test_a_layer_trains_with_it(kind):
    torch.manual_seed(0)
    spec = preset("ltdr", router_options={"sharpening": kind})
    layer = MoE(8, 16, spec).train()
    with collect_routing(layer) as routings:
        out = layer(torch.randn(2, 6, 8))
    (out.square().sum() + balance_loss(routings, spec)).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    images = torch.randn(4, 6, 8)
    layer.eval()
    torch.testing.assert_close(layer(images)[1:2], layer(images[1:2]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sharpening": "blade"}, "'blade' is not one of"),
        ({"sharpening_strength": 1.0}, "needs 'sharpening'"),
        ({"sharpening": "entropy", "sharpening_strength": 0.0}, "must be positive"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        router_of(**options)


def test_other_routers_do_not_know_it():
    with pytest.raises(ValueError, match="'groups' has no option 'sharpening'"):
        create_router(4, preset("groups_v2Top1-t2Top1", router_options={"sharpening": "entropy"}))
    assert Sharpening.of_options({}) == Sharpening()
