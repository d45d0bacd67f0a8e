"""Tutel as an engine. Without Tutel, only what is said about its absence is tested."""

import os

import pytest
import torch
import torch.distributed as dist

from gmoe_ltdr import MoE, preset
from gmoe_ltdr.dispatch import LocalDispatcher, create_dispatcher
from gmoe_ltdr.dispatch.tutel import TutelDispatcher, import_tutel
from tests.distributed import run_ranks
from tests.oracle import dense_moe, plan
from tests.test_all_to_all import check_plans

try:
    import_tutel()
    MISSING = ""
except ImportError as error:
    MISSING = str(error).splitlines()[0]

needs_tutel = pytest.mark.skipif(bool(MISSING), reason=MISSING or "Tutel is installed")
# tokens travel in float32, so float64 has float32 accuracy
TOLERANCE = {torch.float64: 2e-5, torch.float32: 2e-5, torch.bfloat16: 5e-2}


@pytest.mark.skipif(not MISSING, reason="Tutel is installed")
def test_without_tutel_the_error_says_how_to_install_it():
    with pytest.raises(
        ImportError, match=r"(?s)pip install setuptools.*pip install --no-build-isolation"
    ):
        create_dispatcher("tutel")


def test_auto_does_not_need_tutel():
    assert isinstance(create_dispatcher("auto", num_experts=6), LocalDispatcher)


def tutel_or_skip(num_experts: int) -> TutelDispatcher | None:
    """None for a plan whose experts the ranks do not divide."""
    if num_experts % dist.get_world_size():
        with pytest.raises(ValueError, match=r"Tutel cannot place .* Use dispatcher='all_to_all'"):
            create_dispatcher("tutel", num_experts=num_experts, group=dist.group.WORLD)
        return None
    return create_dispatcher("tutel", num_experts=num_experts, group=dist.group.WORLD)


def check_tutel() -> list[int]:
    return [
        check_plans(tutel_or_skip, dtype, seeds, TOLERANCE[dtype])
        for dtype, seeds in (
            (torch.float64, range(60)),
            (torch.float32, range(60, 200)),
            (torch.bfloat16, range(200, 230)),
        )
    ]


@pytest.mark.tutel
@needs_tutel
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_any_plan_matches_the_dense_reference(num_ranks):
    checked = run_ranks(check_tutel, num_ranks)
    assert len(set(map(tuple, checked))) == 1
    assert sum(checked[0]) == 230 if num_ranks == 1 else sum(checked[0]) > 90


@pytest.mark.tutel
@needs_tutel
def test_one_device_without_a_group():
    torch.manual_seed(0)
    layer = MoE(16, 32, preset("ltdr", dispatcher="tutel")).eval()
    local = MoE(16, 32, preset("ltdr")).eval()
    local.load_state_dict(layer.state_dict())
    for shape in ((3, 10, 16), (1, 1, 16), (0, 4, 16)):
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), local(x), atol=1e-6, rtol=1e-5)


@pytest.mark.tutel
@needs_tutel
def test_float16_is_refused():
    dispatcher = create_dispatcher("tutel", num_experts=2)
    with pytest.raises(ValueError, match=r"float16.*bfloat16, or dispatcher='all_to_all'"):
        dispatcher.dispatch(torch.zeros(3, 4, dtype=torch.float16), plan(torch.ones(3, 2).bool()))


def check_groups_and_levels() -> dict:
    """Four ranks: two expert-parallel groups of two, and the two-level all-to-all."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = groups[rank // 2]
    auto = create_dispatcher("auto", num_experts=4, group=group)
    names = {"four experts": type(auto).__name__}
    auto = create_dispatcher("auto", num_experts=5, group=group)
    names["five experts"] = type(auto).__name__

    def results(make, ranks, place):
        torch.manual_seed(0)
        whole = MoE(8, 16, preset("ltdr", num_experts=4, expert_dropout=0.0))
        generator = torch.Generator().manual_seed(rank)
        x = torch.randn(rank, 8, generator=generator)  # rank 0 has no token
        mask = torch.rand(rank, 4, generator=generator) < 0.6
        weights = torch.rand(rank, 4, generator=generator) * mask
        dispatcher = make()
        held = range(place * 4 // ranks, (place + 1) * 4 // ranks)
        experts = type(whole.experts)(len(held), 8, 16)
        for name, parameter in experts.named_parameters():
            part = whole.experts.get_parameter(name).data[held.start : held.stop]
            parameter.data.copy_(part)
        x.requires_grad_()
        sent = dispatcher.dispatch(x, plan(mask, weights))
        out = dispatcher.combine(experts(sent.tokens_ND, sent.tokens_per_expert_e), sent)
        expected_x = x.detach().clone().requires_grad_()
        expected = dense_moe(expected_x, plan(mask, weights), whole.experts)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        out.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, expected_x.grad, atol=1e-5, rtol=1e-5)
        # an expert's gradient is the sum over the ranks that use it
        for name, parameter in experts.named_parameters():
            total = whole.experts.get_parameter(name).grad
            dist.all_reduce(total, group=group if ranks == 2 else None)
            part = total[held.start : held.stop]
            torch.testing.assert_close(parameter.grad, part, atol=1e-4, rtol=1e-4)

    results(lambda: TutelDispatcher(group, num_experts=4), 2, rank % 2)
    world = dist.group.WORLD
    results(lambda: TutelDispatcher(world, num_experts=4, ranks_per_node=2), 4, rank)
    assert os.environ["LOCAL_SIZE"] == "2"
    with pytest.raises(ValueError, match="smaller expert-parallel group"):
        TutelDispatcher(group, num_experts=4, ranks_per_node=2)
    with pytest.raises(ValueError, match="smaller expert-parallel group"):
        TutelDispatcher(group, num_experts=4, overlap=2)
    return names


def overlap_by_parts(blocks_ECD, *, expert_fn, a2a_ffn_overlap_degree, use_2dh, group):
    """What Tutel's overlapped path computes, one part after the other: it needs several GPUs."""
    assert not use_2dh
    out = []
    for part in blocks_ECD.split(blocks_ECD.shape[1] // a2a_ffn_overlap_degree, dim=1):
        there = TutelDispatcher(group)
        out.append(there._to_tokens(expert_fn(there._to_experts(part))))
    return torch.cat(out, dim=1)


def check_overlap() -> None:
    torch.manual_seed(dist.get_rank())
    with torch.random.fork_rng():
        torch.manual_seed(5)
        spec = preset("ltdr", dispatcher="tutel", num_experts=4)
        layer = MoE(16, 32, spec, ep_group=dist.group.WORLD).eval()
    plain = TutelDispatcher(dist.group.WORLD, num_experts=4, overlap=3)
    overlapped = TutelDispatcher(dist.group.WORLD, num_experts=4, overlap=3)
    overlapped._can_overlap = lambda tokens: True
    overlapped._tutel.a2a_ffn_overlap_forward = overlap_by_parts
    results = []
    x = torch.randn(2, 7, 16)
    for dispatcher in (plain, overlapped):
        layer.dispatcher = dispatcher
        layer.zero_grad()
        tokens = x.clone().requires_grad_()
        out = layer(tokens)
        out.square().sum().backward()
        results.append([out, tokens.grad, *(p.grad for p in layer.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)


@pytest.mark.tutel
@needs_tutel
def test_travel_in_parts_changes_nothing():
    run_ranks(check_overlap, 2)


@pytest.mark.tutel
@needs_tutel
def test_groups_within_the_world_and_two_level_all_to_all():
    names = {"four experts": "TutelDispatcher", "five experts": "AllToAllDispatcher"}
    assert run_ranks(check_groups_and_levels, 4) == [names] * 4
