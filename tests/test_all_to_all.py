"""Expert parallelism on gloo ranks against the dense reference: values and every gradient."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from gmoe_ltdr import MoE, MoESpec, preset
from gmoe_ltdr.dispatch import LocalDispatcher, create_dispatcher
from gmoe_ltdr.dispatch.all_to_all import AllToAllDispatcher
from gmoe_ltdr.dispatch.placement import experts_of_rank, experts_per_rank
from gmoe_ltdr.experts import StackedExperts
from tests.distributed import RankError, run_ranks
from tests.oracle import dense_moe, plan

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 5e-2}


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "expected"),
    [(6, 4, [2, 2, 1, 1]), (6, 3, [2, 2, 2]), (5, 2, [3, 2]), (4, 4, [1, 1, 1, 1]), (7, 1, [7])],
)
def test_placement(num_experts, num_ranks, expected):
    assert experts_per_rank(num_experts, num_ranks) == expected
    blocks = [experts_of_rank(num_experts, num_ranks, rank) for rank in range(num_ranks)]
    assert [e for block in blocks for e in block] == list(range(num_experts))


def test_more_ranks_than_experts_are_refused():
    with pytest.raises(ValueError, match=r"8 ranks cannot share 6 experts.*at most 6 ranks"):
        experts_per_rank(6, 8)


def test_without_a_group_everything_is_local():
    for name in ("local", "auto", "all_to_all"):
        assert isinstance(create_dispatcher(name, num_experts=4), LocalDispatcher)
        assert MoESpec(dispatcher=name).dispatcher == name


def random_problem(seed: int, num_ranks: int, dtype: torch.dtype):
    """Tokens of every rank and a plan for them: any k, some ranks and experts without a token."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    num_experts = integer(num_ranks, 7)
    tokens_of_rank = [integer(0, 9) * (integer(0, 3) > 0) for _ in range(num_ranks)]
    density = [0.0, 0.2, 0.6, 1.0][integer(0, 3)]
    num_tokens = sum(tokens_of_rank)
    mask = torch.rand(num_tokens, num_experts, generator=generator) < density
    mask[:, integer(0, num_experts - 1)] &= integer(0, 1) > 0
    weights = (torch.rand(num_tokens, num_experts, generator=generator) * mask).to(dtype)
    tokens = torch.randn(num_tokens, 6, generator=generator, dtype=torch.float64)
    cotangent = torch.randn(num_tokens, 6, generator=generator, dtype=torch.float64)
    torch.manual_seed(seed)
    experts = StackedExperts(num_experts, 6, 8)
    return tokens_of_rank, mask, weights, tokens, cotangent, experts


def reference(mask, weights, tokens, cotangent, experts, dtype):
    """Output, and gradients of tokens, weights and experts, of one process with all tokens."""
    exact = copy.deepcopy(experts).to(dtype)
    tokens = tokens.to(dtype, copy=True).requires_grad_()
    weights = weights.clone().to(dtype).requires_grad_()
    out = dense_moe(tokens, plan(mask, weights), exact)
    (out * cotangent.to(dtype)).sum().backward()
    grads = {n: p.grad for n, p in exact.named_parameters()}
    return out.detach(), tokens.grad, weights.grad * mask, grads


def plan_on(device: str, mask, weights):
    tensors = vars(plan(mask.cpu(), weights.cpu()))
    moved = {k: v.to(device) for k, v in tensors.items() if isinstance(v, torch.Tensor)}
    return replace(plan(mask.cpu()), **{**moved, "combine_weights_TE": weights})


def check_plans(
    make_dispatcher, dtype: torch.dtype, seeds: range, tolerance: float, device: str = "cpu"
) -> int:
    """On every rank: this rank's tokens and experts, against the reference on all of them."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    exact_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    checked = 0
    for seed in seeds:
        problem = random_problem(seed, num_ranks, exact_dtype)
        tokens_of_rank, mask, weights, tokens, cotangent, experts = problem
        num_experts = experts.num_experts
        dispatcher = make_dispatcher(num_experts)
        if dispatcher is None:
            continue
        out_ref, dx_ref, dw_ref, grads_ref = reference(
            mask, weights, tokens, cotangent, experts, exact_dtype
        )
        first = sum(tokens_of_rank[:rank])
        mine = slice(first, first + tokens_of_rank[rank])
        held = experts_of_rank(num_experts, num_ranks, rank)

        local = StackedExperts(len(held), 6, 8).to(device, dtype)
        for name, parameter in local.named_parameters():
            whole = experts.get_parameter(name)
            parameter.data.copy_(whole.data[held.start : held.stop])
        x = tokens[mine].to(device, dtype).requires_grad_()
        w = weights[mine].to(device, copy=True).requires_grad_()
        dispatched = dispatcher.dispatch(x, plan_on(device, mask[mine], w))
        assert int(dispatched.tokens_per_expert_e.sum()) == len(dispatched.tokens_ND)
        rows = local(dispatched.tokens_ND, dispatched.tokens_per_expert_e)
        out = dispatcher.combine(rows, dispatched)
        assert out.dtype == dtype
        (out * cotangent[mine].to(device, dtype)).sum().backward()

        def close(ours, reference, what, seed=seed):
            error = (
                (ours.to("cpu", exact_dtype) - reference).abs().max().item() if len(ours) else 0.0
            )
            scale = max(reference.abs().max().item(), 1.0) if len(reference) else 1.0
            assert error <= tolerance * scale, f"seed {seed}: {what} off by {error}"

        close(out, out_ref[mine], "output")
        close(x.grad, dx_ref[mine], "gradient of the tokens")
        close(w.grad.cpu() * mask[mine], dw_ref[mine], "gradient of the weights")
        for name, parameter in local.named_parameters():
            expected = grads_ref[name][held.start : held.stop]
            close(parameter.grad, expected, f"gradient of {name}")
        checked += 1
    return checked


def all_to_all(num_experts: int) -> AllToAllDispatcher:
    dispatcher = create_dispatcher("all_to_all", num_experts=num_experts, group=dist.group.WORLD)
    assert isinstance(dispatcher, AllToAllDispatcher)
    return dispatcher


def check_all_to_all() -> list[int]:
    return [
        check_plans(all_to_all, torch.float64, range(100), TOLERANCE[torch.float64]),
        check_plans(all_to_all, torch.float32, range(100, 200), TOLERANCE[torch.float32]),
        check_plans(all_to_all, torch.bfloat16, range(200, 230), TOLERANCE[torch.bfloat16]),
    ]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_any_plan_matches_the_dense_reference(num_ranks):
    assert run_ranks(check_all_to_all, num_ranks) == [[100, 100, 30]] * num_ranks


def check_layer() -> dict:
    """A layer with six experts on four ranks, one of them without images."""
    torch.manual_seed(0)
    whole = MoE(16, 32, preset("ltdr", noise_std=0.0, expert_dropout=0.0))
    torch.manual_seed(0)
    spec = preset("ltdr", noise_std=0.0, expert_dropout=0.0, dispatcher="all_to_all")
    layer = MoE(16, 32, spec, ep_group=dist.group.WORLD)
    rank = dist.get_rank()
    held = layer.held_experts
    assert layer.experts.num_experts == len(held) == [2, 2, 1, 1][rank]
    for name, parameter in layer.experts.named_parameters():
        assert torch.equal(parameter, whole.experts.get_parameter(name)[held.start : held.stop])

    # in evaluation, an image's output does not depend on who else is there
    images = torch.randn(3, 10, 16)
    mine = images[rank : rank + 1]
    torch.testing.assert_close(layer.eval()(mine), whole.eval()(mine), atol=1e-6, rtol=1e-5)

    # recomputed under activation checkpointing: the same gradients
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        layer.train().zero_grad()
        x = mine.clone().requires_grad_()
        run(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad.clone() for p in layer.parameters())])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)

    # half precision on the way: the rows travel as they are computed
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer.eval()(mine)
    error = (half.float() - whole(mine)).norm() / whole(mine).norm().clamp(min=1e-9)
    assert error < TOLERANCE[torch.bfloat16]

    # copies share the dispatcher; a pickle would lose the other ranks' experts
    twin = copy.deepcopy(layer)
    assert twin.dispatcher is layer.dispatcher
    torch.testing.assert_close(twin(mine), layer(mine))
    assert not any("dispatcher" in name for name in layer.state_dict())
    with pytest.raises(TypeError, match=r"cannot be pickled.*save_model"):
        pickle.dumps(layer)

    with pytest.raises(ValueError, match=r"dispatcher='local' runs all experts on one device"):
        MoE(16, 32, preset("ltdr"), ep_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="4 ranks cannot share 3 experts"):
        MoE(16, 32, MoESpec(num_experts=3, dispatcher="auto"), ep_group=dist.group.WORLD)
    return {"images": len(mine)}


def test_layer_with_six_experts_on_four_ranks():
    assert run_ranks(check_layer, 4) == [{"images": n} for n in (1, 1, 1, 0)]


def check_group_of_one() -> str:
    """A group of one rank, and two groups side by side."""
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    layer = MoE(8, 16, MoESpec(dispatcher="auto"), ep_group=alone)
    assert layer.ep_group is None
    assert layer.experts.num_experts == 6
    return type(layer.dispatcher).__name__


def test_a_group_of_one_rank_is_local():
    assert run_ranks(check_group_of_one, 2) == ["LocalDispatcher"] * 2


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise KeyError("the reason")
    dist.barrier()


def test_the_error_of_a_rank_reaches_the_test():
    with pytest.raises(RankError, match="the reason"):
        run_ranks(fail_on_rank_1, 2)
