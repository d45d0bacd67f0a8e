"""Experts that are pieces of a network, next to shared experts (DeepSeekMoE, LTDR's table 6)."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from gmoe_ltdr import (
    MoE,
    MoESpec,
    balance_loss,
    collect_routing,
    load_model,
    preset,
    save_model,
    upcycle_,
)
from gmoe_ltdr.experts import StackedExperts, split_ffn
from gmoe_ltdr.losses import load_balancing_loss
from gmoe_ltdr.sharding import gather_state_dict
from tests.distributed import run_ranks
from tests.models import tiny_dense_vit, tiny_moe_vit
from tests.oracle import dense_moe, plan

SETTINGS = ["deepseek_1x1.0+3x1.0", "deepseek_1x1.0+12x0.25", "deepseek_1x1.0+16x0.25"]
# TV-C7 of the routing specification
X = torch.tensor([1.0, 2.0])
WHOLE = torch.tensor([3.5, 1.5])


def small_network() -> tuple[nn.Linear, nn.Linear]:
    fc1, fc2 = nn.Linear(2, 4), nn.Linear(4, 2)
    with torch.no_grad():
        fc1.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, -1]]))
        fc1.bias.copy_(torch.tensor([0.0, 0, -1, 0]))
        fc2.weight.copy_(torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]]))
        fc2.bias.copy_(torch.tensor([0.5, -0.5]))
    return fc1, fc2


def test_pieces_of_a_network():
    """TV-C7."""
    outputs = [
        F.linear(
            F.relu(F.linear(X, piece["fc1_weight"], piece["fc1_bias"])),
            piece["fc2_weight"],
            piece["fc2_bias"],
        ).tolist()
        for piece in split_ffn([small_network()[0]], small_network()[1], 4)
    ]
    assert outputs == [[1.125, -0.125], [0.125, 1.875], [2.125, -0.125], [0.125, -0.125]]
    torch.testing.assert_close(torch.tensor(outputs).sum(0), WHOLE)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_pieces", [1, 2, 3, 6])
def test_pieces_sum_to_the_network(gated, bias, num_pieces):
    torch.manual_seed(0)
    first = [nn.Linear(5, 12, bias=bias).double() for _ in range(2 if gated else 1)]
    second = nn.Linear(12, 5, bias=bias).double()
    x = torch.randn(7, 5, dtype=torch.float64)
    hidden = [layer(x) for layer in first]
    expected = second(F.silu(hidden[0]) * hidden[1] if gated else F.silu(hidden[0]))

    options = {"act_layer": nn.SiLU, "bias": (bias, bias), "gated": gated}
    experts = StackedExperts(2 * num_pieces, 5, 12 // num_pieces, **options).double()
    copy_ = experts.copy_from_gated_ if gated else experts.copy_from_dense_
    copy_(*first, second, num_pieces=num_pieces)
    rows = x.repeat(2 * num_pieces, 1)
    out = experts(rows, [len(x)] * (2 * num_pieces)).view(2, num_pieces, 7, 5).sum(1)
    torch.testing.assert_close(out[0], expected)  # twice the network, piece by piece
    torch.testing.assert_close(out[1], expected)


def test_one_shared_and_three_routed_copies():
    """TV-C7c."""
    spec = preset("deepseek_1x1.0+3x1.0", gate="linear", noise_std=0.0)
    layer = MoE(2, 4, spec, act_layer=nn.ReLU).eval()
    layer.experts.copy_from_dense_(*small_network())
    layer.shared_experts.copy_from_dense_(*small_network())
    with torch.no_grad():  # X is (1, 2): logits are the logarithms of the probabilities
        layer.router.gate.weight.zero_()
        layer.router.gate.weight[:, 0] = torch.tensor([0.5, 0.3, 0.2]).log()
    torch.testing.assert_close(layer(X.view(1, 1, 2)).view(2), torch.tensor([5.25, 2.25]))


def test_balance_counts_all_choices_of_routed_experts():
    """TV-C7b: 3 * (1/2 * 0.5 + 1/4 * 0.3 + 1/4 * 0.2)."""
    probs = [[0.6, 0.3, 0.1], [0.7, 0.2, 0.1], [0.35, 0.5, 0.15], [0.35, 0.2, 0.45]]
    logits = torch.tensor(probs).log()
    routing = plan(F.one_hot(logits.argmax(-1), 3).bool(), logits_TE=logits)
    assert load_balancing_loss(routing, count="all").item() == pytest.approx(1.125)
    spec = preset("deepseek_1x1.0+3x1.0", balance_weight=1.0)
    assert balance_loss([routing], spec).item() == pytest.approx(1.125)
    # two choices each, 3 * (3/8 * 0.5 + 3/8 * 0.3 + 2/8 * 0.2)
    two = plan(torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 0], [0, 1, 1]]).bool(), logits_TE=logits)
    assert balance_loss([two], spec).item() == pytest.approx(1.05)


@pytest.mark.parametrize(("name", "widths"), list(zip(SETTINGS, [4.0, 4.0, 5.0], strict=True)))
def test_settings_of_table_6(name, widths):
    spec = preset(name)
    assert spec.shared_experts + spec.num_experts / spec.expert_split == widths
    assert spec.shared_experts + spec.top_k / spec.expert_split == 2.0  # active
    torch.manual_seed(0)
    layer = MoE(16, 32, spec).eval()
    assert layer.experts.fc1_weight.shape == (spec.num_experts, 32 // spec.expert_split, 16)
    assert layer.shared_experts.fc1_weight.shape == (1, 32, 16)
    x = torch.randn(3, 10, 16)
    with collect_routing(layer) as routings:
        out = layer(x)
    routing = routings[""]
    assert (routing.experts_per_token_T == spec.top_k).all()
    expected = dense_moe(x.flatten(0, 1), routing, layer.experts)
    everywhere = plan(torch.ones(30, 1, dtype=torch.bool))
    expected = expected + dense_moe(x.flatten(0, 1), everywhere, layer.shared_experts)
    torch.testing.assert_close(out, expected.view_as(x), atol=1e-6, rtol=1e-5)


def test_upcycled_pieces():
    dense = tiny_dense_vit()
    mlp = copy.deepcopy(dense.blocks[0].mlp)
    spec = preset("deepseek_1x1.0+12x0.25", init_scale_shared=0.5)
    layer = upcycle_(dense, spec).eval().blocks[0].mlp
    x = torch.randn(1, 6, 16)
    tokens = x.view(6, 16)
    # three whole networks, and half of one
    out = layer.experts(tokens.repeat(12, 1), [6] * 12).view(12, 6, 16)
    torch.testing.assert_close(out.view(3, 4, 6, 16).sum(1), mlp(tokens).expand(3, -1, -1))
    torch.testing.assert_close(layer.shared_experts(tokens, [6]), mlp(tokens) / 2)
    with collect_routing(layer) as routings:
        total = layer(x)
    weights = routings[""].combine_weights_TE
    expected = mlp(tokens) / 2 + torch.einsum("te,etd->td", weights, out)
    torch.testing.assert_close(total.view(6, 16), expected, atol=1e-6, rtol=1e-5)


def test_a_width_that_cannot_be_split_changes_nothing():
    dense = tiny_dense_vit()  # hidden width 64
    before = list(dense.state_dict())
    spec = MoESpec(num_experts=6, expert_split=6)
    with pytest.raises(ValueError, match="expert_split=6 does not divide the hidden width 64"):
        upcycle_(dense, spec)
    assert list(dense.state_dict()) == before
    with pytest.raises(ValueError, match="expert_split=3"):
        MoE(8, 16, MoESpec(num_experts=6, expert_split=3))


@pytest.mark.parametrize("name", SETTINGS)
def test_saved_and_loaded(name, tmp_path):
    model = tiny_moe_vit(preset(name)).eval()
    save_model(model, tmp_path)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_model(tmp_path)(images), model(images))


def on_rank() -> dict:
    spec = MoESpec.from_dict({**preset(SETTINGS[1]).to_dict(), "dispatcher": "all_to_all"})
    return gather_state_dict(tiny_moe_vit(spec, ep_group=dist.group.WORLD))


def test_ranks_hold_the_pieces_of_their_experts():
    alone = tiny_moe_vit(preset(SETTINGS[1])).state_dict()
    for together in run_ranks(on_rank, 5):  # 3, 3, 2, 2, 2
        assert all(torch.equal(together[name], value) for name, value in alone.items())
