"""What holds for every comparison router: any shape, any number of experts, the layer with it.

A router joins with an entry in `ROUTERS`; one that needs to be told or fitted, in `ready`.
"""

import copy
from dataclasses import replace

import pytest
import torch

from gmoe_ltdr import (
    MoE,
    MoESpec,
    TokenContext,
    collect_routing,
    load_model,
    moe_layers,
    preset,
    save_model,
)
from gmoe_ltdr.engines import use_expert_backend
from gmoe_ltdr.export import export_onnx
from gmoe_ltdr.image_info import set_image_info
from gmoe_ltdr.routing import Modality
from tests.models import tiny_moe_vit
from tests.oracle import dense_moe

ROUTERS = {
    "task_supervised": {"router": "task_supervised"},
    "task_contrastive": {"router": "task_contrastive"},
    "task_hard": {"router": "task_hard", "router_options": {"num_tasks": 3}},
    "task_hard_nearest": {
        "router": "task_hard",
        "router_options": {"num_tasks": 3, "unseen": "nearest"},
    },
    "cluster": {"router": "cluster", "gate": "linear"},
    "instruct": {"router": "instruct", "gate": "linear"},
    "distribution": {"router": "distribution"},
    "dynamic": {"router": "dynamic", "noise_std": 0.0},
    "dtr": {"router": "dtr"},
    "dtr_modality": {"router": "dtr", "router_options": {"hypernetworks": "modality"}},
}
TOP_K = [kind for kind in ROUTERS if kind != "dynamic"]  # which takes any number, and drops none
DIM, BATCH, LENGTH = 16, 3, 6
P, V, T = int(Modality.PADDING), int(Modality.VISION), int(Modality.LANGUAGE)


def spec_of(kind, **changes) -> MoESpec:
    return preset("gmoe_dar", **{**ROUTERS[kind], **changes})


def ready(model):
    """The same model, after what has to happen before its first forward."""
    generator = torch.Generator().manual_seed(0)
    for layer in moe_layers(model).values():
        if hasattr(layer.router, "set_centroids_"):
            num_clusters = getattr(layer.router, "num_clusters", 5)
            centroids = torch.randn(num_clusters, DIM, generator=generator)
            layer.router.set_centroids_(centroids)
    return model


def info(batch: int) -> dict[str, torch.Tensor]:
    """All that any router asks for of so many images."""
    embeddings = torch.randn(9, DIM, generator=torch.Generator().manual_seed(1))
    return {"domain_B": torch.arange(batch) % 3, "embedding_BD": embeddings[:batch]}


def context(modality_BL) -> TokenContext:
    modality_BL = torch.as_tensor(modality_BL, dtype=torch.uint8)
    return TokenContext(modality_BL, **info(len(modality_BL)))


def layer_of(kind, **changes) -> MoE:
    torch.manual_seed(0)
    return ready(MoE(DIM, 2 * DIM, spec_of(kind, **changes)))


def routing_of(layer: MoE, tokens_TD, given: TokenContext):
    plan = layer.router(tokens_TD, given)
    num_tokens, num_experts = len(tokens_TD), layer.spec.num_experts
    assert plan.dispatch_mask_TE.shape == (num_tokens, num_experts)
    assert plan.probs_TE.dtype == plan.combine_weights_TE.dtype == torch.float32
    assert plan.logits_TE.isfinite().all()
    assert (plan.combine_weights_TE >= 0).all()
    assert not plan.combine_weights_TE[~plan.dispatch_mask_TE].any()
    torch.testing.assert_close(plan.probs_TE.sum(-1), torch.ones(num_tokens))
    real = given.modality_BL.reshape(-1) != P
    assert not plan.dispatch_mask_TE[~real].any()
    if num_tokens:
        most = plan.max_experts_per_token
        assert plan.experts_per_token_T.max() <= (num_experts if most is None else most)
    return plan


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("num_experts", "top_k"), [(1, 1), (4, 4), (4, 1), (4, 2)], ids=lambda n: str(n)
)
@pytest.mark.parametrize("kind", ROUTERS)
def test_any_tokens_and_any_number_of_experts(kind, num_experts, top_k, training):
    layer = layer_of(kind, num_experts=num_experts, top_k=top_k).train(training)
    mixed = [[V, V, V, T, T, P], [V, V, V, V, V, V], [P, P, P, P, P, P]]
    for modality in (mixed, [[V]], [[P]], torch.empty(1, 0), torch.empty(0, 4)):
        given = context(modality)
        tokens = torch.randn(given.modality_BL.numel(), DIM)
        plan = routing_of(layer, tokens, given)
        real = given.modality_BL.reshape(-1) != P
        assert (plan.experts_per_token_T[real] >= 1).all() or (training and kind not in TOP_K)


@pytest.mark.parametrize("kind", ROUTERS)
def test_the_layer_equals_the_dense_reference(kind):
    layer = layer_of(kind, num_experts=4).double().eval()
    layer.router.float()
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64)
    given = context([[V] * LENGTH, [V, V, V, V, T, P], [V, V, T, T, P, P]])
    layer.context_of = lambda _: given
    with collect_routing(layer) as routings:
        out = layer(x)
    expected = dense_moe(x.flatten(0, 1), routings[""], layer.experts).view_as(x)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    assert not out[2, 4:].any()


@pytest.mark.parametrize("kind", TOP_K)
def test_capacity_drops_choices(kind):
    layer = layer_of(kind, num_experts=4, capacity_factor=0.25)
    tokens, given = torch.randn(40, DIM), context([[V] * 10] * 4)
    plan = routing_of(layer, tokens, given)
    # top_k * int(.25 * ceil(40 / 4)) = 4 slots each
    assert plan.tokens_per_expert_E.max() <= 4 < plan.selected_mask_TE.sum(0).max()
    assert routing_of(layer.eval(), tokens, given).requested_mask_TE is None


def told(model, images):
    """The same model, told of these images."""
    set_image_info(model, **info(len(images)))
    return model


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_vit_with_it_is_saved_and_copied(kind, tmp_path):
    model = ready(tiny_moe_vit(spec_of(kind))).eval()
    images = torch.randn(2, 3, 16, 16)
    expected = told(model, images)(images)
    save_model(model, tmp_path)
    assert torch.equal(told(load_model(tmp_path), images)(images), expected)
    assert torch.equal(told(copy.deepcopy(model), images)(images), expected)


@pytest.mark.parametrize("kind", ROUTERS)
def test_activation_checkpointing_changes_nothing(kind):
    images = torch.randn(2, 3, 16, 16)
    found = []
    for checkpointing in (False, True):
        model = ready(tiny_moe_vit(spec_of(kind))).train()
        model.set_grad_checkpointing(checkpointing)
        told(model, images)
        torch.manual_seed(1)
        with collect_routing(model) as routings:
            out = model(images)
        losses = [v for plan in routings.values() for v in plan.router_losses.values()]
        (out.square().sum() + sum(losses)).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((grads, dict(model.named_buffers())))
    (grads, buffers), (grads_again, buffers_again) = found
    assert grads.keys() == grads_again.keys()
    for name, value in grads.items():
        torch.testing.assert_close(grads_again[name], value, msg=name)
    for name, value in buffers.items():
        assert torch.equal(buffers_again[name], value), name


@pytest.mark.parametrize("kind", ROUTERS)
def test_routing_is_float32_whatever_autocast_says(kind):
    layer = layer_of(kind).eval()
    tokens, given = torch.randn(BATCH * LENGTH, DIM), context([[V] * LENGTH] * BATCH)
    expected = routing_of(layer, tokens, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = routing_of(layer, tokens, given)
    assert torch.equal(plan.logits_TE, expected.logits_TE)
    assert torch.equal(plan.combine_weights_TE, expected.combine_weights_TE)
    half = routing_of(layer, tokens.bfloat16(), given)
    torch.testing.assert_close(half.probs_TE, expected.probs_TE, atol=2e-2, rtol=0)


@pytest.mark.parametrize("kind", ROUTERS)
def test_an_unknown_option_is_refused(kind):
    options = {**ROUTERS[kind].get("router_options", {}), "luck": 1}
    with pytest.raises(ValueError, match="has no option 'luck'"):
        MoE(DIM, DIM, replace(spec_of(kind), router_options=options))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROUTERS)
def test_the_layer_is_one_graph(kind):
    torch.compiler.reset()
    layer = use_expert_backend(layer_of(kind, noise_std=0.0, expert_dropout=0.0), "dense")
    layer.context_of.image_info = info(BATCH)
    x = torch.randn(BATCH, LENGTH, DIM)
    for training in (True, False):
        expected = copy.deepcopy(layer).train(training)(x)
        # whoever keeps running state asks whether this is a recomputation, which breaks the graph
        whole = not (training and kind in ("task_hard_nearest", "dynamic"))
        run = torch.compile(layer.train(training), fullgraph=whole, backend="aot_eager")
        torch.testing.assert_close(run(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in ROUTERS if kind != "cluster"])
def test_onnx_runtime_gives_the_same_logits(kind, tmp_path):
    """Of a model that was loaded; what CLUSTER is told is no input of a graph of images."""
    pytest.importorskip("onnx", reason="needs the extra [export]")
    pytest.importorskip("onnxscript", reason="needs the extra [export]")
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra [export]")
    save_model(ready(tiny_moe_vit(spec_of(kind))), tmp_path)
    model = load_model(tmp_path)
    path = export_onnx(model, tmp_path / "model.onnx", torch.randn(2, 3, 16, 16))
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        images = torch.randn(batch, 3, 16, 16)
        (logits,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(images))
