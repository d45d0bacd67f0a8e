"""The algorithms behind DomainBed's contract."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from domainbed_ext.algorithms import ALGORITHMS, get_algorithm_class
from domainbed_ext.algorithms.base import domains_of
from domainbed_ext.backbones import spec_from_hparams
from domainbed_ext.errors import UsageError
from domainbed_ext.hparams import CORE_ALGORITHMS, default_hparams
from domainbed_ext.optimization import learning_rate_factor
from gmoe_ltdr import balance_loss, collect_routing, moe_layers, preset
from gmoe_ltdr.tail import TailRule
from tests.teachers import untrained_teacher

VIT = [name for name in ALGORITHMS if name != "ERM"]
COMPARISON = [name for name in VIT if name not in CORE_ALGORITHMS]
SHAPE = (3, 28, 28)
EIGHTH = torch.tensor(0.125)
NEEDED = {"EVOMOE": {"schedule_steps": 100}}
# losses of their own that do not vanish with the task's
LIGHT = {"STGC": {"stgc_weight": 0.1}, "DISTILL": {"distill_weight": 0.1}}


def create(name: str, **changes):
    needed = NEEDED.get(name, {})
    if name == "DISTILL":
        needed = {"distill_teacher": untrained_teacher()}
    torch.manual_seed(0)
    hparams = {**default_hparams(name, "Debug28"), **needed, **changes}
    algorithm = get_algorithm_class(name)(SHAPE, 2, 2, hparams)
    algorithm.prepare([[batch] for batch in minibatches(batch=24, seed=9)])
    return algorithm


def minibatches(num_domains: int = 2, batch: int = 4, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(batch, *SHAPE, generator=generator),
            torch.randint(0, 2, (batch,), generator=generator),
        )
        for _ in range(num_domains)
    ]


def one_step(algorithm):
    torch.manual_seed(0)
    return algorithm.update(minibatches())


def test_names():
    assert ALGORITHMS == [*CORE_ALGORITHMS, *COMPARISON]
    assert CORE_ALGORITHMS == ("ERM", "ERM_ViT", "GMOE", "GMOE_DAR", "GMOE_EEA", "LTDR")
    assert COMPARISON == [
        *("TASK", "CLUSTER", "INSTRUCT", "DISTRIBUTION"),
        *("DYNAMIC", "STGC", "DEEPSEEK", "GROUPS", "EVOMOE", "DISTILL"),
    ]
    with pytest.raises(UsageError, match="unknown algorithm 'SGMOE'"):
        get_algorithm_class("SGMOE")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_contract(name):
    algorithm = create(name)
    first = algorithm.update(minibatches())
    algorithm.update(minibatches(), None)
    assert all(type(value) is float for value in first.values())
    json.dumps({key: np.mean([value]) for key, value in first.items()})
    algorithm.eval()
    with torch.inference_mode():
        for batch in (1, 3):
            assert algorithm.predict(torch.randn(batch, *SHAPE)).shape == (batch, 2)
    copy.deepcopy(algorithm)  # weight averaging copies algorithms between steps
    twin = create(name)
    twin.load_state_dict(algorithm.state_dict())
    twin.eval()
    x = torch.randn(2, *SHAPE)
    assert torch.equal(twin.predict(x), algorithm.predict(x))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_batch_can_be_learnt(name):
    algorithm = create(name, lr=1e-3, **LIGHT.get(name, {}))
    data = minibatches()
    losses = [algorithm.update(data)["loss"] for _ in range(25)]
    assert losses[-1] < 0.3 < losses[0]


@pytest.mark.parametrize("name", VIT)
def test_predictions_belong_to_the_image(name):
    algorithm = create(name).eval()
    x = torch.randn(6, *SHAPE) * torch.tensor([0.1, 1, 3, 0.3, 2, 5]).view(6, 1, 1, 1)
    together = algorithm.predict(x)
    for i in range(6):
        torch.testing.assert_close(algorithm.predict(x[i : i + 1])[0], together[i])


def test_ablations_are_two_switches():
    specs = {n: create(n).spec for n in ("GMOE", "GMOE_DAR", "GMOE_EEA", "LTDR")}
    assert specs["GMOE"] == preset("gmoe")
    assert specs["LTDR"] == preset("ltdr")
    assert specs["GMOE_DAR"] == preset("gmoe_dar")
    assert specs["GMOE_EEA"] == preset("gmoe_eea")


def test_images_know_their_training_domain():
    data = [minibatches(1, batch)[0] for batch in (1, 3, 2)]
    assert domains_of(data).tolist() == [0, 1, 1, 1, 2, 2]
    seen = []

    class Listener(type(create("LTDR"))):
        def loss(self, x, y, domains):
            seen.append(domains.tolist())
            return super().loss(x, y, domains)

        def after_step(self):
            seen.append("stepped")

    Listener(SHAPE, 2, 3, default_hparams("LTDR", "Debug28")).update(data)
    assert seen == [[0, 1, 1, 1, 2, 2], "stepped"]


def test_routers_are_told_of_the_images():
    class Informed(type(create("LTDR"))):
        def describe_images(self, x, domains):
            means = {"embedding_BD": x.mean((1, 2, 3)).unsqueeze(-1)}
            return means if domains is None else {**means, "domain_B": domains}

    hparams = default_hparams("LTDR", "Debug28")
    algorithm = Informed(SHAPE, 2, 2, {**hparams, "ema_decay": 0.9})
    contexts = []
    for layer in moe_layers(algorithm.network).values():
        layer.router.register_forward_pre_hook(lambda _, inputs: contexts.append(inputs[1]))
    data = minibatches()
    x, _ = (torch.cat(parts) for parts in zip(*data, strict=True))
    algorithm.update(data)
    assert [c.domain_B.tolist() for c in contexts] == [[0] * 4 + [1] * 4] * 2
    contexts.clear()
    algorithm.eval().predict(x[:3])  # by averaged weights
    assert len(contexts) == 2
    for context in contexts:
        assert context.domain_B is None
        torch.testing.assert_close(context.embedding_BD[:, 0], x[:3].mean((1, 2, 3)))
    algorithm.network(x)  # another batch: what was told of the last one is gone


def test_losses_of_a_router_are_recorded_and_added():
    algorithm = create("LTDR")
    plain = create("LTDR")
    for layer in moe_layers(algorithm.network).values():
        layer.router.register_forward_hook(
            lambda _router, _inputs, plan: replace(plan, router_losses={"busy_loss": EIGHTH})
        )
    numbers = [one_step(each) for each in (algorithm, plain)]
    assert numbers[0]["busy_loss"] == numbers[0]["balance_loss"] == 0.25  # two layers
    assert "busy_loss" not in numbers[1]
    assert numbers[0]["loss"] == pytest.approx(numbers[1]["loss"] + 0.25, abs=1e-6)


def test_loss_is_task_plus_balance():
    algorithm = create("GMOE_EEA", moe_noise_std=0.0, moe_expert_dropout=0.0, drop_path=0.0)
    x, y = (torch.cat(parts) for parts in zip(*minibatches(), strict=True))
    task = F.cross_entropy(algorithm.network(x), y).item()
    numbers = algorithm.update(minibatches())
    assert numbers["balance_loss"] > 0
    assert numbers["loss"] == pytest.approx(task + numbers["balance_loss"], abs=1e-6)
    assert 2 < numbers["experts_per_token"] < 6
    assert create("LTDR").update(minibatches())["balance_loss"] == 0


def test_stgc_is_gmoe_and_a_loss_for_conflicting_tokens():
    quiet = {"moe_noise_std": 0.0, "moe_expert_dropout": 0.0, "drop_path": 0.0}
    algorithm = create("STGC", **quiet)
    numbers = algorithm.update(minibatches())
    x, y = (torch.cat(parts) for parts in zip(*minibatches(), strict=True))
    twin = create("STGC", **quiet)
    with collect_routing(twin.network) as routings:
        task = F.cross_entropy(twin.network(x), y)
    gmoe = preset("gmoe_dropless", top_k=2, noise_std=0.0)
    expected = task + balance_loss(routings, gmoe)
    assert 0 < numbers["conflict_share"] < 1
    assert numbers["conflict_loss"] > 0
    assert numbers["loss"] == pytest.approx(expected.item() + numbers["conflict_loss"], abs=1e-6)
    # without weight the step is the same as without that loss, however it computes
    plain = create("STGC", **quiet, stgc_weight=0.0)
    plain.update(minibatches())
    expected.backward()
    for (name, ours), theirs in zip(
        plain.network.named_parameters(), twin.network.parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_hparams_reach_the_spec():
    hparams = {
        **default_hparams("LTDR", "PACS"),
        "moe_num_experts": 4,
        "moe_top_k": 1,
        "moe_layers": [3, 5],
        "ltdr_tail_top_k": 3,
        "ltdr_selection": "vtt_fixed",
        "ltdr_selection_fraction": 0.2,
        "ltdr_eval_tail_scope": "batch",
    }
    spec = spec_from_hparams("ltdr", hparams)
    assert (spec.num_experts, spec.top_k, spec.tail_top_k, spec.layers) == (4, 1, 3, (3, 5))
    assert spec.tail_rule == TailRule("quantile", 0.2, scope="batch", eval_scope="batch")
    for selection, kind in (("vht", "mean"), ("iat", "attention"), ("vtt_learned", "learned")):
        rule = spec_from_hparams("ltdr", {**hparams, "ltdr_selection": selection}).tail_rule
        assert rule.kind == kind
    with pytest.raises(UsageError, match="tail_top_k=5"):
        spec_from_hparams("ltdr", {**hparams, "ltdr_tail_top_k": 5})
    with pytest.raises(UsageError, match="ltdr_selection='best'"):
        spec_from_hparams("ltdr", {**hparams, "ltdr_selection": "best"})


@pytest.mark.parametrize(
    "selection", ["vtt", "vht", "vtt_fixed", "vtt_learned", "iat", "expert_choice"]
)
def test_every_selection_trains(selection):
    algorithm = create("LTDR", ltdr_selection=selection)
    numbers = algorithm.update(minibatches())
    assert 0 < numbers["tail_share"] < 1
    with collect_routing(algorithm.network) as routings:
        algorithm.predict(minibatches()[0][0])
    assert all(plan.tail_mask_T.any() for plan in routings.values())


def test_experts_choose_in_ltdr():
    spec = create("LTDR", ltdr_selection="expert_choice", ltdr_tail_scope="image").spec
    scopes = {"scope": "image", "eval_scope": "image"}
    assert spec == preset("ltdr_expert_choice", router_options=scopes)
    with pytest.raises(UsageError, match="use the algorithm LTDR"):
        create("GMOE_EEA", ltdr_selection="expert_choice")
    with pytest.raises(UsageError, match="equally many tokens, but capacity_factor"):
        create("LTDR", ltdr_selection="expert_choice", moe_capacity_factor=1.5)


@pytest.mark.parametrize("name", ["LTDR", *COMPARISON])
def test_bfloat16_trains_and_predicts_float32(name):
    algorithm = create(name, precision="bf16")
    assert np.isfinite(algorithm.update(minibatches())["loss"])
    assert algorithm.eval().predict(minibatches()[0][0]).dtype == torch.float32


def test_averaged_weights_make_the_predictions():
    algorithm = create("ERM_ViT", ema_decay=0.9, drop_path=0.0)
    weights = [algorithm.network.head.weight.detach().clone()]
    for step in range(3):
        algorithm.update(minibatches(seed=step))
        weights.append(algorithm.network.head.weight.detach().clone())
    # the first average is a copy, then (1 + n) / (10 + n) of the old remains
    expected = weights[1]
    for n, new in enumerate(weights[2:], start=1):
        decay = (1 + n) / (10 + n)
        expected = decay * expected + (1 - decay) * new
    averaged = algorithm.average.averaged.network.head.weight
    torch.testing.assert_close(averaged, expected)
    torch.testing.assert_close(algorithm.network.head.weight, weights[-1], rtol=0, atol=0)
    algorithm.eval()
    torch.testing.assert_close(algorithm.network.head.weight, expected)
    algorithm.train()
    torch.testing.assert_close(algorithm.network.head.weight, weights[-1], rtol=0, atol=0)


def schedule(name: str, steps: int = 10, warmup: float = 0.0) -> list[float]:
    factor = learning_rate_factor(
        {"schedule": name, "schedule_steps": steps, "warmup_fraction": warmup}
    )
    return [factor(step) for step in range(steps)]


def test_schedules():
    assert schedule("constant") == [1.0] * 10
    assert schedule("constant", warmup=0.5)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    cosine = schedule("cosine", warmup=0.2)
    assert cosine[:2] == pytest.approx([0.5, 1.0])
    assert cosine[5] == pytest.approx(0.5)
    assert cosine[-1] == pytest.approx(0.0, abs=1e-12)
    one_cycle = schedule("one_cycle", steps=100)
    assert max(one_cycle) == pytest.approx(1.0)
    assert one_cycle.index(max(one_cycle)) == 29
    assert one_cycle[0] == pytest.approx(0.04, abs=0.01)
    with pytest.raises(UsageError, match="schedule_steps"):
        schedule("cosine", steps=0)


def test_training_state_continues_bit_for_bit():
    def run(algorithm, steps):
        for step in steps:
            torch.manual_seed(step)
            algorithm.update(minibatches(seed=step))
        return algorithm

    options = {"schedule": "cosine", "schedule_steps": 6, "ema_decay": 0.99}
    whole = run(create("LTDR", **options), range(6))
    first = run(create("LTDR", **options), range(3))
    second = create("LTDR", **options)
    second.load_state_dict(first.state_dict())
    second.load_training_state(copy.deepcopy(first.training_state()))
    run(second, range(3, 6))
    for (name, ours), reference in zip(
        second.state_dict().items(), whole.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, reference), name


def test_optimizer_groups():
    algorithm = create("LTDR", weight_decay=0.05)
    decayed, spared = algorithm.optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    names = {id(p): n for n, p in algorithm.network.named_parameters()}
    assert "blocks.0.mlp.experts.fc1_bias" in {names[id(p)] for p in spared["params"]}
    assert "blocks.0.mlp.experts.fc1_weight" in {names[id(p)] for p in decayed["params"]}
    assert isinstance(create("ERM_ViT", optimizer="adam").optimizer, torch.optim.Adam)


@pytest.mark.parametrize("name", ["vit", "dinov2", "lars"])
def test_networks_that_erm_does_not_have(name):
    with pytest.raises(UsageError, match=name):
        create("ERM", **{name: True})
