"""Weight averages: by hand, in the place of the trained weights, in runs, and in tables."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from sweep_records import make_record
from torch import nn

from domainbed_ext import training
from domainbed_ext.algorithms.base import Algorithm
from domainbed_ext.checkpoint import load_training_state, training_state
from domainbed_ext.errors import UsageError
from domainbed_ext.hparams import default_hparams, parse_hparams, with_overrides
from domainbed_ext.learning_curves import curves_frame
from domainbed_ext.loss_valley import LossValley
from domainbed_ext.records import read_records
from domainbed_ext.saved_models import load_algorithm
from domainbed_ext.selection import LeaveOneDomainOut, Oracle, TrainingDomainValidation
from domainbed_ext.table_checks import sweep_notes
from domainbed_ext.tables import results_frame
from domainbed_ext.train_args import TrainArgs
from domainbed_ext.training_job import train
from domainbed_ext.weight_averaging import (
    ExponentialAverage,
    ValleyAverage,
    averaging_kind,
    create_average,
    renew_batch_norm_,
)
from gmoe_ltdr import create_moe_vit, preset
from tests.distributed import run_ranks
from tests.models import TINY


def valley(losses, n_converge=3, n_tolerance=6, tolerance_ratio=0.3):
    found = LossValley(n_converge, n_tolerance, tolerance_ratio)
    for number, loss in enumerate(losses):
        found.observe(loss, (number,))
    return found


def test_the_window_by_hand():
    # Evaluation 4 (0.40) is the first that the next two do not undercut: converged. Threshold
    # 1.3 * (0.40 + 0.45 + 0.50) / 3 = 0.585. Looking back from 4, the loss was at most that from
    # evaluation 3 (0.55) on, so segment 4 is the first behind it. 0.60 is above and 0.58 below
    # again, so 6 to 8 belong to the window.
    losses = [1.0, 0.9, 0.7, 0.55, 0.40, 0.45, 0.50, 0.60, 0.58]
    found = valley(losses)
    assert found.threshold == pytest.approx(0.585)
    assert found.result() == (4, 5, 6, 7, 8)
    # Six in a row above it are the end, and nothing comes after the end.
    over = [*losses, 0.6, 0.7, 0.6, 0.7, 0.6, 0.7]
    assert not valley(over[:-1]).is_over
    assert valley(over).is_over
    assert valley([*over, 0.1, 0.1]).result() == (4, 5, 6, 7, 8)
    # Five of them are forgiven.
    assert valley([*over[:-1], 0.5]).result() == tuple(range(4, 15))


def test_the_window_looks_back():
    # Converged at 4, threshold 1.3 * 0.41: at most that since evaluation 1, three back, which is as
    # far as it looks; segment 2 is the first behind it.
    assert valley([0.44, 0.43, 0.42, 0.41, 0.40, 0.41, 0.42]).result() == (2, 3, 4, 5, 6)
    # As many evaluations of tolerance as of convergence: no looking back.
    assert valley([0.44, 0.43, 0.42, 0.41, 0.40, 0.41, 0.42], n_tolerance=3).result() == (4, 5, 6)
    # Never behind the segment that converged, whatever came before it.
    assert valley([9, 9, 0.40, 0.41, 0.42]).result() == (2, 3, 4)


def test_converging_at_once():
    assert valley([0.4, 0.5, 0.5]).result() == (0, 1, 2)
    assert valley([0.4, 0.9, 0.9]).result() == (0, 1, 2)  # threshold 0.95
    assert valley([0.4, 0.5], n_converge=1).result() == (0, 1)


def test_a_loss_that_has_not_converged_leaves_the_last_segment():
    assert valley([0.5, 0.4, 0.3]).result() == (2,)
    assert valley([0.5]).result() == (0,)
    assert valley([0.5, 0.4, 0.3]).threshold is None


def test_a_loss_that_is_no_number_is_a_high_one():
    assert valley([float("nan"), 0.5, 0.4, 0.4, 0.4]).result() == (2, 3, 4)


def test_only_what_may_be_needed_is_kept():
    falling = [1 / (1 + n) for n in range(50)]
    assert len(valley(falling).recent) == 4  # the lowest, and three to look back to
    assert valley([*falling, 0.021, 0.021]).result() == (47, 48, 49, 50, 51)


class Toy(Algorithm):
    """One weight, which each update raises by one, a counter, and a BatchNorm."""

    def __init__(self, **hparams):
        super().__init__((1,), 1, 1, hparams)
        self.network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
        self.network[0].weight.data.fill_(0.0)
        options = {**default_hparams("ERM_ViT", "PACS"), **hparams}
        self.average = create_average({"network": self.network}, options)

    @property
    def weight(self):
        return self.network[0].weight.item()

    def update(self, minibatches=(), unlabeled=None):
        self.network[0].weight.data += 1
        self.network[1].num_batches_tracked += 1
        if self.average is not None:
            self.average.update()
        return {}

    def predict(self, x):
        return self.network(x)


def test_the_mean_of_a_valley_by_hand():
    toy = Toy(weight_averaging="swad")
    # Segments of 1, 2, 3, 2, 2 and 1 steps; after step n the weight is n + 1.
    for steps, loss in ((1, 0.9), (2, 0.8), (3, 0.4), (2, 0.5), (2, 0.6), (1, 0.9)):
        for _ in range(steps):
            toy.update()
        toy.average.observe(loss)
    assert toy.average.weights_in_evaluation == "raw"
    assert toy.eval().weight == 11
    toy.train().average.finish()
    # Converged at 0.4, threshold 0.65: segments 2, 3 and 4, weights 4 to 10, each as often.
    assert toy.average.steps == range(3, 10)
    assert toy.eval().weight == pytest.approx((4 + 5 + 6 + 7 + 8 + 9 + 10) / 7)
    assert toy.network[1].num_batches_tracked == 10  # whole numbers: the last one of the window
    assert toy.train().weight == 11
    assert toy.average.describe() == (
        "SWAD: the mean of the weights after steps 3 to 9; the threshold was a validation loss of "
        "0.65"
    )


def test_the_exponential_average_by_hand():
    toy = Toy(weight_averaging="ema", ema_decay=0.25)
    expected = 1.0
    for step in range(1, 6):
        toy.update()
        # (1 + n) / (10 + n): 2/11, 3/12 = 0.25, from then on the decay itself
        old = {1: 0.0, 2: 2 / 11}.get(step, 0.25)
        expected = old * expected + (1 - old) * step
    assert toy.eval().weight == pytest.approx(expected)
    assert toy.train().weight == 5


@pytest.mark.parametrize(
    ("hparams", "kind"),
    [
        ({}, "none"),
        ({"weight_averaging": "ema"}, "ema"),
        ({"ema_decay": 0.9}, "ema"),  # how it was asked for before there was a choice
        ({"weight_averaging": "swad"}, "swad"),
    ],
)
def test_what_hparams_ask_for(hparams, kind):
    assert averaging_kind({**default_hparams("LTDR", "PACS"), **hparams}) == kind
    average = Toy(**hparams).average
    assert ("none" if average is None else average.kind) == kind
    if kind == "ema":
        assert average.decay == hparams.get("ema_decay", 0.999)


def averaged_toy(kind):
    toy = Toy(weight_averaging=kind, ema_decay=0.1 if kind == "ema" else 0.0)
    for _ in range(4):
        toy.update()
    if kind == "swad":
        toy.average.observe(0.5)
        toy.average.finish()
    return toy


@pytest.mark.parametrize("kind", ["ema", "swad"])
def test_trained_and_averaged_weights_never_mix(kind):
    toy = averaged_toy(kind)
    mean = toy.average.averaged.network[0].weight.item()
    assert mean != toy.weight == 4
    for evaluating in (True, False):
        toy.train(not evaluating)
        state = toy.state_dict()
        assert state["network.0.weight"].item() == 4
        assert state["average.averaged.network.0.weight"].item() == mean
        assert toy.weight == (mean if evaluating else 4)
        # a copy is in the same mode, and on its own
        twin = copy.deepcopy(toy)
        assert twin.train().weight == 4
        assert toy.weight == (mean if evaluating else 4)
    fresh = Toy(weight_averaging=kind).eval()
    fresh.load_state_dict(state)
    assert fresh.weight == mean
    assert fresh.train().weight == 4
    with torch.inference_mode():
        assert fresh.eval().weight == mean
        fresh.train()
    fresh.network[0].weight.sum().backward()  # still a tensor that trains
    with fresh.average.withheld():
        assert fresh.average.weights_in_evaluation == "raw"
        assert fresh.eval().weight == 4
        fresh.train()
    assert fresh.eval().weight == mean
    with pytest.raises(RuntimeError, match=r"call train\(\)"):
        fresh.update()


def test_statistics_of_batch_norm_are_measured_again():
    toy = averaged_toy("swad")  # the mean weight is 2.5
    kept = toy.network[1].running_mean.item()
    batches = [torch.tensor([[1.0], [3.0]]), torch.tensor([[4.0], [8.0]])]
    renew_batch_norm_(toy, iter(batches))
    assert toy.training
    assert toy.network[1].training
    assert toy.network[1].momentum == 0.1
    assert toy.network[1].running_mean.item() == kept  # the trained network's are its own
    # means of the outputs: 2.5 * 2 and 2.5 * 6; unbiased variances: 6.25 * 2 and 6.25 * 8
    norm = toy.eval().network[1]
    assert norm.running_mean.item() == pytest.approx(2.5 * 4)
    assert norm.running_var.item() == pytest.approx(6.25 * 5)


def test_frozen_batch_norm_is_left_alone():
    toy = averaged_toy("swad")
    toy.network[1].eval()
    renew_batch_norm_(toy, iter([None]))  # no batch is taken
    assert toy.eval().network[1].running_mean.item() == 0


def test_a_stopped_average_goes_on_bit_for_bit():
    losses = [0.9, 0.8, 0.4, 0.5, 0.6, 0.9, 0.5, 0.9, 0.9]
    whole = Toy(weight_averaging="swad")
    for steps, loss in enumerate(losses, start=1):
        for _ in range(steps):
            whole.update()
        whole.average.observe(loss)
    whole.average.finish()
    for stop in range(len(losses)):
        parts = Toy(weight_averaging="swad")
        for steps, loss in enumerate(losses, start=1):
            for step in range(steps):
                if (steps - 1, step) == (stop, steps // 2):
                    state = copy.deepcopy(training_state(parts))
                    parts = Toy(weight_averaging="swad")
                    load_training_state(parts, state)
                parts.update()
            parts.average.observe(loss)
        parts.average.finish()
        assert parts.average.steps == whole.average.steps
        for name, value in parts.state_dict().items():
            assert torch.equal(value, whole.state_dict()[name]), name


SMALL = {"dataset": "Debug28", "steps": 14, "checkpoint_freq": 2, "device": "cpu"}
# Converged at the third evaluation (step 4), threshold 1.3 * 0.5; the window ends with step 8.
LOSSES = {0: 0.9, 2: 0.8, 4: 0.4, 6: 0.5, 8: 0.6, 10: 0.9, 12: 0.9, 13: 0.9}
SWAD = {"weight_averaging": "swad", "swad_n_tolerance": 3}


def arguments(folder, algorithm="LTDR", hparams=SWAD, **changes):
    own = {"batch_size": 8} if algorithm == "ERM" else {}
    options = {**SMALL, "algorithm": algorithm, "hparams": {**own, **hparams}, **changes}
    return TrainArgs(output_dir=folder, **options)


@pytest.fixture(scope="module")
def scripted_losses():
    """Runs whose validation loss is that of `LOSSES`, whatever they learn."""
    real = training.evaluate

    def evaluate(algorithm, *args, loss_of=(), **kwargs):
        results = real(algorithm, *args, loss_of=loss_of, **kwargs)
        step = getattr(algorithm.average, "_num_steps", 0) - 1
        return {**results, **{f"{name}_loss": LOSSES[step] for name in loss_of}}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "evaluate", evaluate)
        yield


@pytest.fixture(scope="module")
def finished(scripted_losses, tmp_path_factory):
    """A run of LTDR that nothing has stopped: its folder and its records."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(arguments(folder))


class Stop(BaseException):
    """Ends a run at a step, as Ctrl-C would."""


def stop_at(step, phase="training"):
    def progress(state):
        if (state.step, state.phase) == (step, phase):
            raise Stop

    return progress


def comparable(records):
    dropped = ("step_time", "args", "mem_gb")
    return [{name: value for name, value in r.items() if name not in dropped} for r in records]


def test_a_run_ends_with_the_record_of_its_average(finished):
    check_finished(*finished)


def test_so_does_one_of_erm(scripted_losses, tmp_path, capsys):
    check_finished(tmp_path, train(arguments(tmp_path, "ERM")))
    assert "SWAD: the mean of the weights after steps 3 to 8" in capsys.readouterr().out


def check_finished(folder, records):
    assert records == read_records(folder / "results.jsonl")
    assert [record["step"] for record in records] == [0, 2, 4, 6, 8, 10, 12, 13, 13]
    assert [r["provenance"]["weights"] for r in records] == ["raw"] * 8 + ["swad"]
    assert [r["env1_out_loss"] for r in records[:-1]] == list(LOSSES.values())
    assert "env0_out_loss" not in records[0]  # of the test domain nothing is looked at
    last = records[-1]
    assert (last["swad_first_step"], last["swad_last_step"]) == (3, 8)
    accuracies = {name for name in records[0] if name.endswith("_acc")}
    assert accuracies < set(last)
    assert not any(name.endswith("_loss") for name in last)
    # the saved model predicts with the average, and holds the last weights too
    algorithm = load_algorithm(folder)
    assert algorithm.weights_in_evaluation == "swad"
    weights = [parameter.detach().clone() for parameter in algorithm.parameters()]
    algorithm.train()
    assert any(not torch.equal(a, b) for a, b in zip(weights, algorithm.parameters(), strict=True))


def test_a_run_stops_where_the_window_has_ended(tmp_path, scripted_losses):
    hparams = {**SWAD, "swad_n_tolerance": 2}
    records = train(arguments(tmp_path, "ERM_ViT", hparams))
    # 0.9 at steps 10 and 12: two above the threshold
    assert [record["step"] for record in records] == [0, 2, 4, 6, 8, 10, 12, 12]
    assert records[-1]["provenance"]["weights"] == "swad"
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize(
    "stops",
    [[(1, "training"), (6, "training")], [(9, "training")], [(14, "evaluating")] * 2],
)
def test_a_stopped_run_ends_with_the_same_records(tmp_path, finished, stops):
    for step, phase in stops:
        with pytest.raises(Stop):
            train(arguments(tmp_path), progress=stop_at(step, phase))
    assert comparable(train(arguments(tmp_path))) == comparable(finished[1])


def test_a_last_record_without_a_model_is_made_again(tmp_path, finished, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(training, "save_algorithm", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(arguments(tmp_path))
    assert len(read_records(tmp_path / "results.jsonl")) == len(finished[1])
    assert comparable(train(arguments(tmp_path))) == comparable(finished[1])


@pytest.mark.parametrize("evaluate_raw", [False, True])
def test_the_trained_weights_are_evaluated_only_when_asked_for(tmp_path, monkeypatch, evaluate_raw):
    seen = []
    real = training.evaluate

    def evaluate(algorithm, loaders, **options):
        seen.append(algorithm.weights_in_evaluation)
        return real(algorithm, loaders, **options)

    monkeypatch.setattr(training, "evaluate", evaluate)
    hparams = {"weight_averaging": "ema", "ema_decay": 0.99, "evaluate_raw": evaluate_raw}
    averaged = train(arguments(tmp_path / "ema", "ERM_ViT", hparams, steps=5))
    assert seen == (["ema", "raw"] if evaluate_raw else ["ema"]) * 3
    assert all(record["provenance"]["weights"] == "ema" for record in averaged)
    assert ("env0_in_raw_acc" in averaged[0]) is evaluate_raw
    if evaluate_raw:
        # the other number is that of the same run without an average
        plain = train(arguments(tmp_path / "none", "ERM_ViT", {}, steps=5))
        for record, raw in zip(averaged, plain, strict=True):
            for name in (n for n in raw if n.endswith("_acc")):
                split, _, kind = name.partition("_class_acc" if "class" in name else "_acc")
                suffix = "_raw_class_acc" if "class" in name else "_raw_acc"
                assert record[split + suffix] == raw[name], kind
            assert record["loss"] == raw["loss"]
            assert raw["provenance"]["weights"] == "raw"


def swad_run(test_envs, average, *, step=40, **options):
    """Raw records with tempting accuracies, then the average's."""
    hparams = {"weight_averaging": "swad"}
    raw = [
        make_record(
            test_envs, step=s, in_acc=[0.9] * 3, out_acc=[0.9] * 3,
            provenance={"weights": "raw"}, **options,
        )
        for s in (0, step)
    ]  # fmt: skip
    last = make_record(
        test_envs, step=step, in_acc=[average] * 3, out_acc=[0.5] * 3,
        provenance={"weights": "swad"}, **options,
    )  # fmt: skip
    return [{**record, "hparams": hparams} for record in [*raw, last]]


@pytest.mark.parametrize("method", [TrainingDomainValidation, Oracle])
def test_tables_show_the_average(method):
    records = swad_run([0], 0.7)
    assert method.sweep_acc(records) == 0.7
    frame = results_frame(records, selection=method)
    assert frame["mean"][0] == pytest.approx(70)
    (note,) = sweep_notes(records, None)
    assert note == "Debug28: the accuracies of ERM are of averaged weights (swad)"
    # of a run that has not ended, nothing is shown
    frame = results_frame(records[:-1], selection=method)
    assert np.isnan(frame["mean"][0])
    assert "evaluated when a run has ended" in frame["reason"][0]
    assert method.ceiling_best(swad_run([], 0.6), 1).test == 0.6


def test_left_out_domains_are_compared_where_each_run_ended():
    records = [*swad_run([0], 0.7, step=40), *swad_run([0, 1], 0.3, step=20)]
    records += swad_run([0, 2], 0.5, step=60)
    best = LeaveOneDomainOut.sweep_best(records)
    assert (best.val, best.test) == (pytest.approx(0.4), 0.7)


def test_curves_are_of_the_weights_that_train():
    curves = curves_frame(swad_run([0], 0.7)).query("metric == 'test'")
    assert curves["step"].tolist() == [0, 40]
    assert curves["value"].tolist() == [90.0, 90.0]


def test_a_row_never_mixes_averaged_and_trained_weights():
    plain = make_record([1], in_acc=[0.5] * 3, out_acc=[0.5] * 3, provenance={"weights": "raw"})
    with pytest.raises(UsageError, match="weights 'swad' and 'raw'"):
        results_frame([*swad_run([0], 0.7), plain])
    results_frame([*swad_run([0], 0.7), {**plain, "provenance": {}}])  # does not say
    other_row = {**plain, "args": {**plain["args"], "algorithm": "LTDR"}}
    results_frame([*swad_run([0], 0.7), other_row])


def test_erm_takes_them_and_stays_domainbeds():
    plain = default_hparams("ERM", "VLCS")
    assert with_overrides(plain, {"lr": 1e-4}, "ERM", "VLCS") == {**plain, "lr": 1e-4}
    overrides = parse_hparams('{"weight_averaging": "swad"}', "ERM", "VLCS")
    hparams = with_overrides(plain, overrides, "ERM", "VLCS")
    published = {"swad_n_converge": 3, "swad_n_tolerance": 6, "swad_tolerance_ratio": 0.2}
    added = {
        **{"weight_averaging": "swad", "ema_decay": 0.0, "evaluate_raw": False, **published},
        **{"precision": "fp32", "eval_batch_size": 64},
        **{"fused_optimizer": "auto", "channels_last": False},
    }
    assert hparams == {**plain, **added}
    assert default_hparams("LTDR", "PACS")["swad_tolerance_ratio"] == 0.3
    assert default_hparams("LTDR", "VLCS")["swad_tolerance_ratio"] == 0.2
    with pytest.raises(UsageError, match="belongs to weight_averaging='ema', not 'swad'"):
        parse_hparams('{"weight_averaging": "swad", "ema_decay": 0.9}', "ERM", "VLCS")


def moved(model, step):
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(torch.full_like(parameter, 0.1 * (number + step)))


def average_of(ep_group):
    torch.manual_seed(0)
    spec = preset("ltdr", num_experts=3, dispatcher="all_to_all" if ep_group else "local")
    model = create_moe_vit("vit_tiny_patch16_224", spec, ep_group=ep_group, **TINY)
    average = ValleyAverage({"network": model}, LossValley(1, 2, 0.3))
    for step, loss in enumerate((0.5, 0.6, 0.9)):
        moved(model, step)
        average.update()
        average.observe(loss)
    return model, average


def share_experts():
    """Two ranks with two and one experts: the state is that of one process, and goes back."""
    _, alone = average_of(None)
    model, shared = average_of(torch.distributed.group.WORLD)
    expected, found = alone.training_state(), shared.training_state()
    assert found["num_beyond"] == 1
    for part in ("window", "beyond"):
        assert found[part]["tensors"].keys() == expected[part]["tensors"].keys()
        for name, value in expected[part]["tensors"].items():
            torch.testing.assert_close(found[part]["tensors"][name], value)
    restored = ValleyAverage({"network": model}, LossValley(1, 2, 0.3))
    restored.load_training_state(expected)
    for average in (restored, shared, alone):
        average.finish()
    name = "network.blocks.2.mlp.experts.fc1_weight"
    held = restored.averaged.state_dict()[name]
    torch.testing.assert_close(held, shared.averaged.state_dict()[name])
    assert len(held) == (2 if torch.distributed.get_rank() == 0 else 1)


def test_experts_of_several_ranks():
    run_ranks(share_experts, 2)


def test_an_exponential_average_is_part_of_the_state_dict():
    average = ExponentialAverage({"network": nn.Linear(1, 1)}, decay=0.5)
    average.update()
    other = ExponentialAverage({"network": nn.Linear(1, 1)}, decay=0.5)
    other.load_state_dict(average.state_dict())
    assert other.num_averaged == 1
    assert torch.equal(other.averaged.network.weight, average.averaged.network.weight)
