"""Compilers and CUDA graphs on the paths that nothing waits on."""

import pytest
import torch

from gmoe_ltdr import MoE, balance_loss, collect_routing, preset
from gmoe_ltdr.engines import use_expert_backend
from tests.models import tiny_moe_vit

# the back end that compiles nothing but traces everything, forward and backward
TRACED = "aot_eager"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def step(run, layer, x, cotangent):
    layer.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_()
    out = run(leaf)
    out.backward(cotangent.to(out.dtype))
    grads = {name: p.grad.clone() for name, p in layer.named_parameters()}
    return {"out": out.detach(), "x": leaf.grad, **grads}


def assert_near(found, expected, tolerance):
    for name, value in expected.items():
        error = (found[name].float() - value.float()).norm()
        assert error <= tolerance * value.float().norm().clamp(min=1e-6), name


def make_layer(name, device="cpu", **options):
    torch.manual_seed(0)
    options = {"noise_std": 0.0, "expert_dropout": 0.0, **options}
    return MoE(16, 32, preset(name, **options)).to(device)


@pytest.mark.parametrize(
    "name",
    ["ltdr", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gmoe", "ltdr_v2_literal"))],
)
def test_dense_layer_is_one_graph(name):
    layer = make_layer(name)
    x, cotangent = torch.randn(2, 3, 10, 16)
    expected = step(layer, layer, x, cotangent)
    use_expert_backend(layer, "dense")
    run = torch.compile(layer, fullgraph=True, backend=TRACED)
    assert_near(step(run, layer, x, cotangent), expected, 1e-5)


@pytest.mark.parametrize(
    ("name", "backend"), [("ltdr", "auto"), pytest.param("gmoe", "grouped", marks=pytest.mark.slow)]
)
def test_grouped_layer_is_one_graph_in_bfloat16(name, backend):
    layer = make_layer(name)
    use_expert_backend(layer, "loop")
    x, cotangent = torch.randn(2, 3, 10, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = step(layer, layer, x, cotangent)
        use_expert_backend(layer, backend)
        run = torch.compile(layer, fullgraph=True, backend=TRACED)
        found = step(run, layer, x, cotangent)
        # other tokens, other counts, the same graph
        with torch._dynamo.config.patch(error_on_recompile=True):
            other = step(run, layer, x.flip(0) * 2, cotangent)
    assert_near(found, expected, 3e-2)
    assert all(value.isfinite().all() for value in other.values())


def test_noise_and_dropout_are_traced():
    layer = make_layer("ltdr", noise_std=1.0, expert_dropout=0.1)
    use_expert_backend(layer, "dense")
    run = torch.compile(layer, fullgraph=True, backend=TRACED)
    x, cotangent = torch.randn(2, 3, 10, 16)
    assert all(value.isfinite().all() for value in step(run, layer, x, cotangent).values())


def test_a_whole_model_is_one_graph():
    model = use_expert_backend(tiny_moe_vit(preset("ltdr")).eval(), "dense")
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        out = torch.compile(model, fullgraph=True, backend=TRACED)(x)
        torch.testing.assert_close(out, model(x))


def test_the_default_compiles_with_breaks():
    """Float32 on a CPU: the loop asks how many rows there are, which breaks the graph in two."""
    layer = make_layer("ltdr")
    x, cotangent = torch.randn(2, 3, 10, 16)
    expected = step(layer, layer, x, cotangent)
    run = torch.compile(layer, backend=TRACED)
    assert_near(step(run, layer, x, cotangent), expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "dtype"), [("dense", None), ("grouped", torch.bfloat16)])
def test_inductor_computes_the_same(backend, dtype):
    layer = make_layer("ltdr")
    use_expert_backend(layer, backend)
    x, cotangent = torch.randn(2, 3, 10, 16)
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        expected = step(layer, layer, x, cotangent)
        found = step(torch.compile(layer, fullgraph=True), layer, x, cotangent)
    assert_near(found, expected, 1e-5 if dtype is None else 3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["grouped", "dense"])
def test_inductor_on_a_gpu(backend):
    layer = make_layer("ltdr", "cuda")
    use_expert_backend(layer, backend)
    x, cotangent = torch.randn(2, 3, 10, 16, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        expected = step(layer, layer, x, cotangent)
        found = step(torch.compile(layer, fullgraph=True), layer, x, cotangent)
    assert_near(found, expected, 3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["grouped", "dense", "triton"])
def test_cuda_graph_replays_other_plans(backend):
    layer = make_layer("ltdr", "cuda").eval()
    use_expert_backend(layer, backend)
    static_x = torch.randn(3, 10, 16, device="cuda")

    def forward():
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            return layer(static_x)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()
    for seed in range(3):
        torch.manual_seed(seed)
        static_x.copy_(torch.randn(3, 10, 16) * (seed + 1))
        graph.replay()
        torch.testing.assert_close(out, forward())


def test_routing_is_collected_from_compiled_blocks_in_every_step():
    model = use_expert_backend(tiny_moe_vit(preset("ltdr")).train(), "dense")
    for block in model.blocks:
        block.compile(backend=TRACED)
    for seed in range(3):
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        # the first step compiles dense and sparse blocks, whose code is the same function
        with (
            torch._dynamo.config.patch(error_on_recompile=seed > 0),
            collect_routing(model) as routings,
        ):
            out = model(x)
        assert len(routings) == 2
        (out.square().sum() + balance_loss(routings, preset("ltdr"))).backward()
