"""Gates: worked cosines and the numerics they promise."""

import math

import pytest
import torch

from gmoe_ltdr.gates import CosineGate, LinearGate


def cosine_gate() -> CosineGate:
    gate = CosineGate(2, 3, proj_dim=2)
    with torch.no_grad():
        gate.proj.weight.copy_(torch.eye(2))
        gate.proj.bias.zero_()
        gate.expert_embed.copy_(torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]]))
    return gate


def test_cosine_logits_do_not_depend_on_length():
    gate = cosine_gate()
    logits = gate(torch.tensor([[3.0, 4.0], [30.0, 40.0]]))
    torch.testing.assert_close(logits, torch.tensor([[1.2, 1.6, -1.2]]).expand(2, -1))
    torch.testing.assert_close(
        logits.softmax(-1)[0], torch.tensor([0.387215, 0.577657, 0.035127]), atol=1e-6, rtol=0
    )


def test_cosine_scale_is_clamped_without_gradient_above():
    gate = cosine_gate()
    with torch.no_grad():
        gate.log_scale.fill_(math.log(200.0))
    logits = gate(torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(logits, torch.tensor([[60.0, 80.0, -60.0]]))
    logits[0, 0].backward()
    assert gate.log_scale.grad == 0


def test_cosine_of_a_zero_token_is_uniform():
    probs = cosine_gate()(torch.zeros(1, 2)).softmax(-1)
    torch.testing.assert_close(probs, torch.full((1, 3), 1 / 3))


def test_initial_values():
    gate = CosineGate(64, 6)
    assert gate.log_scale.exp().item() == pytest.approx(2.0)
    assert gate.expert_embed.shape == (256, 6)
    assert gate.expert_embed.std().item() == pytest.approx(0.01, rel=0.1)
    assert [n for n, _ in LinearGate(8, 4).named_parameters()] == ["weight"]


@pytest.mark.parametrize("gate_class", [CosineGate, LinearGate])
def test_gates_compute_in_float32(gate_class):
    torch.manual_seed(0)
    gate = gate_class(8, 4)
    tokens = torch.randn(5, 8)
    reference = gate(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gate(tokens), reference)
    assert gate(tokens.bfloat16()).dtype == torch.float32
    assert gate.bfloat16()(tokens.bfloat16()).dtype == torch.float32
