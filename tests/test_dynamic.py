"""DynMoE's router: hand-worked gates, losses and gradients, and the pool of experts."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch.optim.swa_utils import AveragedModel

from gmoe_ltdr import MoESpec, TokenContext, collect_routing, moe_layers, preset
from gmoe_ltdr.expert_pool import next_pool, recorded_steps, update_expert_pools_
from gmoe_ltdr.routers import create_router
from gmoe_ltdr.routers.dynamic import (
    best_expert_if_none,
    binary_gates,
    diversity_loss,
    gate_balance_loss,
    gate_efficiency_loss,
)
from gmoe_ltdr.routing import Modality
from tests.distributed import run_ranks
from tests.models import tiny_moe_vit


def router_of(columns, **options):
    """A router whose experts look in these directions."""
    embed_DE = torch.tensor(columns, dtype=torch.float32).T
    dim, num_experts = embed_DE.shape
    spec = preset("dynamic", num_experts=num_experts, router_options=options)
    router = create_router(dim, spec)
    with torch.no_grad():
        router.expert_embed.copy_(embed_DE)
    return router


def route(router, tokens, modality=None):
    tokens_TD = torch.tensor(tokens, dtype=torch.float32)
    context = TokenContext.all_vision(1, len(tokens_TD))
    if modality is not None:
        context = TokenContext(torch.tensor([modality], dtype=torch.uint8))
    return router(tokens_TD, context)


FOUR = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]]


def test_experts_above_half_are_active():  # TV-C4
    plan = route(router_of(FOUR), [[1.0, 0.0]])
    torch.testing.assert_close(plan.logits_TE, torch.tensor([[1.0, 0.0, -1.0, 0.6]]))
    # a cosine of 0 is a score of .5, the threshold itself: not active
    assert plan.dispatch_mask_TE.tolist() == [[True, False, False, True]]
    torch.testing.assert_close(plan.combine_weights_TE, torch.tensor([[0.5, 0, 0, 0.5]]))


def test_a_token_without_an_expert_gets_its_best_in_evaluation_only():  # TV-C4b
    router = router_of([[0.0, 1.0], [1.0, 0.0], [0.6, 0.8]])
    assert route(router, [[-3.0, -4.0]]).experts_per_token_T.tolist() == [0]
    plan = route(router.eval(), [[-3.0, -4.0]])
    assert plan.combine_weights_TE.tolist() == [[0.0, 1.0, 0.0]]


def test_gradient_passes_through_active_experts_alone():  # TV-C4c
    scores = torch.tensor([[0.73, 0.5, 0.27, 0.64]], requires_grad=True)
    thresholds = torch.full((4,), 0.5, requires_grad=True)
    gates = binary_gates(scores, thresholds)
    assert gates.tolist() == [[1.0, 0.0, 0.0, 1.0]]
    gates.backward(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert scores.grad.tolist() == [[1.0, 0.0, 0.0, 4.0]]
    assert thresholds.grad.tolist() == [-1.0, 0.0, 0.0, -4.0]


@pytest.mark.parametrize(
    ("divide_by", "first", "second"),
    [
        # w_e = g_e / (g_0 + g_3): dw_0/dg_0 = 1/4 = -dw_0/dg_3; experts 1 and 4: 1/4 (1 - 4)
        ("sum", -0.75, 0.75),
        # w_e = g_e / 2
        ("count", 0.5, 2.0),
    ],
)
def test_gradient_of_the_weights(divide_by, first, second):
    router = router_of(FOUR, divide_by=divide_by)
    plan = route(router, [[1.0, 0.0]])
    (plan.combine_weights_TE @ torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    # through -sigmoid at 0, whose slope is 1/4
    expected = torch.tensor([-first / 4, 0.0, 0.0, -second / 4])
    torch.testing.assert_close(router.thresholds.grad, expected)


def test_a_single_expert_has_a_gradient_and_the_weight_one():
    for divide_by in ("sum", "count"):
        router = router_of(FOUR, divide_by=divide_by)
        plan = route(router, [[-1.0, -0.1]])
        assert plan.combine_weights_TE.tolist() == [[0.0, 0.0, 1.0, 0.0]]
        (plan.combine_weights_TE * 3).sum().backward()
        torch.testing.assert_close(router.thresholds.grad, torch.tensor([0, 0, -0.75, 0]))


def test_the_best_of_tied_experts_is_the_first():
    gates = best_expert_if_none(torch.zeros(1, 3), torch.tensor([[0.2, 0.4, 0.4]]))
    assert gates.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("columns", "pool", "expected"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], [True, True], 0.0 + 1.0),
        ([[1.0, 0.0], [1.0, 0.0]], [True, True], math.sqrt(2) + 1.0),
        ([[1.0, 0.0], [1.0, 0.0]], [True, False], 0.0 + 1.0),
        # twice as long: as close, but the second term is the mean of 2 and 1
        ([[2.0, 0.0], [1.0, 0.0]], [True, True], math.sqrt(2) + 1.5),
    ],
)
def test_diversity_loss(columns, pool, expected):  # TV-C4d
    loss = diversity_loss(torch.tensor(columns).T, torch.tensor(pool))
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    router = router_of(columns)
    router.pool.copy_(torch.tensor(pool))
    losses = route(router, [[1.0, 1.0]]).router_losses
    assert {name: loss.item() for name, loss in losses.items()} == {
        "diversity_loss": pytest.approx(0.01 * expected)
    }
    assert route(router.eval(), [[1.0, 1.0]]).router_losses == {}


def test_balance_of_binary_gates():
    gates = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 0]], requires_grad=True)
    scores = torch.tensor([[0.6, 0.4, 0.7], [0.1, 0.9, 0.2], [0.8, 0.7, 0.9], [0.4, 0.3, 0.2]])
    real = torch.ones(4, dtype=torch.bool)
    # best active experts 2, 1, 0 (2 is better, and not active), none: shares 1/4 each
    # mean gates 2/4, 2/4, 1/4: 3 * (1/4) (5/4)
    loss = gate_balance_loss(gates, scores, real, torch.tensor(3))
    assert loss.item() == pytest.approx(15 / 16)
    loss.backward()
    assert gates.grad.unique().item() == pytest.approx(3 / 4 / 4)
    # a fifth token that is padding changes nothing
    padded = torch.cat([gates.detach(), torch.zeros(1, 3)])
    scores = torch.cat([scores, torch.ones(1, 3)])
    real = torch.tensor([True] * 4 + [False])
    assert gate_balance_loss(padded, scores, real, torch.tensor(3)).item() == pytest.approx(15 / 16)


def test_efficiency_of_binary_gates():
    gates = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 0]])
    # of the three tokens with experts: shares 2/3, 2/3, 1/3, weights (1/2 + 1/2)/3, (1 + 1/2)/3,
    # (1/2)/3; 3 * (2/9 + 3/9 + 1/18) = 11/6. Five gates of twelve: 5/12
    loss = gate_efficiency_loss(gates, torch.ones(4, dtype=torch.bool))
    assert loss.item() == pytest.approx(11 / 6 + 5 / 12)
    assert gate_efficiency_loss(torch.zeros(2, 3), torch.ones(2, dtype=torch.bool)) == 0


def test_an_expert_outside_the_pool_is_never_used():
    router = router_of(FOUR, initial_experts=3)
    assert router.pool.tolist() == [True, True, True, False]
    plan = route(router, [[0.6, 0.8], [-0.6, -0.1]])
    assert plan.dispatch_mask_TE.tolist() == [
        [True, True, False, False],
        [False, False, True, False],
    ]
    assert (plan.probs_TE[:, 3] == 0).all()
    router.pool.copy_(torch.tensor([False, False, False, True]))
    assert route(router.eval(), [[-0.6, -0.8]]).dispatch_mask_TE.tolist() == [[False] * 3 + [True]]


def pool_after(pool, activations, unserved, num_tokens=5):
    kept, new = next_pool(
        torch.tensor(pool, dtype=torch.bool),
        torch.tensor(activations),
        torch.tensor(unserved, dtype=torch.float32),
        num_tokens,
    )
    return kept.int().tolist(), new


def test_what_becomes_of_a_pool():
    nobody, somebody = [0.0, 0.0], [3.0, 4.0]
    assert pool_after([1, 1, 0], [4, 2, 0], nobody) == ([1, 1, 0], None)
    assert pool_after([1, 1, 0], [4, 0, 0], nobody) == ([1, 0, 0], None)
    assert pool_after([1, 1, 0], [4, 2, 0], somebody) == ([1, 1, 1], 2)
    # the place of one that leaves is free at once
    assert pool_after([1, 1, 0], [4, 0, 0], somebody) == ([1, 1, 0], 1)
    assert pool_after([1, 1, 1], [4, 2, 1], somebody) == ([1, 1, 1], None)
    # the last one stays
    assert pool_after([0, 1, 1], [0, 0, 0], nobody) == ([0, 1, 0], None)
    assert pool_after([0, 1, 1], [0, 0, 0], somebody) == ([1, 1, 0], 0)
    # no token, no news
    assert pool_after([1, 1, 0], [0, 0, 0], nobody, num_tokens=0) == ([1, 1, 0], None)


def test_which_steps_are_recorded():
    assert list(recorded_steps(1)) == [0]
    assert list(recorded_steps(2)) == [0]
    assert list(recorded_steps(3)) == [1]
    assert recorded_steps(900) == range(300, 600)


def small_model(**options):
    spec = preset("dynamic", num_experts=4, expert_dropout=0.0, router_options=options)
    return tiny_moe_vit(spec, drop_path_rate=0.0).train()


def routers_of(model):
    return [layer.router for layer in moe_layers(model).values()]


def images(num_images=4, seed=0):
    return torch.randn(num_images, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def turn_expert_away(model):
    """No token activates the second expert any more."""
    for router in routers_of(model):
        with torch.no_grad():
            router.thresholds[1] = 50.0


def test_a_new_expert_looks_where_nobody_was_served():  # TV-C4e
    model = small_model(initial_experts=2)
    for router in routers_of(model):
        # one token without an expert: it is its own sum
        router.this_step.num_tokens.fill_(9)
        router.this_step.activations.copy_(torch.tensor([5, 3, 0, 0]))
        router.this_step.unserved[:2] = torch.tensor([3.0, 4.0])
        with torch.no_grad():
            router.thresholds.fill_(0.7)
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    average = AveragedModel(model, use_buffers=True)
    update_expert_pools_(model, optimizer=optimizer, averages=[average.module])
    for router, averaged in zip(routers_of(model), routers_of(average.module), strict=True):
        assert router.pool.tolist() == [True, True, True, False]
        expected = torch.zeros(16)
        expected[:2] = torch.tensor([0.6, 0.8])
        torch.testing.assert_close(router.expert_embed[:, 2], expected)
        assert router.thresholds[2] == 0
        assert torch.equal(averaged.expert_embed, router.expert_embed)
        assert averaged.thresholds[2] == 0
        moments = optimizer.state[router.expert_embed]["exp_avg"]
        assert (moments[:, 2] == 0).all()
        assert (moments[:, [0, 1, 3]] != 0).all()
        assert all(not buffer.any() for buffer in router.this_step.buffers())
        assert all(not buffer.any() for buffer in router.recorded.buffers())
    # an average copies buffers, so the pool reaches it with the next average
    average.update_parameters(model)
    assert all(router.pool[2] for router in routers_of(average.module))


def test_training_counts_and_evaluation_does_not():
    router = router_of(FOUR)
    padding = int(Modality.PADDING)
    plan = route(router, [[1.0, 0.0], [0.0, -2.0], [5.0, 5.0]], [1, 0, padding])
    counted = router.this_step
    assert (counted.num_tokens.item(), counted.activations.tolist()) == (2, [1, 0, 0, 1])
    assert counted.unserved.tolist() == [0.0, -2.0]
    assert plan.experts_per_token_T.tolist() == [2, 0, 0]
    route(router.eval(), [[1.0, 0.0]])
    assert counted.num_tokens == 2
    fixed = router_of(FOUR, cycle=0)
    route(fixed, [[1.0, 0.0]])
    assert fixed.this_step.num_tokens == 0


def test_the_pool_changes_once_a_cycle():
    model = small_model(cycle=3)
    changed = []
    for step in range(6):
        turn_expert_away(model)
        before = copy.deepcopy(routers_of(model))
        model(images(seed=step))
        update_expert_pools_(model)
        pairs = zip(before, routers_of(model), strict=True)
        # the expert's place is given to a new one, if tokens are left without any
        changed.append(
            [not torch.equal(a.thresholds, b.thresholds) or not b.pool[1] for a, b in pairs]
        )
    # step 1 of each three is recorded, and changes the pool
    assert changed == [[step % 3 == 1] * 2 for step in range(6)]
    assert [int(router.steps) for router in routers_of(model)] == [6, 6]
    fixed = small_model(cycle=0)
    turn_expert_away(fixed)
    fixed(images())
    update_expert_pools_(fixed)
    assert all(router.pool.all() for router in routers_of(fixed))


def test_a_cycle_adds_up_its_steps():
    model = small_model(cycle=6)  # records steps 2 and 3
    for step in range(3):
        model(images(seed=step))
        update_expert_pools_(model)
    recorded = routers_of(model)[0].recorded
    assert recorded.num_tokens == 4 * 17
    first = recorded.activations.clone()
    assert first.sum() > 0
    model(images(seed=3))
    this_step = routers_of(model)[0].this_step.activations.clone()
    both = copy.deepcopy(model)
    update_expert_pools_(both)
    pool = routers_of(both)[0].pool
    assert torch.equal(pool | (first + this_step == 0), torch.ones(4, dtype=torch.bool))


def pools_of_a_rank() -> list:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    model = small_model(initial_experts=2)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pools = []
    for step in range(3):
        with collect_routing(model) as routings:
            out = parallel(images(seed=step).chunk(num_ranks)[rank])
        loss = out.square().mean()
        for plan in routings.values():
            loss = loss + sum(plan.router_losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_expert_pools_(model, optimizer=optimizer)
        pools.append(
            [(r.pool.tolist(), r.expert_embed.detach().clone()) for r in routers_of(model)]
        )
    return pools


def one_process() -> list:
    model = small_model(initial_experts=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pools = []
    for step in range(3):
        with collect_routing(model) as routings:
            out = model(images(seed=step))
        loss = out.square().mean()
        for plan in routings.values():
            loss = loss + sum(plan.router_losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_expert_pools_(model, optimizer=optimizer)
        pools.append(
            [(r.pool.tolist(), r.expert_embed.detach().clone()) for r in routers_of(model)]
        )
    return pools


def test_ranks_keep_the_pool_of_one_process():
    expected = one_process()
    assert {str(pool) for layers in expected for pool, _ in layers} != {
        "[True, True, False, False]"
    }
    for pools in run_ranks(pools_of_a_rank, 2):
        for layers, layers_expected in zip(pools, expected, strict=True):
            for (pool, embed), (pool_1, embed_1) in zip(layers, layers_expected, strict=True):
                assert pool == pool_1
                torch.testing.assert_close(embed, embed_1, atol=1e-5, rtol=1e-5)


def test_what_is_refused():
    for options, message in (
        ({"initial_experts": 9}, "between 1 and num_experts=8"),
        ({"initial_experts": 0}, "initial_experts"),
        ({"cycle": -1}, "cycle"),
        ({"loss": "none"}, "loss"),
        ({"second_expert": "gumbel"}, "has no option"),
    ):
        with pytest.raises(ValueError, match=message):
            create_router(8, preset("dynamic", router_options=options))
    with pytest.raises(ValueError, match="drops nothing"):
        create_router(8, preset("dynamic", capacity_factor=1.0))
    with pytest.raises(ValueError, match="no layer with MoESpec\\(router='dynamic'\\)"):
        update_expert_pools_(tiny_moe_vit(MoESpec()))
