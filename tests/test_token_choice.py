"""The routing decision: hand-worked weights, gradients, noise, and the router around it."""

import copy

import pytest
import torch

from gmoe_ltdr.routers import available_routers, create_router
from gmoe_ltdr.routers.token_choice import expert_weights, route
from gmoe_ltdr.routing import Modality, TokenContext, expert_rank
from gmoe_ltdr.spec import MoESpec, preset
from gmoe_ltdr.tail import TailRule, mean_rpv, tail_tokens
from tests.distributed import run_ranks
from tests.vectors import ABCD, B, C, logits, vision

NO_TAIL = TailRule(kind="none")
EXPERTS = torch.tensor([1.0, 2.0, 3.0, 4.0])  # E_e(x) = e + 1


def decide(probs, *, top_k, tail_top_k=None, weighting="renormalize", tail_rule=NO_TAIL, **kwargs):
    logits_TE = logits(probs)
    return route(
        logits_TE,
        kwargs.pop("modality_BL", vision(1, len(logits_TE))),
        top_k=top_k,
        tail_top_k=tail_top_k or top_k,
        tail_rule=tail_rule,
        weighting=weighting,
        **kwargs,
    )


@pytest.mark.parametrize(
    ("top_k", "weighting", "weights", "output"),
    [
        (1, "raw", [0.4], 0.4),
        (1, "renormalize", [0.4], 0.4),  # one expert keeps its raw probability
        (1, "softmax_of_probs", [0.4], 0.4),
        (2, "raw", [0.4, 0.3], 1.0),
        (2, "renormalize", [0.571429, 0.428571], 1.428571),
        (2, "softmax_of_probs", [0.524979, 0.475021], 1.475021),
        (4, "raw", B, 2.0),
        (4, "renormalize", B, 2.0),
        (4, "softmax_of_probs", [0.288651, 0.261183, 0.236328, 0.213838], 2.375353),
    ],
)
def test_weights_of_the_chosen_experts(top_k, weighting, weights, output):
    routing = decide([B], top_k=top_k, weighting=weighting)
    expected = torch.tensor(weights + [0.0] * (4 - top_k))
    torch.testing.assert_close(routing.combine_weights_TE[0], expected, atol=1e-6, rtol=0)
    assert (routing.combine_weights_TE @ EXPERTS).item() == pytest.approx(output, abs=1e-6)
    assert routing.dispatch_mask_TE.sum() == top_k


def test_ties_go_to_the_lower_index():
    routing = decide([[0.25] * 4], top_k=2)
    assert routing.dispatch_mask_TE.tolist() == [[True, True, False, False]]
    torch.testing.assert_close(routing.combine_weights_TE[0, :2], torch.tensor([0.5, 0.5]))
    raw = decide([[0.25] * 4], top_k=2, weighting="raw")
    torch.testing.assert_close(raw.combine_weights_TE[0, :2], torch.tensor([0.25, 0.25]))


def test_rank_is_a_stable_descending_order():
    values = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert expert_rank(values).tolist() == [[3, 0, 1, 2], [0, 1, 2, 3]]
    random = torch.randint(0, 5, (200, 7), generator=torch.Generator().manual_seed(0)).float()
    order = random.argsort(dim=-1, descending=True, stable=True)
    assert torch.equal(expert_rank(random), order.argsort(dim=-1))


@pytest.mark.parametrize(
    ("top_k", "weighting", "gradient"),
    [
        (2, "raw", [0.07, 0.11, -0.09, -0.09]),
        (2, "renormalize", [-0.109375, 0.109375, 0, 0]),
        (4, "raw", [-0.42, 0.04, 0.14, 0.24]),
        (4, "renormalize", [-0.42, 0.04, 0.14, 0.24]),
    ],
)
def test_gradient_of_the_output_with_respect_to_the_logits(top_k, weighting, gradient):
    logits_TE = logits([C]).requires_grad_()
    routing = route(
        logits_TE,
        vision(1, 1),
        top_k=top_k,
        tail_top_k=top_k,
        tail_rule=NO_TAIL,
        weighting=weighting,
    )
    (routing.combine_weights_TE @ EXPERTS).sum().backward()
    torch.testing.assert_close(logits_TE.grad[0], torch.tensor(gradient), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("weighting", "tail_top_k", "outputs"),
    [
        ("raw", 4, [0.75, 1.0, 1.6, 1.06]),
        ("renormalize", 4, [1.5, 1.428571, 1.6, 1.06]),
        ("softmax_of_probs", 4, [1.5, 1.475021, 2.244266, 2.069195]),
        ("raw", 3, [0.75, 1.0, 1.2, 1.02]),
        ("renormalize", 3, [1.5, 1.428571, 1.333333, 1.030303]),
        ("softmax_of_probs", 3, [1.5, 1.475021, 1.784905, 1.650520]),
    ],
)
def test_tail_tokens_get_more_experts(weighting, tail_top_k, outputs):
    routing = decide(
        ABCD, top_k=2, tail_top_k=tail_top_k, tail_rule=TailRule(), weighting=weighting
    )
    assert routing.tail_mask_T.tolist() == [False, False, True, True]
    assert routing.experts_per_token_T.tolist() == [2, 2, tail_top_k, tail_top_k]
    torch.testing.assert_close(
        routing.combine_weights_TE @ EXPERTS, torch.tensor(outputs), atol=1e-6, rtol=0
    )


def test_identical_experts_see_the_total_weight():
    kept = decide(ABCD, top_k=2, tail_top_k=4, tail_rule=TailRule())
    torch.testing.assert_close(kept.combine_weights_TE.sum(-1), torch.ones(4))
    raw = decide(ABCD, top_k=2, tail_top_k=4, tail_rule=TailRule(), weighting="raw")
    torch.testing.assert_close(raw.combine_weights_TE.sum(-1), torch.tensor([0.5, 0.7, 1.0, 1.0]))


def test_softmax_of_probs_flattens_certain_tokens():
    weights = expert_weights(
        torch.eye(4)[:1], torch.ones(1, 4, dtype=torch.bool), "softmax_of_probs"
    )
    torch.testing.assert_close(
        weights[0], torch.tensor([0.475367] + [0.174878] * 3), atol=1e-6, rtol=0
    )


def test_without_tail_tokens_routing_is_plain_top_k_bit_for_bit():
    equal = torch.tensor([[1.3, -0.2, 0.0, 0.0]]).expand(7, -1)
    options = {"top_k": 2, "weighting": "renormalize"}
    with_rule = route(equal, vision(1, 7), tail_top_k=4, tail_rule=TailRule(), **options)
    plain = route(equal, vision(1, 7), tail_top_k=2, tail_rule=NO_TAIL, **options)
    assert torch.equal(with_rule.combine_weights_TE, plain.combine_weights_TE)
    assert torch.equal(with_rule.dispatch_mask_TE, plain.dispatch_mask_TE)


@pytest.mark.parametrize(
    ("cls", "outputs"),
    [
        ("vision", [[0.5, 0], [0.75, 0.25], [0.2, 0.8]]),
        ("exclude", [[0.5, 0], [0.75, 0], [0.2, 0.8]]),
        ("always_tail", [[0.5, 0.5], [0.75, 0], [0.2, 0.8]]),
    ],
)
def test_class_token_in_one_image(cls, outputs):
    routing = decide(
        [[0.5, 0.5], [0.75, 0.25], [0.2, 0.8]],
        top_k=1,
        tail_top_k=2,
        tail_rule=TailRule(cls=cls),
        weighting="raw",
        is_cls_BL=torch.tensor([[True, False, False]]),
    )
    torch.testing.assert_close(routing.combine_weights_TE, torch.tensor(outputs))


def test_padding_goes_nowhere_and_text_is_never_tail():
    modality = torch.tensor(
        [[Modality.VISION, Modality.VISION, Modality.LANGUAGE, Modality.PADDING]],
        dtype=torch.uint8,
    )
    routing = decide(ABCD, top_k=2, tail_top_k=4, tail_rule=TailRule(), modality_BL=modality)
    assert routing.experts_per_token_T.tolist() == [2, 4, 2, 0]
    assert routing.tail_mask_T.tolist() == [False, True, False, False]
    assert routing.combine_weights_TE[3].sum() == 0
    assert routing.of(Modality.VISION).tolist() == [True, True, False, False]


def test_text_logits_never_change_the_vision_tail():
    modality = torch.tensor([[1, 1, 1, 1, 0]], dtype=torch.uint8)
    for text in ([0.97, 0.01, 0.01, 0.01], [0.25] * 4):
        probs = torch.cat([ABCD, torch.tensor([text])])
        routing = decide(probs, top_k=2, tail_top_k=4, tail_rule=TailRule(), modality_BL=modality)
        assert routing.tail_mask_T.tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(num_tokens):
    routing = route(
        torch.randn(num_tokens, 4),
        vision(1, num_tokens),
        top_k=2,
        tail_top_k=4,
        tail_rule=TailRule(),
        weighting="renormalize",
    )
    assert routing.experts_per_token_T.tolist() == [2] * num_tokens


def test_gumbel_second_expert_follows_the_probabilities():
    num_draws = 100_000
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(num_draws, 4, generator=generator).clamp(min=1e-20)
    routing = route(
        logits([B]).expand(num_draws, -1),
        vision(1, num_draws),
        top_k=2,
        tail_top_k=2,
        tail_rule=NO_TAIL,
        weighting="renormalize",
        gumbel_TE=-(-uniform.log()).log(),
    )
    assert routing.dispatch_mask_TE[:, 0].all()
    frequency = routing.dispatch_mask_TE.float().mean(0)
    torch.testing.assert_close(frequency[1:], torch.tensor([0.5, 1 / 3, 1 / 6]), atol=0.01, rtol=0)


def router_of(spec: MoESpec, dim: int = 8):
    torch.manual_seed(0)
    return create_router(dim, spec)


def context(batch: int, length: int) -> TokenContext:
    return TokenContext.all_vision(batch, length)


def test_gate_noise_has_the_stated_size():
    router = router_of(MoESpec(num_experts=4, noise_std=1.0))
    tokens = torch.randn(25_000, 8)
    routing = router(tokens, context(1, 25_000))
    noise = routing.noisy_logits_TE - routing.logits_TE
    assert noise.std().item() == pytest.approx(0.25, abs=0.005)
    router.eval()
    assert router(tokens, context(1, 25_000)).noisy_logits_TE is None


def test_no_noise_draws_no_random_number():
    router = router_of(MoESpec(num_experts=4, noise_std=0.0))
    state = torch.get_rng_state()
    router(torch.randn(0, 8), context(1, 0))
    assert torch.equal(torch.get_rng_state(), state)


def test_routing_is_float32_under_autocast_and_in_half_precision():
    router = router_of(MoESpec(num_experts=4, top_k=2)).eval()
    tokens = torch.randn(32, 8)
    reference = router(tokens, context(2, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = router(tokens, context(2, 16))
    assert autocast.probs_TE.dtype == torch.float32
    assert torch.equal(autocast.probs_TE, reference.probs_TE)
    for dtype in (torch.bfloat16, torch.float16):
        half = router(tokens.to(dtype), context(2, 16))
        assert half.combine_weights_TE.dtype == torch.float32
        gap = reference.logits_TE.sort(descending=True).values
        clear = (gap[:, 1] - gap[:, 2]) > 1e-2
        same = half.dispatch_mask_TE == reference.dispatch_mask_TE
        assert same[clear & ~reference.tail_mask_T & ~half.tail_mask_T].all()


def test_running_mean_scope():
    rule = TailRule(scope="ema", eval_scope="ema")
    spec = MoESpec(num_experts=4, gate="linear", noise_std=0, tail_rule=rule)
    router = create_router(4, spec)
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(4))
    for mean in (0.05, 0.07, 0.06):
        # a uniform token has variance 0, so the other one carries twice the wanted mean
        distance = torch.tensor([3.0, -1.0, -1.0, -1.0])
        distance *= (2 * mean / distance.square().mean()) ** 0.5
        probs = torch.stack([torch.zeros(4), distance]) + 0.25
        router(probs.log(), context(1, 2))
    assert router.mean_rpv.item() == pytest.approx(0.050298, abs=1e-6)
    assert "mean_rpv" in router.state_dict()
    router.eval()
    before = router.mean_rpv.clone()
    # in evaluation the buffer is the threshold: one token alone may now be tail
    assert router(logits([[0.97, 0.01, 0.01, 0.01]]), context(1, 1)).tail_mask_T.tolist() == [True]
    assert torch.equal(router.mean_rpv, before)


@pytest.mark.parametrize("scope", ["batch", "image", "global"])
def test_training_moves_the_running_mean_that_only_evaluation_wants(scope):
    rule = TailRule(scope=scope, eval_scope="ema")
    options = {"num_experts": 4, "gate": "linear", "noise_std": 0}
    router = router_of(MoESpec(tail_rule=rule, **options))
    plain = router_of(MoESpec(tail_rule=TailRule(scope=scope), **options))
    tokens = torch.randn(20, 8)
    routing = router(tokens, context(2, 10))
    assert torch.equal(routing.tail_mask_T, plain(tokens, context(2, 10)).tail_mask_T)
    rpv_T = routing.probs_TE.detach().var(-1, correction=0)
    assert router.mean_rpv.item() == pytest.approx(rpv_T.double().mean().item())
    sharper = router.eval()(tokens * 3, context(2, 10))
    sharper_rpv_T = sharper.probs_TE.var(-1, correction=0)
    assert torch.equal(sharper.tail_mask_T, sharper_rpv_T > rpv_T.mean())
    assert sharper.tail_mask_T.sum() > 10


@pytest.mark.parametrize("kind", ["mean", "learned"])
def test_before_training_the_running_mean_is_the_image_s_own(kind):
    tokens = torch.randn(3, 10, 8)
    tokens[1:] *= 0.01  # mates with another spread of variance
    router, by_image = (
        router_of(MoESpec(num_experts=4, tail_rule=TailRule(kind=kind, eval_scope=scope))).eval()
        for scope in ("ema", "image")
    )
    tail_T = router(tokens.flatten(0, 1), context(3, 10)).tail_mask_T
    assert torch.equal(tail_T[:10], router(tokens[0], context(1, 10)).tail_mask_T)
    assert torch.equal(tail_T, by_image(tokens.flatten(0, 1), context(3, 10)).tail_mask_T)
    assert router.mean_rpv.isnan()


@pytest.mark.parametrize("scope", ["batch", "image", "ema"])
@pytest.mark.parametrize("kind", ["mean", "learned"])
def test_noisy_variances_are_compared_with_their_own_mean(kind, scope):
    """Noise of 0.25 on near-uniform tokens: nearly all of their noisy RPV is noise."""
    rule = TailRule(kind=kind, source="noisy", scope=scope, eval_scope="ema")
    router = router_of(MoESpec(num_experts=4, gate="linear", tail_rule=rule))
    tokens = torch.randn(400, 8) * 0.05
    routing = router(tokens, context(2, 200))
    rpv_BL = routing.noisy_logits_TE.detach().softmax(-1).var(-1, correction=0).view(2, 200)
    mean = rpv_BL.mean(1, keepdim=True) if scope == "image" else rpv_BL.mean()
    assert torch.equal(routing.tail_mask_T, (rpv_BL > mean).flatten())
    # evaluation has no noise: there the running mean is that of clean probabilities
    clean_T = routing.probs_TE.detach().var(-1, correction=0)
    assert router.mean_rpv.item() == pytest.approx(clean_T.mean().item(), rel=1e-4)
    tail_T = router.eval()(tokens, context(2, 200)).tail_mask_T
    assert torch.equal(tail_T, clean_T > router.mean_rpv)


def test_learned_threshold_gets_a_gradient_and_starts_at_the_mean():
    spec = MoESpec(num_experts=4, noise_std=0, tail_rule=TailRule(kind="learned", cls="vision"))
    router = router_of(spec)
    plain = router_of(MoESpec(num_experts=4, noise_std=0))
    plain.load_state_dict({k: v for k, v in router.state_dict().items() if k != "threshold_factor"})
    tokens = torch.randn(20, 8)
    learned = router(tokens, context(2, 10))
    assert torch.equal(learned.tail_mask_T, plain(tokens, context(2, 10)).tail_mask_T)
    (learned.combine_weights_TE @ EXPERTS).sum().backward()
    assert router.threshold_factor.grad.abs() > 0


def test_eea_can_be_switched_off_in_evaluation():
    router = router_of(MoESpec(num_experts=4, tail_rule=TailRule(in_eval=False)))
    tokens = torch.randn(20, 8)
    assert router(tokens, context(2, 10)).tail_mask_T.any()
    assert not router.eval()(tokens, context(2, 10)).tail_mask_T.any()


def test_capacity_applies_in_training_and_by_choice_in_evaluation():
    tokens = torch.randn(60, 8)
    router = router_of(preset("gmoe", capacity_factor=0.5))
    assert router(tokens, context(3, 20)).requested_mask_TE is not None
    dropless = router.eval()(tokens, context(3, 20))
    assert dropless.requested_mask_TE is None
    assert dropless.num_assignments == 60
    literal = preset("gmoe", capacity_factor=0.5, router_options={"eval_capacity": "batch"})
    limited = router_of(literal).eval()(tokens, context(3, 20))
    assert limited.tokens_per_expert_E.max() <= 5  # int(0.5 * ceil(60 / 6))


@pytest.mark.parametrize("scope", ["batch", "image"])
def test_only_the_batch_scope_looks_at_batch_mates(scope):
    spec = MoESpec(num_experts=4, tail_rule=TailRule(eval_scope=scope))
    router = router_of(spec).eval()
    tokens = torch.randn(3, 10, 8)
    tokens[1:] *= 0.01  # mates with another spread of variance
    together = router(tokens.flatten(0, 1), context(3, 10)).tail_mask_T[:10]
    alone = router(tokens[0], context(1, 10)).tail_mask_T
    if scope == "image":
        assert torch.equal(together, alone)
    else:
        assert not torch.equal(together, alone)


def test_router_is_deterministic_and_copies():
    router = router_of(preset("ltdr"))
    tokens = torch.randn(30, 8)
    torch.manual_seed(5)
    first = router(tokens, context(3, 10))
    torch.manual_seed(5)
    second = copy.deepcopy(router)(tokens, context(3, 10))
    assert torch.equal(first.combine_weights_TE, second.combine_weights_TE)


def test_padding_may_count_as_language():
    modality = torch.tensor([[1, 0, 2, 2]], dtype=torch.uint8)
    tokens = torch.randn(4, 8)
    plan = router_of(MoESpec())(tokens, TokenContext(modality))
    assert plan.experts_per_token_T.tolist()[2:] == [0, 0]
    parity = MoESpec(router_options={"padding": "language"})
    plan = router_of(parity)(tokens, TokenContext(modality))
    assert plan.experts_per_token_T.tolist()[1:] == [2, 2, 2]
    assert plan.of(Modality.LANGUAGE).sum() == 3


def global_mean_of_two_ranks() -> float:
    rank = torch.distributed.get_rank()
    rpv_BL = torch.tensor([[0.0, 0.0125], [0.0675, 0.1728]])[rank : rank + 1]
    everything = torch.ones(1, 2, dtype=torch.bool)
    tail = tail_tokens(rpv_BL, everything, TailRule(scope="global"))
    assert tail.tolist() == [[False, False], [True, True]][rank : rank + 1]
    return mean_rpv(rpv_BL, everything, scope="global").item()


def test_global_scope_takes_the_mean_over_ranks():
    assert run_ranks(global_mean_of_two_ranks, 2) == [pytest.approx(0.0632)] * 2


def test_wrong_options_are_refused():
    assert "token_choice" in available_routers()
    with pytest.raises(ValueError, match="no router 'lottery'"):
        create_router(8, MoESpec(router="lottery"))
    with pytest.raises(ValueError, match="has no option 'second'"):
        create_router(8, MoESpec(router_options={"second": "gumbel"}))
    with pytest.raises(ValueError, match="second of two experts"):
        create_router(8, preset("gmoe", router_options={"second_expert": "gumbel"}))
