"""The trained threshold of the tail rule: which tokens move it, which way, and how far."""

import math

import pytest
import torch
import torch.nn.functional as F

from gmoe_ltdr.routers import create_router
from gmoe_ltdr.routing import Modality, TokenContext
from gmoe_ltdr.spec import MoESpec
from gmoe_ltdr.tail import TailRule

# two rows: class token, patches, text, padding
MODALITY = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 2], [1, 1, 1, 1, 1, 1, 0, 2]], dtype=torch.uint8)
IS_CLS = torch.zeros(2, 8, dtype=torch.bool)
IS_CLS[:, 0] = True
CONTEXT = TokenContext(MODALITY, is_cls_BL=IS_CLS)
NUM_EXPERTS = 4


def learned_router(*, top_k=2, weighting="renormalize", noise_std=0.0, options=None, **rule):
    torch.manual_seed(0)
    spec = MoESpec(
        num_experts=NUM_EXPERTS,
        top_k=top_k,
        gate="linear",
        weighting=weighting,
        noise_std=noise_std,
        tail_rule=TailRule(kind="learned", **rule),
        router_options=options or {},
    )
    router = create_router(8, spec)
    with torch.no_grad():
        router.gate.weight.mul_(4)
    return router


def tokens(num: int = 16) -> torch.Tensor:
    return torch.randn(num, 8, generator=torch.Generator().manual_seed(1))


def cotangent() -> torch.Tensor:
    return torch.randn(16, NUM_EXPERTS, generator=torch.Generator().manual_seed(2))


def gradient(router, routing, upstream_TE) -> float:
    router.zero_grad(set_to_none=True)
    (routing.combine_weights_TE * upstream_TE).sum().backward()
    return router.threshold_factor.grad.item()


def smooth_loss_T(factor, routing, rule, upstream_TE) -> torch.Tensor:
    """Each token's loss if its weights went smoothly from head to tail. Float64 (T,).

    Everything but `factor` stays as it was when the plan was made with softplus(factor) = 1.
    """
    chosen_TE = routing.logits_TE if routing.noisy_logits_TE is None else routing.noisy_logits_TE
    chosen_TE = chosen_TE.detach().double().softmax(-1)
    compared_TE = chosen_TE if rule.source == "noisy" else routing.logits_TE.detach().double()
    if rule.source == "clean":
        compared_TE = compared_TE.softmax(-1)
    rpv_BL = compared_TE.var(-1, correction=int(rule.unbiased)).view(MODALITY.shape)
    compared_BL = (MODALITY == 1) & ~(IS_CLS if rule.cls != "vision" else IS_CLS & False)
    if rule.scope == "image":
        mean = torch.stack([r[c].mean() for r, c in zip(rpv_BL, compared_BL, strict=True)])
        mean = mean.unsqueeze(1)
    else:
        mean = rpv_BL[compared_BL].mean()
    distance_BL = (rpv_BL - F.softplus(factor) * mean) / mean
    degree_T1 = torch.sigmoid(distance_BL if rule.select == "tail" else -distance_BL).view(-1, 1)
    best_two = chosen_TE.topk(2).indices
    head_TE = torch.zeros_like(chosen_TE).scatter(1, best_two, chosen_TE.gather(1, best_two))
    head_TE = head_TE / head_TE.sum(1, keepdim=True)
    weights_TE = head_TE + (chosen_TE - head_TE) * degree_T1  # a tail token has all experts
    seen_TE = routing.dispatch_mask_TE & compared_BL.view(-1, 1)
    return torch.where(seen_TE, weights_TE * upstream_TE, 0.0).sum(1)


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"select": "head"},
        {"unbiased": True, "scope": "image"},
        {"source": "noisy", "cls": "exclude"},
        {"source": "noisy", "select": "head", "scope": "image", "cls": "always_tail"},
    ],
)
def test_gradient_is_that_of_weights_that_change_smoothly(rule):
    router = learned_router(noise_std=1.0, **rule)
    routing = router(tokens(), CONTEXT)
    assert routing.tail_mask_T.any()
    factor, step = router.threshold_factor.detach().double(), 1e-4
    above_T, below_T = (
        smooth_loss_T(factor + s, routing, router.spec.tail_rule, cotangent())
        for s in (step, -step)
    )
    loss_T = (routing.combine_weights_TE * cotangent()).sum(1)
    found_T = [
        torch.autograd.grad(loss, router.threshold_factor, retain_graph=True)[0] for loss in loss_T
    ]
    expected_T = (above_T - below_T) / (2 * step)
    assert (expected_T.abs() > 1e-4).sum() > 8
    torch.testing.assert_close(torch.stack(found_T).double(), expected_T, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(("select", "sign"), [("tail", -1), ("head", 1)])
def test_a_higher_threshold_means_fewer_tokens_above_it(select, sign):
    """Raw weights of a tail token sum to 1, of another to less: their total counts tail tokens."""
    router = learned_router(top_k=1, weighting="raw", select=select)
    routing = router(tokens(), CONTEXT)
    assert gradient(router, routing, torch.ones(16, NUM_EXPERTS)) * sign > 0
    with torch.no_grad():
        totals = []
        for change in (0.5, -1.0):
            router.threshold_factor.add_(change)
            totals.append(router(tokens(), CONTEXT).combine_weights_TE.sum().item())
    assert (totals[0] - totals[1]) * sign > 0


@pytest.mark.parametrize("cls", ["vision", "exclude", "always_tail"])
def test_tokens_that_are_not_compared_do_not_move_it(cls):
    router = learned_router(cls=cls)
    others_T = (MODALITY != int(Modality.VISION)).flatten()
    class_T = IS_CLS.flatten()
    for chosen_T, moves in ((others_T, False), (class_T, cls == "vision")):
        upstream_TE = cotangent() * chosen_T.unsqueeze(1)
        assert (gradient(router, router(tokens(), CONTEXT), upstream_TE) != 0) == moves


def test_language_may_be_what_is_compared():
    router = learned_router(modality="language")
    for modality, moves in ((Modality.LANGUAGE, True), (Modality.VISION, False)):
        upstream_TE = cotangent() * (MODALITY == int(modality)).view(-1, 1)
        assert (gradient(router, router(tokens(), CONTEXT), upstream_TE) != 0) == moves


def test_a_drawn_second_expert_is_the_second_in_both_weights():
    """All experts against two: only the drawn pair's own weights may enter."""
    router = learned_router(options={"second_expert": "gumbel"})
    torch.manual_seed(3)
    routing = router(tokens(), CONTEXT)
    head_T = ~routing.tail_mask_T & (MODALITY == 1).flatten()
    pair_TE = routing.dispatch_mask_TE & head_T.unsqueeze(1)
    ranks_TE = routing.probs_TE.argsort(descending=True).argsort()
    assert (pair_TE & (ranks_TE > 1)).any()  # some second expert is not the second best
    # as a tail token all weights shrink by the pair's share of the probability
    probs_TE = routing.probs_TE.detach()
    share_T1 = (probs_TE * pair_TE).sum(1, keepdim=True)
    rpv_T = probs_TE.var(-1, correction=0)
    mean = rpv_T[(MODALITY == 1).flatten()].mean()
    degree_T = torch.sigmoid((rpv_T - mean) / mean)
    # softplus(f) = 1 has the slope 1 - 1/e
    slope_T = -degree_T * (1 - degree_T) * (1 - 1 / torch.e)
    expected = (slope_T * (share_T1.squeeze(1) - 1) * head_T).sum().item()
    assert gradient(router, routing, pair_TE.float()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("scope", ["batch", "image", "global", "ema"])
@pytest.mark.parametrize(
    "modality_BL",
    [
        torch.zeros(2, 8, dtype=torch.uint8),
        torch.full((2, 8), 2, dtype=torch.uint8),
        torch.tensor([[0] * 8, [1] * 5 + [0] * 3], dtype=torch.uint8),
        torch.zeros(0, 8, dtype=torch.uint8),
        torch.zeros(2, 0, dtype=torch.uint8),
    ],
    ids=["text", "padding", "one row of text", "no row", "empty rows"],
)
def test_without_a_candidate_there_is_no_tail_and_no_nan(scope, modality_BL):
    router = learned_router(scope=scope)
    routing = router(tokens(modality_BL.numel()), TokenContext(modality_BL))
    assert not (routing.tail_mask_T & (modality_BL != 1).flatten()).any()
    assert routing.combine_weights_TE.isfinite().all()
    moved_by = gradient(router, routing, cotangent()[: modality_BL.numel()])
    assert math.isfinite(moved_by)
    assert (moved_by != 0) == bool((modality_BL == 1).any())
    assert router.gate.weight.grad.isfinite().all()


def test_padding_may_hold_nan():
    router = learned_router()
    clean = gradient(router, router(tokens(), CONTEXT), cotangent())
    spoilt = tokens()
    spoilt[(MODALITY == 2).flatten()] = float("nan")
    routing = router(spoilt, CONTEXT)
    real_T = (MODALITY != 2).flatten()
    router.zero_grad(set_to_none=True)
    (routing.combine_weights_TE * cotangent())[real_T].sum().backward()
    assert router.threshold_factor.grad.item() == pytest.approx(clean, rel=1e-6)
