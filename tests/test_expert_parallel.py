"""Training and checkpoints with expert parallelism: equal to one process."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gmoe_ltdr import MoESpec, TailRule, balance_loss, collect_routing, load_model, save_model
from gmoe_ltdr.dispatch.placement import experts_of_rank
from gmoe_ltdr.expert_parallel import (
    average_expert_gradients_,
    clip_grad_norm_,
    expert_parameters,
    ignore_experts_in_ddp_,
    replicated_parameters,
)
from gmoe_ltdr.sharding import gather_optimizer_state, gather_state_dict, shard_optimizer_state
from gmoe_ltdr.spec import preset
from tests.distributed import run_ranks
from tests.models import tiny_moe_vit

# nothing drawn at random, and a threshold over all ranks' images: then one process and several
# compute the same function
QUIET = {"noise_std": 0.0, "expert_dropout": 0.0, "num_experts": 5, "layers": (1, 3)}
LTDR = preset("ltdr", **QUIET, tail_rule=TailRule(scope="global"))
GMOE = preset("gmoe_dropless", **QUIET, router_options={"balance_scope": "global"})
SWITCH = preset("baseline", **QUIET, router_options={"balance_scope": "global"})
MAX_NORM = 0.5
# the router computes in float32 also where the rest is float64
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def distributed(spec: MoESpec, dispatcher: str = "all_to_all") -> MoESpec:
    return MoESpec.from_dict({**spec.to_dict(), "dispatcher": dispatcher})


def data(num_images: int = 12):
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(num_images, 3, 16, 16, generator=generator)
    return images, torch.randint(5, (num_images,), generator=generator)


def train(model: nn.Module, forward: nn.Module, spec: MoESpec, images, labels, *, replicas=None):
    """Two steps. Returns the optimizer and the first step's gradient norm."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    norms = []
    for _ in range(2):
        optimizer.zero_grad()
        with collect_routing(model) as routings:
            loss = F.cross_entropy(forward(images), labels)
        loss = loss + 10 * balance_loss(routings, spec)
        loss.backward()
        average_expert_gradients_(model, replica_group=replicas)
        if replicas is None:
            norms.append(clip_grad_norm_(model, MAX_NORM).item())
        optimizer.step()
    return optimizer, norms


def one_process(spec: MoESpec) -> tuple[dict, list[float], dict]:
    model = tiny_moe_vit(spec).double().train()
    images, labels = data()
    optimizer, norms = train(model, model, spec, images.double(), labels)
    return model.state_dict(), norms, optimizer.state_dict()


def several_processes(spec: MoESpec) -> tuple[dict, list[float], dict]:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    model = tiny_moe_vit(distributed(spec), ep_group=dist.group.WORLD).double().train()
    ignored = ignore_experts_in_ddp_(model)
    assert len(ignored) == len(expert_parameters(model)) == 2 * 4
    both = [*expert_parameters(model), *replicated_parameters(model)]
    assert {id(p) for p in both} == {id(p) for p in model.parameters()}
    images, labels = (part.chunk(num_ranks)[rank] for part in data())
    forward = DistributedDataParallel(model)
    optimizer, norms = train(model, forward, spec, images.double(), labels)
    return gather_state_dict(model), norms, gather_optimizer_state(optimizer, model)


def check_steps(specs) -> list:
    return [several_processes(spec) for spec in specs]


def assert_states_close(ours: dict, expected: dict, **tolerance) -> None:
    assert list(ours) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            ours[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_training_steps_equal_one_process(num_ranks):
    specs = [LTDR, GMOE, SWITCH]
    expected = [one_process(spec) for spec in specs]
    for by_spec in run_ranks(check_steps, num_ranks, specs):
        for (state, norms, optimizer), (state_1, norms_1, optimizer_1) in zip(
            by_spec, expected, strict=True
        ):
            assert norms == pytest.approx(norms_1, rel=1e-6)
            assert_states_close(state, state_1, **CLOSE)
            assert optimizer["param_groups"] == optimizer_1["param_groups"]
            for number, values in optimizer_1["state"].items():
                assert_states_close(optimizer["state"][number], values, **CLOSE)


def check_replicas() -> dict:
    """Two expert-parallel groups of two ranks, each with all experts."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    same_experts = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    model = tiny_moe_vit(distributed(LTDR), ep_group=groups[rank // 2]).double().train()
    ignore_experts_in_ddp_(model)
    images, labels = (part.chunk(4)[rank] for part in data())
    forward = DistributedDataParallel(model)
    train(model, forward, LTDR, images.double(), labels, replicas=same_experts)
    return gather_state_dict(model)


def test_groups_of_ranks_that_each_hold_all_experts():
    model = tiny_moe_vit(LTDR).double().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    images, labels = data()
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images.double()), labels).backward()
        optimizer.step()
    for state in run_ranks(check_replicas, 4):
        assert_states_close(state, model.state_dict(), **CLOSE)


def check_save(folder: str) -> None:
    model = tiny_moe_vit(distributed(LTDR, "auto"), ep_group=dist.group.WORLD)
    optimizer = torch.optim.Adam(model.parameters())
    model(data()[0]).square().mean().backward()
    optimizer.step()
    twin = copy.deepcopy(model)  # with a process group inside
    assert gather_state_dict(twin).keys() == model.state_dict().keys()
    save_model(model, folder)
    whole = gather_optimizer_state(optimizer, model)
    if dist.get_rank() == 0:
        torch.save(whole, f"{folder}/optimizer.pt")


def check_load(folder: str) -> torch.Tensor:
    group = dist.group.WORLD
    model = load_model(folder, ep_group=group)
    held = experts_of_rank(5, group.size(), group.rank())
    assert len(expert_parameters(model)[0]) == len(held)
    optimizer = torch.optim.Adam(model.parameters())
    whole = torch.load(f"{folder}/optimizer.pt")
    optimizer.load_state_dict(shard_optimizer_state(whole, optimizer, model))
    number = [n for n, _ in model.named_parameters()].index("blocks.3.mlp.experts.fc1_weight")
    mine = optimizer.state_dict()["state"][number]["exp_avg"]
    assert torch.equal(mine, whole["state"][number]["exp_avg"][held.start : held.stop])
    with torch.inference_mode():
        return model(data()[0])


def test_saved_on_two_ranks_and_loaded_on_one_and_three(tmp_path):
    run_ranks(check_save, 2, str(tmp_path))
    alone = load_model(tmp_path)
    assert sum(len(p) for p in alone.blocks[3].mlp.experts.parameters()) == 4 * 5
    with torch.inference_mode():
        expected = alone(data()[0])
    for logits in run_ranks(check_load, 3, str(tmp_path)):
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert not list(tmp_path.glob(".*"))


def check_saved_local(folder: str) -> list[str]:
    """Saved with "local": several ranks choose an engine, and may name one."""
    group = dist.group.WORLD
    models = [
        load_model(folder, ep_group=group),
        load_model(folder, ep_group=group, dispatcher="all_to_all"),
        load_model(folder),
    ]
    return [models[0].blocks[3].mlp.spec.dispatcher] + [
        f"{len(m.blocks[3].mlp.held_experts)} experts here" for m in models
    ]


def test_a_local_model_loads_onto_several_ranks(tmp_path):
    save_model(tiny_moe_vit(LTDR), tmp_path)
    assert run_ranks(check_saved_local, 2, str(tmp_path)) == [
        ["auto", "3 experts here", "3 experts here", "5 experts here"],
        ["auto", "2 experts here", "2 experts here", "5 experts here"],
    ]


def test_one_process_has_no_expert_parameters():
    model = tiny_moe_vit(LTDR)
    assert expert_parameters(model) == []
    assert len(replicated_parameters(model)) == len(list(model.parameters()))
    assert gather_state_dict(model).keys() == model.state_dict().keys()
    model(data()[0]).sum().backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    average_expert_gradients_(model)
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    expected = nn.utils.get_total_norm(after)
    assert clip_grad_norm_(model, 1e-3) == expected
    assert nn.utils.get_total_norm(after) == pytest.approx(1e-3, rel=1e-3)


def test_global_balance_without_other_ranks_is_the_plain_one():
    model = tiny_moe_vit(GMOE)
    with collect_routing(model) as routings:
        model(data()[0])
    here = MoESpec.from_dict({**GMOE.to_dict(), "router_options": {}})
    assert balance_loss(routings, GMOE) == balance_loss(routings, here)
