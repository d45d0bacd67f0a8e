"""Routers that may give a token no expert, or all: one list, a row per router."""

import copy

import pytest
import torch

from gmoe_ltdr import (
    MoE,
    MoESpec,
    TokenContext,
    balance_loss,
    collect_routing,
    load_model,
    preset,
    save_model,
)
from gmoe_ltdr.routing import Modality
from tests.models import tiny_moe_vit
from tests.oracle import dense_moe

SPECS = {
    "dynamic": preset("dynamic"),
    "dynamic_gshard": preset("dynamic", router_options={"loss": "gshard", "divide_by": "count"}),
    "dynamic_deepspeed": preset("dynamic", router_options={"loss": "deepspeed"}),
    "expert_choice": preset("ltdr_expert_choice"),
    "expert_choice_image": preset("ltdr_expert_choice", router_options={"scope": "image"}),
}


@pytest.fixture(params=SPECS)
def spec(request) -> MoESpec:
    return SPECS[request.param]


def layer_of(spec: MoESpec, **options) -> MoE:
    torch.manual_seed(0)
    return MoE(16, 32, spec, **options)


@pytest.mark.parametrize("training", [True, False])
def test_output_is_the_dense_reference_of_the_plan(spec, training):
    quiet = MoESpec.from_dict({**spec.to_dict(), "expert_dropout": 0.0})
    layer = layer_of(quiet).train(training)
    x = torch.randn(3, 10, 16)
    with collect_routing(layer) as routings:
        out = layer(x)
    (plan,) = routings.values()
    expected = dense_moe(x.flatten(0, 1), plan, layer.experts).view_as(x)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(plan.probs_TE.sum(-1), torch.ones(30))
    assert plan.shape_BL == (3, 10)
    most = plan.max_experts_per_token or spec.num_experts
    assert plan.experts_per_token_T.max() <= most
    assert (plan.combine_weights_TE[~plan.dispatch_mask_TE] == 0).all()
    assert all(loss.dim() == 0 for loss in plan.router_losses.values())
    if training:
        (balance_loss(routings, spec) + out.square().mean()).backward()
        assert all(
            p.grad is not None and p.grad.isfinite().all() for p in layer.router.parameters()
        )


@pytest.mark.parametrize("shape", [(0, 4, 16), (1, 1, 16), (2, 3, 4, 16), (5, 16)])
@pytest.mark.parametrize("training", [True, False])
def test_shapes(spec, shape, training):
    layer = layer_of(spec).train(training)
    with collect_routing(layer) as routings:
        out = layer(torch.randn(shape))
    assert out.shape == shape
    assert out.isfinite().all()
    assert balance_loss(routings, spec).isfinite()


def test_one_expert(spec):
    one = {**spec.to_dict(), "num_experts": 1, "top_k": 1, "tail_top_k": None}
    one["router_options"].pop("initial_experts", None)
    layer = layer_of(MoESpec.from_dict(one)).eval()
    with collect_routing(layer) as routings:
        layer(torch.randn(2, 5, 16))
    assert routings[""].dispatch_mask_TE.all()


@pytest.mark.parametrize("training", [True, False])
def test_padding_goes_nowhere(spec, training):
    modality_BL = torch.full((2, 6), int(Modality.VISION), dtype=torch.uint8)
    modality_BL[0, 4:] = int(Modality.PADDING)
    modality_BL[1, :3] = int(Modality.LANGUAGE)
    x = torch.randn(2, 6, 16)
    layer = layer_of(spec, context_of=lambda x: TokenContext(modality_BL)).train(training)
    with collect_routing(layer) as routings:
        out = layer(x)
    assert (out[0, 4:] == 0).all()
    assert (routings[""].experts_per_token_T.view(2, 6)[0, 4:] == 0).all()
    # and what stands there changes nothing for the others
    layer.eval()
    with torch.no_grad():
        before = layer(x)
        x[0, 4:] = 100.0
        torch.testing.assert_close(layer(x)[:, :4], before[:, :4])

    everything = torch.full((2, 6), int(Modality.PADDING), dtype=torch.uint8)
    layer = layer_of(spec, context_of=lambda x: TokenContext(everything)).train(training)
    with collect_routing(layer) as routings:
        assert (layer(x) == 0).all()
    assert balance_loss(routings, spec).isfinite()


def test_an_image_does_not_depend_on_its_batch_mates(spec):
    layer = layer_of(spec).eval()
    images = torch.randn(5, 12, 16) * torch.tensor([0.1, 1, 3, 10, 0.01]).view(5, 1, 1)
    together = layer(images)
    for i in range(5):
        torch.testing.assert_close(layer(images[i : i + 1]), together[i : i + 1])


def test_autocast_and_half_precision_keep_float32_decisions(spec):
    layer = layer_of(spec).eval()
    x = torch.randn(2, 10, 16)
    with collect_routing(layer) as plain:
        layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16), collect_routing(layer) as half:
        out = layer(x)
    assert out.isfinite().all()
    assert torch.equal(plain[""].combine_weights_TE, half[""].combine_weights_TE)
    with collect_routing(layer.bfloat16()) as half:
        layer(x.bfloat16())
    assert half[""].probs_TE.dtype == half[""].combine_weights_TE.dtype == torch.float32


def model_of(spec: MoESpec) -> torch.nn.Module:
    quiet = {**spec.to_dict(), "noise_std": 0.0, "expert_dropout": 0.0}
    return tiny_moe_vit(MoESpec.from_dict(quiet), drop_path_rate=0.0)


def test_activation_checkpointing_changes_no_gradient_and_no_state(spec):
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for checkpointing in (False, True):
        model = model_of(spec).train()
        model.set_grad_checkpointing(checkpointing)
        with collect_routing(model) as routings:
            out = model(images)
        (out.square().sum() + balance_loss(routings, spec)).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((grads, dict(model.named_buffers())))
    (grads, buffers), (grads_again, buffers_again) = results
    assert grads.keys() == grads_again.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grads_again[name], grad)
    for name, buffer in buffers.items():
        assert torch.equal(buffers_again[name], buffer), name


def test_copies_and_files(spec, tmp_path):
    model = model_of(spec).train()
    images = torch.randn(2, 3, 16, 16)
    model(images).sum().backward()
    twin = copy.deepcopy(model).eval()
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    model.eval()
    with torch.no_grad():
        assert torch.equal(twin(images), model(images))
        assert torch.equal(loaded(images), model(images))
    assert loaded.state_dict().keys() == model.state_dict().keys()
