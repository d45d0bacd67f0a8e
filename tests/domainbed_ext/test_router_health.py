"""What records say of the routers, and the warning about one that has collapsed."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from domainbed_ext.algorithms import get_algorithm_class
from domainbed_ext.algorithms.router_health import RouterHealth
from domainbed_ext.hparams import default_hparams
from domainbed_ext.train_args import TrainArgs
from domainbed_ext.training_job import train
from gmoe_ltdr import collect_routing, moe_layers, preset
from tests.distributed import run_ranks
from tests.models import tiny_moe_vit

SHAPE = (3, 28, 28)
LAYERS = ["blocks.0.mlp", "blocks.2.mlp"]


def create(name: str, **changes):
    torch.manual_seed(0)
    return get_algorithm_class(name)(SHAPE, 2, 2, {**default_hparams(name, "Debug28"), **changes})


def take_steps(algorithm, num_steps: int, *, first: int = 0) -> None:
    for step in range(first, first + num_steps):
        torch.manual_seed(step)
        algorithm.update([(torch.randn(4, *SHAPE), torch.tensor([0, 1, 0, 1])) for _ in range(2)])


def test_records_describe_the_routers_since_the_last_one(tmp_path):
    args = {"dataset": "Debug28", "steps": 5, "checkpoint_freq": 2, "device": "cpu"}
    records = train(TrainArgs(algorithm="LTDR", output_dir=str(tmp_path / "sparse"), **args))
    for record, num_steps in zip(records, (1, 2, 2), strict=True):
        assert list(record["router"]) == LAYERS
        for numbers in record["router"].values():
            # two training domains, 8 images each, 7 x 7 patches and a class token
            assert numbers["tokens"] == num_steps * 2 * 8 * 50
            assert sum(numbers["load"]) == pytest.approx(1, abs=1e-5)
            assert len(numbers["domain_load"]) == 2
            assert numbers["experts_per_token"] == pytest.approx(
                2 + 4 * numbers["tail_share"], abs=1e-5
            )
        mean = sum(n["tail_share"] for n in record["router"].values()) / 2
        assert record["tail_share"] == pytest.approx(mean, abs=1e-5)
    # copies of one network at the start, one step apart at the first record
    assert records[0]["router"][LAYERS[0]]["expert_distance"]["mean"] < 0.1
    assert records[2]["router"][LAYERS[0]]["expert_distance"]["mean"] > 0
    assert len(json.dumps(records[-1]["router"])) < 2000  # a line stays readable
    dense = train(TrainArgs(algorithm="ERM_ViT", output_dir=str(tmp_path / "dense"), **args))
    assert "router" not in dense[0]


def test_what_was_counted_survives_a_checkpoint_between_records():
    whole, first, second = (create("GMOE") for _ in range(3))
    take_steps(whole, 5)
    take_steps(first, 3)
    second.load_state_dict(first.state_dict())
    second.load_training_state(copy.deepcopy(first.training_state()))
    take_steps(second, 2, first=3)
    assert second.diagnostics() == whole.diagnostics()
    assert whole.diagnostics() == {"router": {}}  # counts anew


def test_a_checkpoint_of_before_there_were_sums_can_be_loaded():
    algorithm = create("GMOE")
    state = algorithm.training_state()
    del state["router_health"]
    algorithm.load_training_state(state)


def collapse_(algorithm) -> None:
    """Every token scores expert 0 highest and all others equally low."""
    for layer in moe_layers(algorithm.network).values():
        gate = layer.router.gate
        with torch.no_grad():
            gate.proj.weight.zero_()
            gate.proj.bias.fill_(1.0)
            gate.expert_embed.fill_(-1.0)
            gate.expert_embed[:, 0] = 1.0


def test_a_collapsed_router_is_warned_of_once_per_record(caplog):
    algorithm = create("GMOE_DAR", moe_top_k=1, moe_noise_std=0.0, lr=1e-9)
    collapse_(algorithm)
    take_steps(algorithm, 10)
    assert not caplog.messages
    report = algorithm.diagnostics()["router"]
    for message, layer in zip(caplog.messages, LAYERS, strict=True):
        assert message.startswith(f"the router of {layer} has collapsed in the last 10 steps: ")
    assert "no token chose expert 1, 2, 3, 4, 5 of 6; 100% of the first" in caplog.messages[0]
    assert report[LAYERS[0]]["dead_experts"] == [1, 2, 3, 4, 5]
    assert report[LAYERS[0]]["load_entropy"] == 0
    take_steps(algorithm, 9)  # too few to speak of a habit
    algorithm.diagnostics()
    assert len(caplog.messages) == 2


def counted(images: torch.Tensor, domains: torch.Tensor, health: RouterHealth) -> None:
    model = tiny_moe_vit(preset("ltdr")).eval()  # evaluation: what is counted is per image
    with collect_routing(model) as routings, torch.no_grad():
        model(images)
    health.add(routings, domains)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 16, 16, generator=generator)
    return images, torch.tensor([0, 0, 0, 1, 1, 1])


def on_rank(rounds: int) -> tuple:
    from domainbed_ext.distributed import current_ranks

    ranks, health = current_ranks(), RouterHealth(2)
    images, domains = (part[ranks.rank :: ranks.size] for part in data())
    for _ in range(rounds):
        counted(images, domains, health)
    state = health.state()
    resumed = RouterHealth(2)
    resumed.load_state(copy.deepcopy(state))
    model = tiny_moe_vit(preset("ltdr"))
    return state, health.report(model), resumed.report(model)


def test_ranks_report_what_one_process_would():
    ((state, expected, _),) = [on_rank(2)]
    assert len(state) == 1
    for state, report, resumed in run_ranks(on_rank, 2, 2):
        assert report == expected
        assert resumed == report
        alone = RouterHealth(2)  # goes on where two ranks stopped
        alone.load_state(state)
        assert alone.report(tiny_moe_vit(preset("ltdr"))) == expected
