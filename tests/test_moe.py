"""The layer against a dense reference: values and every gradient, for any number of experts."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gmoe_ltdr import MoE, MoESpec, TokenContext, collect_routing, preset
from gmoe_ltdr.dispatch import LocalDispatcher, create_dispatcher
from gmoe_ltdr.experts import StackedExperts
from gmoe_ltdr.routing import Modality
from tests.oracle import dense_moe, plan

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}


def run_sparse(tokens, routing, experts):
    dispatcher = LocalDispatcher()
    dispatched = dispatcher.dispatch(tokens, routing)
    out = experts(dispatched.tokens_ND, dispatched.tokens_per_expert_e)
    return dispatcher.combine(out, dispatched)


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.integers(0, 12),
    experts=st.integers(1, 6),
    density=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_any_plan_matches_the_dense_reference(tokens, experts, density, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(tokens, experts, generator=generator) < density
    weights = (torch.rand(tokens, experts, generator=generator) * mask).to(dtype)
    layer = StackedExperts(experts, 5, 7).to(dtype)
    cotangent = torch.randn(tokens, 5, generator=generator, dtype=dtype)
    results = []
    for run in (run_sparse, dense_moe):
        layer.zero_grad()
        x = torch.randn(tokens, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        x.requires_grad_()
        w = weights.clone().requires_grad_()
        out = run(x, plan(mask, w), layer)
        (out * cotangent).sum().backward()
        grads = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
        results.append((out.detach(), x.grad, w.grad * mask, grads))
    (out, dx, dw, grads), (out_ref, dx_ref, dw_ref, grads_ref) = results
    tolerance = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(out, out_ref, **tolerance)
    torch.testing.assert_close(dx, dx_ref, **tolerance)
    torch.testing.assert_close(dw, dw_ref, **tolerance)
    for name, reference in grads_ref.items():
        ours = grads.get(name, torch.zeros_like(reference))
        torch.testing.assert_close(ours, reference, **tolerance, msg=name)


def test_bfloat16_experts_stay_near_the_reference():
    torch.manual_seed(0)
    experts = StackedExperts(4, 32, 64)
    mask = torch.rand(50, 4) < 0.5
    weights = torch.rand(50, 4) * mask
    x = torch.randn(50, 32)
    reference = dense_moe(x, plan(mask, weights), experts)
    out = run_sparse(x.bfloat16(), plan(mask, weights), experts.bfloat16())
    assert out.dtype == torch.bfloat16
    error = (out.float() - reference).norm() / reference.norm()
    assert error < TOLERANCE[torch.bfloat16]


def test_identity_experts_and_unit_weights_return_the_input_and_its_gradient():
    dispatcher = LocalDispatcher()
    mask = torch.zeros(6, 3, dtype=torch.bool)
    mask[torch.arange(6), torch.tensor([0, 2, 1, 1, 0, 2])] = True
    x = torch.randn(6, 4, requires_grad=True)
    dispatched = dispatcher.dispatch(x, plan(mask))
    assert dispatched.tokens_per_expert_e.tolist() == [2, 2, 2]
    out = dispatcher.combine(dispatched.tokens_ND, dispatched)
    assert torch.equal(out, x)
    cotangent = torch.randn(6, 4)
    out.backward(cotangent)
    assert torch.equal(x.grad, cotangent)


@pytest.mark.parametrize(
    "name", ["ltdr", "gmoe", "gmoe_dropless", "ltdr_v1_literal", "ltdr_v2_literal"]
)
def test_layer_matches_the_reference(name):
    torch.manual_seed(0)
    layer = MoE(16, 32, preset(name)).eval()
    x = torch.randn(3, 10, 16)
    with collect_routing(layer) as routings:
        out = layer(x)
    (routing,) = routings.values()
    expected = dense_moe(x.flatten(0, 1), routing, layer.experts).view_as(x)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["ltdr", "gmoe", "ltdr_v2_literal"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_an_image_does_not_depend_on_its_batch_mates(name, top_k):
    torch.manual_seed(0)
    layer = MoE(16, 32, preset(name, top_k=top_k)).eval()
    images = torch.randn(5, 12, 16) * torch.tensor([0.1, 1, 3, 10, 0.01]).view(5, 1, 1)
    together = layer(images)
    for i in range(5):
        torch.testing.assert_close(layer(images[i : i + 1]), together[i : i + 1])


def test_permuting_tokens_and_images_permutes_the_output():
    torch.manual_seed(0)
    layer = MoE(16, 32, preset("ltdr")).eval()
    x = torch.randn(4, 9, 16)
    tokens, images = torch.randperm(9), torch.randperm(4)
    torch.testing.assert_close(layer(x[:, tokens]), layer(x)[:, tokens])
    torch.testing.assert_close(layer(x[images]), layer(x)[images])


def test_padding_comes_out_as_zero_also_with_shared_experts():
    torch.manual_seed(0)
    modality = torch.full((2, 4), int(Modality.VISION), dtype=torch.uint8)
    modality[1, 2:] = int(Modality.PADDING)
    spec = MoESpec(num_experts=3, shared_experts=2)
    layer = MoE(8, 16, spec, context_of=lambda x: TokenContext(modality)).eval()
    x = torch.randn(2, 4, 8)
    out = layer(x)
    assert (out[1, 2:] == 0).all()
    assert (out[0] != 0).all()
    # two shared experts add their full outputs to the routed ones
    with collect_routing(layer) as routings:
        layer(x)
    routed = dense_moe(x.flatten(0, 1), routings[""], layer.experts)
    everywhere = plan(torch.ones(8, 2, dtype=torch.bool))
    shared = dense_moe(x.flatten(0, 1), everywhere, layer.shared_experts)
    torch.testing.assert_close(out[0], (routed + shared).view_as(x)[0], atol=1e-6, rtol=1e-5)


def test_everything_is_padding():
    modality = torch.full((2, 3), int(Modality.PADDING), dtype=torch.uint8)
    layer = MoE(8, 16, preset("ltdr"), context_of=lambda x: TokenContext(modality))
    assert (layer(torch.randn(2, 3, 8)) == 0).all()


@pytest.mark.parametrize("num_shared", [0, 1, 2])
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (1, 1, 8), (2, 3, 4, 8), (5, 8)])
def test_shapes(shape, num_shared):
    x = torch.randn(shape, requires_grad=True)
    out = MoE(8, 16, preset("ltdr", shared_experts=num_shared))(x)
    assert out.shape == shape
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    layer = MoE(16, 32, preset("ltdr", top_k=6, tail_top_k=6))
    x = torch.randn(4, 20, 16)
    layer(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_copies_and_state():
    torch.manual_seed(0)
    layer = MoE(16, 32, preset("ltdr")).eval()
    x = torch.randn(2, 5, 16)
    layer(x).sum().backward()
    twin = copy.deepcopy(layer)
    assert twin.dispatcher is layer.dispatcher  # stateless, shared
    assert torch.equal(twin(x), layer(x))
    other = MoE(16, 32, preset("ltdr")).eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert set(layer.state_dict()) == {
        "router.gate.proj.weight",
        "router.gate.proj.bias",
        "router.gate.expert_embed",
        "router.gate.log_scale",
        "experts.fc1_weight",
        "experts.fc1_bias",
        "experts.fc2_weight",
        "experts.fc2_bias",
    }


def test_autocast_keeps_routing_and_is_finite():
    torch.manual_seed(0)
    layer = MoE(16, 32, preset("ltdr", noise_std=0.0, expert_dropout=0.0))
    x = torch.randn(2, 10, 16)
    with collect_routing(layer) as plain:
        reference = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16), collect_routing(layer) as half:
        out = layer(x)
    assert torch.equal(plain[""].dispatch_mask_TE, half[""].dispatch_mask_TE)
    assert (out.float() - reference).norm() / reference.norm() < TOLERANCE[torch.bfloat16]


def test_unknown_dispatcher():
    with pytest.raises(ValueError, match="not available"):
        create_dispatcher("carrier pigeon")
