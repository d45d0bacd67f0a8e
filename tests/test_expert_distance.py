"""Distances between experts."""

import math

import pytest
import torch
import torch.distributed as dist

from gmoe_ltdr import MoE, MoESpec
from gmoe_ltdr.expert_distance import distances_between, expert_distances
from tests.distributed import run_ranks


def layer(**changes) -> MoE:
    torch.manual_seed(0)
    return MoE(8, 16, MoESpec(num_experts=5, **changes))


def test_worked_numbers():
    small = MoE(1, 1, MoESpec(num_experts=3, top_k=1))
    with torch.no_grad():
        for parameter in small.experts.parameters():
            parameter.zero_()
        # experts (3, 0), (0, 4) and (3, 0), as vectors of their two weights
        small.experts.fc1_weight.copy_(torch.tensor([3.0, 0.0, 3.0]).view(3, 1, 1))
        small.experts.fc2_weight.copy_(torch.tensor([0.0, 4.0, 0.0]).view(3, 1, 1))
    # |difference| 5, sizes 3 and 4: 5 / sqrt((9 + 16) / 2)
    apart = 5 / math.sqrt(12.5)
    expected = torch.tensor([[0, apart, 0], [apart, 0, apart], [0, apart, 0]])
    torch.testing.assert_close(expert_distances(small), expected)
    assert distances_between(expected).tolist() == pytest.approx([apart, 0, apart])


def test_copies_are_at_no_distance_and_strangers_at_the_root_of_two():
    equal = layer()
    with torch.no_grad():
        for parameter in equal.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    assert (expert_distances(equal) == 0).all()
    torch.manual_seed(0)
    strangers = distances_between(expert_distances(MoE(32, 128, MoESpec(num_experts=5))))
    assert len(strangers) == 10
    assert (strangers - math.sqrt(2)).abs().max() < 0.03


def test_one_expert_has_no_neighbours():
    assert len(distances_between(expert_distances(MoE(4, 8, MoESpec(num_experts=1, top_k=1))))) == 0


def on_rank() -> torch.Tensor:
    torch.manual_seed(0)
    spec = MoESpec(num_experts=5, dispatcher="all_to_all")
    return expert_distances(MoE(8, 16, spec, ep_group=dist.group.WORLD))


def test_ranks_that_share_the_experts_see_all_of_them():
    for distances in run_ranks(on_rank, 2):
        assert torch.equal(distances, expert_distances(layer()))
