"""EvoMoE's three stages in one run: what each trains, and going on in any of them."""

import copy

import pytest
import torch

from domainbed_ext.algorithms.evomoe import DENSE, EVOLUTION, EVOMOE, ROUTING, Stages
from domainbed_ext.errors import UsageError
from domainbed_ext.hparams import default_hparams, validate_hparams
from gmoe_ltdr import moe_layers
from gmoe_ltdr.evolution import beta_ranges

SHAPE = (3, 28, 28)
# eight steps: 0 to 3 dense, 4 and 5 of evolution, 6 and 7 of routing
NUM_STEPS = 8


def create(**changes) -> EVOMOE:
    torch.manual_seed(0)
    hparams = {**default_hparams("EVOMOE", "Debug28"), "schedule_steps": NUM_STEPS, **changes}
    return EVOMOE(SHAPE, 2, 2, hparams)


def take_step(algorithm, step: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(2, 4, *SHAPE, generator=generator)
    torch.manual_seed(step)
    return algorithm.update([(images, torch.tensor([0, 1, 0, 1])) for images in x])


def state_of(module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def changed_by_step(algorithm, step: int) -> set[str]:
    before = state_of(algorithm.network)
    take_step(algorithm, step)
    after = state_of(algorithm.network)
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_stages_of_a_run():
    stages = Stages.of_run(5001, 0.5, 0.25)
    assert stages == Stages(2500, 3751)
    assert [stages.at(step) for step in (0, 2499, 2500, 3750, 3751, 9000)] == [
        DENSE, DENSE, EVOLUTION, EVOLUTION, ROUTING, ROUTING,
    ]  # fmt: skip
    assert Stages.of_run(100, 0.0, 0.5).at(0) == EVOLUTION
    assert Stages.of_run(1, 0.5, 0.25).at(0) == EVOLUTION  # however short


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_each_stage_trains_its_own(optimizer):
    # weight decay would move what has no gradient but is not frozen
    algorithm = create(optimizer=optimizer, weight_decay=0.1, grad_clip=1.0)
    names = set(state_of(algorithm.network))
    routers = {name for name in names if ".router." in name}
    experts = {name for name in names if ".experts." in name}
    assert len(routers) == 2 * 5
    assert len(experts) == 2 * 4
    for step in range(4):
        changed = changed_by_step(algorithm, step)
        assert not changed & routers
        assert {"head.weight", "patch_embed.proj.weight"} | experts <= changed
    for step in (4, 5):
        assert changed_by_step(algorithm, step) == experts
    for step in (6, 7):
        assert changed_by_step(algorithm, step) == routers
    # Adam has counted the steps that a parameter was trained
    counts = {
        name: int(algorithm.optimizer.state[p]["step"])
        for name, p in algorithm.network.named_parameters()
    }
    assert {counts[name] for name in routers} == {2}
    assert {counts[name] for name in experts} == {6}
    assert {counts[name] for name in names - routers - experts} == {4}


def test_the_classifier_may_be_trained_throughout():
    algorithm = create(evomoe_dense_share=0.0, evomoe_evolution_share=0.5, evomoe_train_head=True)
    head = {"head.weight", "head.bias"}
    for step in range(NUM_STEPS):
        changed = changed_by_step(algorithm, step)
        assert head < changed
        kinds = {".experts." if ".experts." in name else ".router." for name in changed - head}
        assert kinds == {".experts." if step < 4 else ".router."}


def test_the_others_follow_the_first_expert():
    algorithm = create(weight_decay=0.1)
    for step in range(4):
        take_step(algorithm, step)
    low, high = beta_ranges(6).unbind(1)
    for step in (4, 5):
        layers = list(moe_layers(algorithm.network).values())
        before = [layer.experts.fc1_weight.detach().clone() for layer in layers]
        if step == 4:  # they start as copies of the dense network, which the first expert is
            assert all(torch.equal(w, w[:1].expand_as(w)) for w in before)
        numbers = take_step(algorithm, step)
        assert numbers["stage"] == EVOLUTION
        betas = []
        for layer, old in zip(layers, before, strict=True):
            moved = (layer.experts.fc1_weight.detach() - old).flatten(1)
            shares = (moved[1:] @ moved[0]) / moved[0].square().sum()
            torch.testing.assert_close(
                moved[1:], shares.unsqueeze(1) * moved[0], atol=1e-6, rtol=1e-3
            )
            betas.append(1 - shares)
            assert (betas[-1] > low - 1e-3).all()
            assert (betas[-1] < high + 1e-3).all()
        assert not torch.equal(*betas)  # each layer's are its own
    distances = torch.pdist(layers[0].experts.fc1_weight.detach().flatten(1))
    assert distances.min() > 0


@pytest.mark.parametrize("evolution", ["scaled_update", "ema", "one_step"])
def test_every_reading_trains(evolution):
    algorithm = create(evomoe_evolution=evolution, evomoe_hypernetworks="cls", ema_decay=0.9)
    numbers = [take_step(algorithm, step) for step in range(NUM_STEPS)]
    assert [n["stage"] for n in numbers] == [1.0] * 4 + [2.0] * 2 + [3.0] * 2
    assert [n["balance_loss"] > 0 for n in numbers] == [False] * 6 + [True] * 2
    assert all(n["experts_per_token"] == 1 for n in numbers)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_predictions_are_those_of_the_stage_that_was_trained(ema_decay):
    algorithm = create(ema_decay=ema_decay)
    x = torch.randn(2, *SHAPE)
    for step in range(NUM_STEPS):
        take_step(algorithm, step)
        if step not in (3, 5, 6):
            continue
        algorithm.eval()
        expected = algorithm.predict(x)
        layers = moe_layers(algorithm.network).values()
        assert [bool(la.router.first_expert_only) for la in layers] == [step < 6] * 2
        # whether or not the others have a say
        spoilt = copy.deepcopy(algorithm)
        for layer in moe_layers(spoilt.network).values():
            layer.experts.fc1_weight.data[1:] = torch.nan
        assert torch.equal(spoilt.predict(x), expected) == (step < 6)
        algorithm.train()


def test_averaged_experts_are_equal_until_they_evolve():
    algorithm = create(ema_decay=0.9, weight_decay=0.5)
    for step in range(5):
        take_step(algorithm, step)
        algorithm.eval()
        for layer in moe_layers(algorithm.network).values():
            weight = layer.experts.fc1_weight
            assert torch.equal(weight, weight[:1].expand_as(weight)) == (step < 4)
        algorithm.train()


def test_going_on_in_any_stage_bit_for_bit():
    algorithm = create(ema_decay=0.9)
    checkpoints = {}
    for step in range(NUM_STEPS):
        take_step(algorithm, step)
        state = (algorithm.state_dict(), algorithm.training_state())
        checkpoints[step + 1] = copy.deepcopy(state)
    expected, expected_own = checkpoints[NUM_STEPS]
    for stop in (2, 4, 5, 6, 7):  # within each stage, and between two
        resumed = create(ema_decay=0.9)
        state, own = checkpoints[stop]
        resumed.load_state_dict(state)
        resumed.load_training_state(own)
        for step in range(stop, NUM_STEPS):
            take_step(resumed, step)
        for (name, ours), theirs in zip(
            resumed.state_dict().items(), expected.values(), strict=True
        ):
            assert torch.equal(ours, theirs), name
        moments = resumed.training_state()["optimizer"]["state"]
        assert moments.keys() == expected_own["optimizer"]["state"].keys()
        for number, values in expected_own["optimizer"]["state"].items():
            for name, value in values.items():
                assert torch.equal(moments[number][name], value)


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"evomoe_dense_share": 0.5, "evomoe_evolution_share": 0.5}, "leave no step to train"),
        (
            {"evomoe_dense_share": 0.0, "evomoe_train_head": False},
            "would never train the classifier",
        ),
        ({"evomoe_evolution": "ga"}, "evomoe_evolution='ga' is impossible"),
    ],
)
def test_impossible_hparams(hparams, message):
    with pytest.raises(UsageError, match=message):
        validate_hparams(hparams, "EVOMOE", "PACS")


def test_the_length_of_the_run_is_needed():
    with pytest.raises(UsageError, match="needs the hparam schedule_steps"):
        create(schedule_steps=0)
