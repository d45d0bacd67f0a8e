"""Gated experts (SwiGLU): every back end against the dense reference and against plain modules."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gmoe_ltdr import MoE, collect_routing, preset
from gmoe_ltdr import expert_backends as backends
from gmoe_ltdr.dispatch import LocalDispatcher
from gmoe_ltdr.dispatch.dense import DenseDispatcher
from gmoe_ltdr.engines import use_expert_backend
from gmoe_ltdr.experts import StackedExperts
from tests.expert_cases import StaticRows, random_case, results_of
from tests.oracle import dense_moe

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


class GatedNetwork(nn.Module):
    """What language models have in place of fc1, GELU, fc2."""

    def __init__(self, dim, hidden, bias=False):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=bias)
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("backend", ["loop", "dense", "grouped"])
@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 12),
    experts=st.integers(1, 5),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    static=st.booleans(),
)
def test_any_plan_matches_the_reference(backend, tokens, experts, density, seed, dtype, static):
    if backend == "grouped":
        dtype = torch.float32  # grouped_mm has no double
    layer, *case = random_case(tokens, experts, density, seed, dtype, gated=True)
    layer.backend = backend
    mask = case[2]
    most = int(mask.sum(1).max()) if tokens and mask.any() else 1
    dispatcher = StaticRows() if static else LocalDispatcher()
    if backend == "dense":
        dispatcher = DenseDispatcher()
    found = results_of(layer, *case, dispatcher, most)
    for name, value in results_of(layer, *case, None).items():
        tolerance = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
        torch.testing.assert_close(found[name], value, **tolerance, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("bias", [False, True])
def test_copies_compute_what_the_network_computes(bias):
    torch.manual_seed(0)
    network = GatedNetwork(6, 10, bias=bias)
    layer = StackedExperts(3, 6, 10, gated=True, act_layer=nn.SiLU, bias=(bias, bias))
    layer.copy_from_gated_(network.gate_proj, network.up_proj, network.down_proj)
    x = torch.randn(7, 6)
    out = layer(x.repeat(3, 1), torch.tensor([7, 7, 7])).view(3, 7, 6)
    torch.testing.assert_close(out, network(x).expand(3, 7, 6))


def test_a_gated_layer_matches_the_reference():
    torch.manual_seed(0)
    spec = preset("ltdr", gate="linear", shared_experts=1)
    layer = MoE(16, 32, spec, gated=True, act_layer=nn.SiLU).eval()
    assert layer.experts.fc1_weight.shape == (6, 64, 16)
    x = torch.randn(3, 10, 16)
    with collect_routing(layer) as routings:
        out = layer(x)
    tokens = x.flatten(0, 1)
    expected = dense_moe(tokens, routings[""], layer.experts)
    shared = layer.shared_experts
    gate, up = (tokens @ shared.fc1_weight[0].T + shared.fc1_bias[0]).split(32, dim=-1)
    expected = expected + (nn.functional.silu(gate) * up) @ shared.fc2_weight[0].T
    expected = expected + shared.fc2_bias[0]
    torch.testing.assert_close(out, expected.view_as(x), atol=1e-6, rtol=1e-5)
    for backend in ("loop", "dense", "grouped"):
        torch.testing.assert_close(use_expert_backend(layer, backend)(x), out)


def test_which_back_ends_there_are():
    layer = StackedExperts(2, 8, 12, gated=True, act_layer=nn.SiLU)
    rows = torch.randn(3, 8)
    assert backends.choose_backend(layer, rows) == "loop"
    # rows of 24 bytes between the two layers: the first layer's 48 would do
    assert not backends.grouped_fits(layer, rows.bfloat16())
    assert backends.grouped_fits(
        StackedExperts(2, 8, 16, gated=True, act_layer=nn.SiLU), rows.bfloat16()
    )
    layer.backend = "blocked"
    with pytest.raises(ValueError, match="gated; use 'auto'"):
        layer(rows, torch.tensor([1, 2]))
    layer.backend = "triton"
    with pytest.raises(ValueError, match="triton back end needs"):
        layer(rows, torch.tensor([1, 2]))
