"""Experts that follow the first one: three readings, worked by hand."""

import pytest
import torch

from gmoe_ltdr.evolution import (
    EVOLUTIONS,
    beta_ranges,
    cloned_parameters,
    copy_first_expert_,
    draw_betas,
    evolve_experts_,
    evolved,
)
from gmoe_ltdr.experts import StackedExperts


@pytest.mark.parametrize(
    ("evolution", "second"), [("ema", 0.932), ("scaled_update", 0.95), ("one_step", 0.77)]
)
def test_two_steps(evolution, second):  # TV-C9: the first expert goes 1, .8, .5; beta .9
    other, beta = torch.tensor([[1.0]]), torch.tensor([0.9])
    path = torch.tensor([[1.0], [0.8], [0.5]])
    other = evolved(other, path[0], path[1], beta, evolution)
    assert other.item() == pytest.approx(0.98)
    other = evolved(other, path[1], path[2], beta, evolution)
    assert other.item() == pytest.approx(second)


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.0, {"ema": 0.8, "scaled_update": 0.8, "one_step": 0.8}),
        (1.0, {"ema": 1.0, "scaled_update": 1.0, "one_step": 1.0}),
    ],
)
def test_ends_of_beta(beta, expected):  # TV-C9b, started equal
    for evolution in EVOLUTIONS:
        other = evolved(
            torch.tensor([[1.0]]),
            torch.tensor([1.0]),
            torch.tensor([0.8]),
            torch.tensor([beta]),
            evolution,
        )
        assert other.item() == pytest.approx(expected[evolution])
    # started elsewhere, beta = 1 leaves it there, or takes the first one's place before
    apart = {
        evolution: evolved(
            torch.tensor([[3.0]]),
            torch.tensor([1.0]),
            torch.tensor([0.8]),
            torch.tensor([1.0]),
            evolution,
        ).item()
        for evolution in EVOLUTIONS
    }
    assert apart == {"scaled_update": 3.0, "ema": 3.0, "one_step": 1.0}


def test_betas():
    expected = torch.tensor([[0.9, 0.99], [0.8, 0.89], [0.7, 0.79]])
    torch.testing.assert_close(beta_ranges(4), expected)
    many = beta_ranges(13)
    torch.testing.assert_close(many[4], torch.tensor([0.5, 0.59]))
    assert many.min() == 0  # and never below
    assert beta_ranges(1).shape == (0, 2)
    torch.manual_seed(0)
    betas = draw_betas(500, 4)
    assert (betas >= expected[:, 0]).all()
    assert (betas <= expected[:, 1]).all()
    torch.testing.assert_close(betas.mean(0), expected.mean(1), atol=5e-3, rtol=0)


def experts_apart() -> StackedExperts:
    torch.manual_seed(0)
    return StackedExperts(3, 4, 8)


# bfloat16 parameters are rounded once, behind a float32 sum
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_what_the_optimizer_did_to_the_others_is_undone(dtype, rtol):
    experts, betas = experts_apart().to(dtype), torch.tensor([0.9, 0.25])
    before = cloned_parameters(experts)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter[0] += 1.0
            parameter[1:] *= 0.5  # weight decay
    evolve_experts_(experts, before, betas, "scaled_update")
    for name, parameter in experts.named_parameters():
        assert torch.equal(parameter[0], before[name][0] + 1.0)
        step = parameter[0].float() - before[name][0].float()
        for expert, share in ((1, 0.1), (2, 0.75)):
            expected = (before[name][expert].float() + share * step).to(dtype)
            torch.testing.assert_close(parameter[expert], expected, rtol=rtol, atol=1e-6)


def test_copies():
    experts = experts_apart()
    copy_first_expert_(experts)
    for parameter in experts.parameters():
        assert torch.equal(parameter, parameter[:1].expand_as(parameter))
