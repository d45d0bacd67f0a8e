"""Statistics of routings: worked numbers, groups, and that sums add up."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from gmoe_ltdr import Modality, balance_loss, collect_routing, preset
from gmoe_ltdr.routers.token_choice import route
from gmoe_ltdr.routing import CLOSED
from gmoe_ltdr.rpv_bins import largest_rpv, num_rpv_bins, rank_group, rpv_bin, rpv_edges
from gmoe_ltdr.stats import RoutingStats
from gmoe_ltdr.tail import TailRule, routing_probability_variance
from tests.models import tiny_moe_vit
from tests.oracle import plan
from tests.vectors import ABCD, logits

V, T, P = Modality.VISION, Modality.LANGUAGE, Modality.PADDING


def decide(probs, kinds=None, *, top_k=2, tail_top_k=4, shape=None):
    """A routing of tokens with these probabilities, vision tokens of one image by default."""
    kinds = torch.tensor([V] * len(probs) if kinds is None else kinds, dtype=torch.uint8)
    return route(
        logits(probs),
        kinds.view(shape or (1, -1)),
        top_k=top_k,
        tail_top_k=tail_top_k,
        tail_rule=TailRule(),
        weighting="renormalize",
    )


def stats_of(routing, **options) -> RoutingStats:
    stats = RoutingStats(detailed=options.pop("detailed", True))
    stats.add({"layer": routing}, **options)
    return stats


def test_worked_numbers():
    """TV-A1, TV-D2, TV-D3 of the routing specification: A and B are head, C and D tail tokens."""
    numbers = stats_of(decide(ABCD)).of("layer")
    assert (numbers.num_images, numbers.num_tokens) == (1, 4)
    assert numbers.rpv == pytest.approx(0.0632)
    assert numbers.head_rpv == pytest.approx(0.00625)
    assert numbers.tail_rpv == pytest.approx(0.12015)
    assert numbers.tail_share == 0.5
    assert numbers.experts_per_token == 3.0
    # A's logits are equal: the first expert wins. All four choose it first.
    assert numbers.load_E.tolist() == [1, 0, 0, 0]
    assert numbers.load_entropy == 0
    # two choices each of A and B are experts 0 and 1, C and D have all four
    assert numbers.selected_load_E.tolist() == [4 / 12, 4 / 12, 2 / 12, 2 / 12]
    np.testing.assert_allclose(numbers.mean_probs_E, [0.58, 0.1650, 0.1400, 0.1150], atol=1e-7)
    entropies = [-sum(p * math.log(p) for p in row) / math.log(4) for row in ABCD.tolist()]
    assert numbers.token_entropy == pytest.approx(sum(entropies) / 4)
    mean = [0.58, 0.165, 0.14, 0.115]
    expected = -sum(p * math.log(p) for p in mean) / math.log(4)
    assert numbers.mean_probs_entropy == pytest.approx(expected)
    assert numbers.dead_experts == []
    assert numbers.dropped_share == 0


def test_histogram():
    """TV-A1: bins of 0.01 hold A, B, C, D at 0, 1, 6, 17."""
    numbers = stats_of(decide(ABCD)).of("layer")
    assert len(numbers.head_bins_H) == 19
    assert np.flatnonzero(numbers.head_bins_H).tolist() == [0, 1]
    assert np.flatnonzero(numbers.tail_bins_H).tolist() == [6, 17]


def test_loads_per_modality():
    """TV-A2."""
    mask = [[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 1, 1]]
    kinds = torch.tensor([V, V, V, T, T], dtype=torch.uint8)
    stats = stats_of(replace(plan(torch.tensor(mask).bool()), modality_T=kinds))
    vision, language = (stats.of("layer", modality=kind) for kind in (V, T))
    assert vision.selected_load_E.tolist() == [0.375, 0.25, 0.25, 0.125]
    assert language.selected_load_E.tolist() == [0, 0.25, 0.5, 0.25]
    assert (vision.num_tokens, language.num_tokens) == (3, 2)
    assert stats.of("layer").selected_load_E.tolist() == [3 / 12, 3 / 12, 4 / 12, 2 / 12]


def test_bins_at_their_edges():
    """TV-A3, for both precisions."""
    for dtype in (torch.float32, torch.float64):
        values = torch.tensor([0.0, 0.00999, 0.01, 0.02, 0.1875], dtype=dtype)
        assert rpv_bin(values, 4).tolist() == [0, 0, 1, 2, 18]
    assert [num_rpv_bins(e) for e in (1, 2, 4, 5, 6, 8)] == [1, 25, 19, 16, 14, 11]
    for num_experts in range(2, 9):
        assert rpv_edges(num_experts)[-1] >= largest_rpv(num_experts) - 1e-12
        certain = routing_probability_variance(torch.eye(num_experts))
        assert (rpv_bin(certain, num_experts) == num_rpv_bins(num_experts) - 1).all()


def test_many_experts_have_twenty_bins():
    edges = rpv_edges(64)
    assert len(edges) == 21
    assert edges[-1].item() == pytest.approx((1 / 64) * (63 / 64))
    assert rpv_bin(edges[-1:], 64).item() == 19
    assert rpv_bin(edges[3:4], 64).item() == 3


def test_no_tokens_are_zeros():
    """TV-A3: an empty modality."""
    numbers = stats_of(decide(ABCD)).of("layer", modality=T)
    assert numbers.num_tokens == 0
    for name, value in numbers.summary().items():
        assert not np.any(value), name
    assert numbers.complaint() is None


def test_padding_is_nowhere():
    with_padding = torch.cat([ABCD, torch.full((2, 4), float("nan"))])
    padded = stats_of(decide(with_padding, [V, V, V, V, P, P]))
    assert padded.of("layer").summary() == stats_of(decide(ABCD)).of("layer").summary()
    nothing = stats_of(decide(ABCD, [P] * 4)).of("layer")
    assert (nothing.num_images, nothing.num_tokens) == (0, 0)


def test_groups_of_images():
    # images (A, B) and (C, D); tail tokens by the mean of the batch, as above
    stats = RoutingStats(("sketch", "photo"))
    routing = decide(ABCD, shape=(2, 2))
    stats.add({"layer": routing}, torch.tensor([1, 0]))
    assert stats.of("layer", group="photo").rpv == pytest.approx(0.00625)
    assert stats.of("layer", group="sketch").rpv == pytest.approx(0.12015)
    assert stats.of("layer", group="sketch").tail_share == 1
    assert stats.of("layer").num_images == 2
    stats.add({"layer": routing}, torch.tensor([1, 1]))
    assert stats.of("layer", group="photo").num_images == 3
    assert stats.of("layer", group="photo").rpv == pytest.approx((0.00625 * 2 + 0.12015) / 3)
    assert stats.num_forwards == 2


def test_what_is_counted_apart_adds_up():
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(24, 4, generator=generator).pow(3)
    probs = probs / probs.sum(-1, keepdim=True)
    halves = [decide(part, shape=(3, 4)) for part in probs.split(12)]
    whole, first, second = (RoutingStats(detailed=True) for _ in range(3))
    for half in halves:
        whole.add({"a": half, "b": half})
    first.add({"a": halves[0], "b": halves[0]})
    second.add({"a": halves[1], "b": halves[1]})
    first.merge(second)
    assert first.to_dict() == whole.to_dict()
    assert second.num_forwards == 1
    # layers together: each token counted once per layer
    assert whole.of().num_tokens == 2 * whole.of("a").num_tokens
    assert whole.of().rpv == pytest.approx(whole.of("a").rpv)


@pytest.mark.parametrize(
    ("selected", "first"),
    [
        # what the logits prefer is not always what a token gets
        ([[0, 1, 0, 0]], [0, 1, 0, 0]),
        ([[0, 1, 1, 0]], [0, 0, 1, 0]),
        ([[0, 1, 1, 0], [0, 0, 0, 0]], [0, 0, 1, 0]),  # nobody has chosen the second token
        ([[1, 0, 0, 0], [0, 1, 0, 1]], [0.5, 0, 0, 0.5]),
    ],
)
def test_the_first_choice_is_one_that_the_token_got(selected, first):
    mask = torch.tensor(selected).bool()
    preferred = torch.tensor([[4.0, 1, 2, 3]]).expand(len(mask), -1)
    routing = plan(mask, logits_TE=preferred)
    assert stats_of(routing).of("layer").load_E.tolist() == first


def test_what_cannot_be_added():
    stats = stats_of(decide(ABCD))
    with pytest.raises(ValueError, match="cannot take in"):
        stats.merge(RoutingStats())
    with pytest.raises(ValueError, match="4 experts here and 3 there"):
        stats.merge(stats_of(decide(torch.tensor([[0.5, 0.3, 0.2]]), tail_top_k=3)))
    with pytest.raises(ValueError, match="got no routing"):
        stats.add({})
    with pytest.raises(ValueError, match="nothing has been counted"):
        RoutingStats().of()
    stats.add({"other": decide(torch.tensor([[0.5, 0.3, 0.2]]), tail_top_k=3)})
    with pytest.raises(ValueError, match="name one of layer, other"):
        stats.of()


def test_json_both_ways():
    stats = stats_of(decide(ABCD))
    again = RoutingStats.from_json(stats.to_json())
    assert again.to_dict() == stats.to_dict()
    assert again.of("layer").summary() == stats.of("layer").summary()
    json.dumps(stats.of("layer").summary())
    with pytest.raises(ValueError, match="no routing statistics"):
        RoutingStats.from_dict({"format": "another"})


def test_nothing_carries_a_gradient_or_touches_it():
    logits_TE = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    routing = route(
        logits_TE,
        torch.full((2, 3), int(V), dtype=torch.uint8),
        top_k=1,
        tail_top_k=4,
        tail_rule=TailRule(),
        weighting="raw",
    )
    stats = stats_of(routing)
    assert not any(sums.requires_grad for sums in stats.state()["sums"].values())
    balance_loss([routing], preset("baseline", num_experts=4)).backward()
    assert logits_TE.grad.abs().sum() > 0


def test_dropped_choices_are_counted():
    mask = torch.tensor([[1, 0], [1, 0], [1, 0], [0, 1]]).bool()
    kept = mask.clone()
    kept[2, 0] = False
    routing = replace(plan(mask), dispatch_mask_TE=kept, requested_mask_TE=mask)
    numbers = stats_of(routing).of("layer")
    assert numbers.dropped_share == 0.25
    assert numbers.experts_per_token == 1
    assert numbers.selected_load_E.tolist() == [0.75, 0.25]


def test_complaints():
    # nine of ten tokens: -(.9 ln .9 + .1 ln .1) / ln 2 = 0.469; 99 of 100: 0.081
    def share(ones, of):
        mask = torch.zeros(of, 2, dtype=torch.bool)
        mask[:ones, 0] = mask[ones:, 1] = True
        scores = torch.where(mask, 1.0, 0.0)
        return stats_of(plan(mask, logits_TE=scores)).of("layer")

    assert share(9, 10).load_entropy == pytest.approx(0.4690, abs=1e-4)
    assert share(9, 10).complaint() is None
    assert "99% of the first choices are expert 0 (load entropy 0.08" in share(99, 100).complaint()
    assert share(10, 10).complaint().startswith("no token chose expert 1 of 2; 100%")
    assert share(10, 10).dead_experts == [1]


def test_an_expert_that_cannot_be_chosen_is_not_dead():
    scores = torch.tensor([[1.0, 0.0, CLOSED, CLOSED], [0.0, 1.0, CLOSED, CLOSED]])
    mask = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0]]).bool()
    numbers = stats_of(plan(mask, logits_TE=scores)).of("layer")
    assert numbers.dead_experts == []
    assert numbers.load_entropy == pytest.approx(1.0)  # of the two there are
    # softmax of (1, 0), in shares of ln 2
    p = 1 / (1 + math.exp(-1))
    expected = -(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2)
    assert numbers.token_entropy == pytest.approx(expected)


def test_one_expert_alone_is_healthy():
    numbers = stats_of(plan(torch.ones(3, 1, dtype=torch.bool))).of("layer")
    assert numbers.load_entropy == 1
    assert numbers.complaint() is None


def test_rank_groups():
    rpv = torch.tensor([[0.1, 0.5, 0.3, 0.3, 0.2, 0.0, 0.9]])
    vision = torch.tensor([[1, 1, 1, 1, 1, 1, 0]]).bool()
    # floor(6 * 0.34) = 2 a group: tokens 1 and 2 (a tie, the lower index first), 3 and 4, 0 and 5
    assert rank_group(rpv, vision, share=0.34).tolist() == [[2, 0, 0, 1, 1, 2, 3]]
    # never less than one: tokens 1, 2, 3
    assert rank_group(rpv, vision).tolist() == [[3, 0, 1, 2, 3, 3, 3]]
    # the paper's 576 tokens: 74 each
    counts = rank_group(torch.rand(1, 576), torch.ones(1, 576).bool())
    counts = counts.flatten().bincount().tolist()
    assert counts == [74, 74, 74, 576 - 3 * 74]


def test_norms_by_rank_and_overlap_with_a_foreground():
    norms = {"layer": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    foreground = torch.tensor([[False, False, True, False]])
    numbers = stats_of(decide(ABCD), norm_of=norms, foreground_BL=foreground).of("layer")
    assert numbers.rank_norms == (4.0, 3.0, 2.0)  # D, C, B
    assert numbers.foreground_share == 0.25
    assert numbers.tail_foreground_share == 0.5  # C of C and D
    assert numbers.summary()["tail_foreground_share"] == 0.5
    assert "rank_norms" not in stats_of(decide(ABCD)).of("layer").summary()


def test_state_goes_on_bit_for_bit():
    model = tiny_moe_vit(preset("ltdr")).train()
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with collect_routing(model) as routings:
        model(images)
    whole, first, second = (RoutingStats(("a", "b")) for _ in range(3))
    groups = torch.tensor([0, 1, 1, 0])
    for stats in (whole, whole, first):
        stats.add(routings, groups)
    second.load_state(first.state())
    second.add(routings, groups)
    assert second.to_dict() == whole.to_dict()
    assert first.num_forwards == 1
    second.clear()
    assert second.layers == []


def test_a_models_layers_come_in_depth_order():
    model = tiny_moe_vit(preset("ltdr", layers="every_other"), depth=4).eval()
    stats = RoutingStats(detailed=True)
    with collect_routing(model) as routings, torch.no_grad():
        model(torch.randn(3, 3, 16, 16))
    stats.add(routings)
    assert stats.layers == ["blocks.0.mlp", "blocks.2.mlp"]
    assert stats.num_experts("blocks.2.mlp") == 6
    numbers = stats.of("blocks.0.mlp")
    assert numbers.num_tokens == 3 * 17
    assert (numbers.head_bins_H + numbers.tail_bins_H).sum() == 3 * 17
    assert numbers.load_E.sum() == pytest.approx(1)
