"""Every expert back end against the dense reference: values and every gradient, any plan."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gmoe_ltdr import MoE, collect_routing, moe_layers, preset
from gmoe_ltdr import expert_backends as backends
from gmoe_ltdr.dispatch import LocalDispatcher
from gmoe_ltdr.dispatch.dense import DenseDispatcher
from gmoe_ltdr.engines import use_expert_backend
from gmoe_ltdr.experts import StackedExperts
from gmoe_ltdr.kernels import triton_available
from tests.expert_cases import (
    StaticRows,
    check_dropout,
    random_case,
    results_of,
    revealing_experts,
)
from tests.models import tiny_moe_vit

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
RELATIVE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def dispatcher_for(backend, layout):
    if backend == "dense":
        return DenseDispatcher()
    return StaticRows() if layout == "static" else LocalDispatcher()


PLANS = {
    "tokens": st.integers(0, 12),
    "experts": st.integers(1, 6),
    "density": st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    "seed": st.integers(0, 10_000),
    "dtype": st.sampled_from([torch.float64, torch.float32]),
    "layout": st.sampled_from(["exact", "static"]),
}


@pytest.mark.parametrize("backend", ["loop", "blocked", "dense", "grouped"])
@settings(max_examples=200, deadline=None)
@given(**PLANS)
def test_any_plan_matches_the_reference(backend, tokens, experts, density, seed, dtype, layout):
    if backend == "grouped":
        dtype = torch.float32  # grouped_mm has no double
    layer, x, weights, mask, cotangent = random_case(tokens, experts, density, seed, dtype)
    layer.backend = backend
    most = int(mask.sum(1).max()) if tokens and mask.any() else 1
    dispatcher = dispatcher_for(backend, layout)
    found = results_of(layer, x, weights, mask, cotangent, dispatcher, most)
    expected = results_of(layer, x, weights, mask, cotangent, None)
    for name, value in expected.items():
        tolerance = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
        torch.testing.assert_close(found[name], value, **tolerance, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["loop", "blocked", "dense", "grouped", "triton"])
def test_larger_plans_in_every_type(backend, dtype, device):
    """Against the reference in float32; bfloat16 and float16 as autocast uses them."""
    if backend == "triton" and (device == "cpu" or not triton_available()):
        pytest.skip("Triton's kernels need a GPU (their own test interprets them)")
    if device == "cpu" and dtype == torch.float16:
        pytest.skip("half-precision products on a CPU are slow and nobody's choice")
    layer, *case = random_case(300, 5, 0.5, 1, torch.float32, dim=64, hidden=128, device=device)
    expected = results_of(layer, *case, None)
    layer.backend = backend
    dispatcher = dispatcher_for(backend, "static" if device == "cuda" else "exact")
    if backend == "triton":
        dispatcher = StaticRows(triton=True)
    with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        found = results_of(layer, *case, dispatcher)
    for name, value in expected.items():
        error = (found[name].float() - value).norm() / value.norm()
        assert error < RELATIVE[dtype], (name, float(error))


def test_triton_kernels_interpreted_on_the_cpu():
    """Triton decides when it is imported whether it interprets, hence another process."""
    pytest.importorskip("triton")
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x",
         "tests/test_triton_experts.py"],
        cwd=root, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    assert "skipped" not in run.stdout


@pytest.mark.parametrize("backend", ["loop", "blocked"])
def test_dropout_is_the_same_in_backward(backend):
    check_dropout(revealing_experts(backend, 0.25))


@pytest.mark.parametrize(
    "act", [nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.ReLU(inplace=True)], ids=str
)
@pytest.mark.parametrize("bias", [(True, True), (False, True), (True, False)])
def test_blocks_of_every_activation_equal_the_loop(act, bias, monkeypatch):
    monkeypatch.setattr("gmoe_ltdr.blocked_experts.BLOCK_ROWS", 4)
    torch.manual_seed(0)
    layer = StackedExperts(3, 6, 10, bias=bias).double()
    layer.act = act
    counts = torch.tensor([9, 0, 5])
    x, cotangent = torch.randn(2, 14, 6, dtype=torch.double)
    found = []
    for backend in ("loop", "blocked"):
        layer.backend = backend
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        out = layer(leaf, counts)
        out.backward(cotangent)
        found.append([out.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())])
        with torch.no_grad():
            torch.testing.assert_close(layer(x, counts), out)
    for ours, reference in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, reference)


def test_frozen_weights_and_frozen_tokens():
    torch.manual_seed(0)
    layer = StackedExperts(2, 6, 10)
    layer.fc1_weight.requires_grad_(False)
    layer.fc2_bias.requires_grad_(False)
    layer(torch.randn(5, 6), torch.tensor([2, 3])).sum().backward()
    assert layer.fc1_weight.grad is None
    assert layer.fc2_bias.grad is None
    assert layer.fc2_weight.grad.abs().sum() > 0


def test_an_activation_with_parameters_still_learns():
    layer = StackedExperts(2, 6, 10, act_layer=nn.PReLU)
    layer(torch.randn(5, 6), torch.tensor([2, 3])).sum().backward()
    assert layer.act.weight.grad is not None


@pytest.mark.parametrize("backend", ["loop", "blocked", "dense"])
def test_models_agree_whatever_the_back_end(backend):
    model = tiny_moe_vit(preset("ltdr", noise_std=0.0, expert_dropout=0.0))
    x, cotangent = torch.randn(3, 3, 16, 16), torch.randn(3, 5)
    expected = model(x)
    expected.backward(cotangent)
    reference = {n: p.grad.clone() for n, p in model.named_parameters()}
    twin = copy.deepcopy(use_expert_backend(model, backend))
    twin.zero_grad()
    out = twin(x)
    out.backward(cotangent)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(parameter.grad, reference[name], atol=1e-5, rtol=1e-4)
    assert twin.state_dict().keys() == tiny_moe_vit(preset("ltdr")).state_dict().keys()


def test_shared_experts_take_part():
    torch.manual_seed(0)
    layer = MoE(8, 16, preset("ltdr", shared_experts=2)).eval()
    x = torch.randn(2, 4, 8)
    expected = layer(x)
    for backend in ("loop", "dense", "grouped", "auto"):
        torch.testing.assert_close(use_expert_backend(layer, backend)(x), expected)


@pytest.mark.parametrize("backend", ["auto", "loop", "dense"])
def test_activation_checkpointing_replays_noise_and_dropout(backend):
    model = tiny_moe_vit(preset("ltdr")).train()
    use_expert_backend(model, backend)
    x = torch.randn(2, 3, 16, 16)
    grads = []
    for checkpointed in (False, True):
        model.set_grad_checkpointing(checkpointed)
        model.zero_grad()
        torch.manual_seed(0)
        with collect_routing(model) as routings:
            out = model(x)
        assert len(routings) == len(moe_layers(model))
        out.square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=lambda m, n=name: f"{n}: {m}")


def test_choosing_is_refused_with_the_way_out():
    model = tiny_moe_vit(preset("ltdr"))
    with pytest.raises(ValueError, match="'fast' is not one of auto, loop"):
        use_expert_backend(model, "fast")
    with pytest.raises(ValueError, match="no MoE layer"):
        use_expert_backend(nn.Linear(2, 2), "loop")
    next(iter(moe_layers(model).values())).dispatcher = object()
    with pytest.raises(ValueError, match="one device"):
        use_expert_backend(model, "dense")
    odd = StackedExperts(2, 8, 15)
    odd.backend = "grouped"
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        odd(torch.randn(3, 8), torch.tensor([1, 2]))
    if not triton_available():
        layer = StackedExperts(2, 4, 4)
        layer.backend = "triton"
        with pytest.raises(ValueError, match="triton back end needs"):
            layer(torch.randn(3, 4), torch.tensor([1, 2]))


def test_what_auto_stands_for(monkeypatch):
    layer = StackedExperts(2, 8, 16)
    rows = torch.randn(3, 8)
    assert backends.choose_backend(layer, rows) == "blocked"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert backends.choose_backend(layer, rows) == "loop"
    assert backends.choose_backend(layer, rows.bfloat16()) == "grouped"
    odd = StackedExperts(2, 8, 15)  # rows of 30 bytes
    assert backends.choose_backend(odd, rows.bfloat16()) == "loop"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["grouped", "triton", "dense"])
def test_nothing_waits_for_the_gpu(backend):
    layer = MoE(64, 128, preset("ltdr")).cuda()
    use_expert_backend(layer, backend)
    x = torch.randn(4, 50, 64, device="cuda", requires_grad=True)

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = layer(x)
        out.float().square().sum().backward()

    step()  # compiles kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
