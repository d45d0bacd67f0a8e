"""What makes a run faster changes nothing else: optimizer, memory layout, compiler, evaluation."""

from __future__ import annotations

import copy
import logging

import pytest
import timm
import torch
from torch import nn

from domainbed_ext import compilation
from domainbed_ext.algorithms import ERM_ViT, get_algorithm_class
from domainbed_ext.checkpoint import load_training_state, training_state
from domainbed_ext.compilation import (
    SharedGraphDropPath,
    compile_blocks_,
    compiler_works,
    dense_blocks,
    share_graphs_,
)
from domainbed_ext.errors import UsageError
from domainbed_ext.hparam_values import VALUES
from domainbed_ext.hparams import default_hparams, parse_hparams, with_overrides
from domainbed_ext.optimization import as_input, use_fused_kernels_
from domainbed_ext.train_args import TrainArgs
from domainbed_ext.training_job import train
from gmoe_ltdr import moe_layers, preset
from gmoe_ltdr.expert_backends import EXPERT_BACKENDS
from tests.models import tiny_dense_vit, tiny_moe_vit

SHAPE = (3, 28, 28)
QUIET = {"moe_noise_std": 0.0, "moe_expert_dropout": 0.0, "drop_path": 0.0}


def create(name, dataset="Debug28", **changes):
    torch.manual_seed(0)
    hparams = with_overrides(default_hparams(name, dataset), changes, name, dataset)
    return get_algorithm_class(name)(SHAPE, 2, 2, hparams)


def minibatches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(4, *SHAPE, generator=generator), torch.tensor([0, 1, 0, 1])) for _ in range(2)
    ]


def run(algorithm, steps):
    for step in steps:
        torch.manual_seed(step)
        numbers = algorithm.update(minibatches(step))
    return numbers


def differences(first, second):
    pairs = zip(first.state_dict().items(), second.state_dict().values(), strict=True)
    return {n: (a.float() - b.float()).abs().max().item() for (n, a), b in pairs if a.numel()}


@pytest.mark.parametrize("name", ["ERM", "LTDR"])
def test_on_a_cpu_nothing_is_fused_unless_asked_for(name):
    algorithms = {choice: create(name, fused_optimizer=choice) for choice in ("auto", "off", "on")}
    for algorithm in algorithms.values():
        run(algorithm, range(3))
    assert set(differences(algorithms["auto"], algorithms["off"]).values()) == {0.0}
    fused = differences(algorithms["auto"], algorithms["on"])
    # Adam's first steps are of the size of the learning rate where gradients are near zero
    assert 0 < max(fused.values()) < 5e-3
    assert algorithms["on"].optimizer.param_groups[0]["fused"]


def test_a_fused_step_is_adams():
    weights = [nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2)]
    optimizers = [torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1) for weight in weights]
    for optimizer, choice in zip(optimizers, ("off", "on"), strict=True):
        for step in range(1, 5):
            (weight,) = optimizer.param_groups[0]["params"]
            weight.grad = step * weight.detach().cos()
            use_fused_kernels_(optimizer, {"fused_optimizer": choice})
            optimizer.step()
    torch.testing.assert_close(*weights)


def test_fusing_may_begin_in_the_middle():
    """As for a run that was stopped on a CPU and goes on on a GPU."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight], lr=0.1)
    for choice in ("off", "on", "off", "on"):
        weight.grad = torch.ones(2)
        use_fused_kernels_(optimizer, {"fused_optimizer": choice})
        optimizer.step()
    torch.testing.assert_close(weight, torch.full((2,), 0.6))
    assert optimizer.state[weight]["step"] == 4


OPTIONS = {
    "fused": ("LTDR", {"fused_optimizer": "on", "optimizer": "adamw", "weight_averaging": "ema"}),
    "fused Adam": ("ERM", {"fused_optimizer": "on"}),
    "channels last": ("ERM_ViT", {"channels_last": True}),
    "bfloat16 of ERM": ("ERM", {"precision": "bf16", "channels_last": True}),
    "compiled": ("LTDR", {"compile": "blocks", "weight_averaging": "ema", "drop_path": 0.2}),
    "back end": ("LTDR", {"moe_backend": "dense"}),
}


@pytest.fixture
def traced(monkeypatch):
    """Compiling without a compiler: everything is traced, nothing is generated."""
    torch.compiler.reset()
    monkeypatch.setattr(compilation, "compiler_works", lambda device_type: True)
    monkeypatch.setattr(compilation, "_repeatable", lambda: {"backend": "aot_eager"})
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("case", OPTIONS)
def test_a_stopped_run_goes_on_bit_for_bit(traced, case):
    name, options = OPTIONS[case]
    whole, first = create(name, **options), create(name, **options)
    run(whole, range(4))
    run(first, range(2))
    state = copy.deepcopy(training_state(first))
    second = create(name, **options)
    load_training_state(second, state)
    run(second, range(2, 4))
    assert set(differences(whole, second).values()) == {0.0}


@pytest.mark.parametrize("name", ["ERM", "LTDR"])
def test_channels_last_is_the_same_function(name):
    algorithm = create(name, **(QUIET if name == "LTDR" else {})).eval()
    x = minibatches()[0][0]
    expected = algorithm.predict(x)
    algorithm.hparams["channels_last"] = True
    assert as_input(x, algorithm.hparams).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(algorithm.predict(x), expected)
    assert as_input(x, {}) is x
    run(algorithm.train(), range(2))
    # what is saved and what optimizers keep stays as other runs have it
    assert all(p.is_contiguous() and p.grad.is_contiguous() for p in algorithm.parameters())


def test_bfloat16_reaches_erm():
    algorithm = create("ERM", precision="bf16").eval()
    seen = []
    algorithm.classifier.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    assert algorithm.predict(minibatches()[0][0]).dtype == torch.float32
    assert seen == [torch.bfloat16]
    assert create("ERM").predict(minibatches()[0][0]).dtype == torch.float32


def test_compiled_blocks_train_and_eager_ones_predict(traced):
    options = {**QUIET, "moe_layers": [1], "weight_averaging": "ema"}
    plain, compiled = create("LTDR", **options), create("LTDR", **options, compile="blocks")
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    for step in range(3):
        found, expected = run(compiled, [step]), run(plain, [step])
        # routing is collected from compiled networks too
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    called = [block._compiled_call_impl is not None for block in compiled.network.blocks]
    assert called == [True, False, True]
    x = minibatches()[0][0]
    for algorithm in (plain, compiled):
        algorithm.eval()
    with torch._dynamo.config.patch(error_on_recompile=True):  # sizes it has not seen
        for size in (1, 3):
            torch.testing.assert_close(
                compiled.predict(x[:size]), plain.predict(x[:size]), rtol=1e-3, atol=1e-3
            )
    run(copy.deepcopy(compiled).train(), [3])


def test_blocks_that_differ_in_their_drop_path_are_one_graph(traced):
    network = tiny_dense_vit(drop_path_rate=0.2).train()
    share_graphs_(network)
    compile_blocks_(network, torch.device("cpu"))
    counted = torch._dynamo.utils.counters["stats"]
    counted.clear()
    for _ in range(2):
        network(torch.randn(2, 3, 16, 16)).sum().backward()
    assert len(network.blocks) == 4
    assert counted["unique_graphs"] == 1


def test_drop_path_keeps_the_mean():
    path = SharedGraphDropPath(0.25)
    x = torch.ones(4000, 2, 3)
    torch.manual_seed(0)
    dropped = path(x)
    per_image = dropped[:, 0, 0]
    assert per_image.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(dropped, per_image.view(-1, 1, 1).expand_as(x))
    # the standard deviation of this mean is sqrt(1 / 3 / 4000) = 0.009
    assert per_image.mean().item() == pytest.approx(1, abs=0.04)
    assert path.eval()(x) is x


def test_sparse_blocks_are_never_compiled():
    network = tiny_moe_vit(preset("ltdr"))
    dense = dense_blocks(network)
    assert 0 < len(dense) < len(network.blocks)
    assert not any(moe_layers(block) for block in dense)
    with pytest.raises(UsageError, match="ResNet has no `blocks`"):
        dense_blocks(timm.create_model("resnet18"))


def test_no_compiler_costs_one_line(monkeypatch, caplog):
    def broken(function):
        raise RuntimeError("No working C++ compiler found\nand a long story")

    monkeypatch.setattr(torch, "compile", broken)
    compiler_works.cache_clear()
    try:
        algorithm = create("ERM_ViT", compile="blocks")
        with caplog.at_level(logging.WARNING):
            run(algorithm, range(2))
    finally:
        compiler_works.cache_clear()
    (record,) = caplog.records
    assert record.getMessage() == (
        "hparam compile='blocks': the compiler cannot be used here (No working C++ compiler "
        "found); nothing is compiled"
    )
    assert all(block._compiled_call_impl is None for block in algorithm.network.blocks)


@pytest.mark.slow
def test_with_the_real_compiler():
    torch.compiler.reset()
    options = {**QUIET, "moe_layers": [1]}
    plain, compiled = create("LTDR", **options), create("LTDR", **options, compile="blocks")
    for step in range(3):
        expected = run(plain, [step])
        assert run(compiled, [step]) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    again = create("LTDR", **options, compile="blocks")
    run(again, range(3))
    assert set(differences(compiled, again).values()) == {0.0}


def test_backbones_attend_with_fused_kernels():
    for network in (create("ERM_ViT").network, create("LTDR").network):
        assert all(block.attn.fused_attn for block in network.blocks)
    assert all(b.attn.fused_attn for b in timm.create_model("deit_small_patch16_224").blocks)


@pytest.mark.parametrize("backend", ["loop", "blocked", "dense"])
def test_expert_back_ends_are_the_same_function(backend):
    algorithms = [create("LTDR", **QUIET, moe_backend=name) for name in ("auto", backend)]
    losses = [run(algorithm, [0])["loss"] for algorithm in algorithms]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    layers = moe_layers(algorithms[1].network).values()
    assert {layer.experts.backend for layer in layers} == {backend}


def test_back_ends_are_checked():
    assert set(VALUES["moe_backend"].choices) == {"auto", *EXPERT_BACKENDS}
    with pytest.raises(UsageError, match="moe_backend='dense' computes all experts on one device"):
        parse_hparams('{"moe_backend": "dense", "moe_dispatcher": "auto"}', "LTDR", "PACS")
    with pytest.raises(UsageError, match="hparam moe_backend='triton': the triton back end needs"):
        run(create("LTDR", moe_backend="triton"), [0])


def test_evaluation_takes_large_batches_in_the_networks_precision(tmp_path, monkeypatch):
    seen = set()
    real = ERM_ViT.predict

    def predict(self, x):
        hook = self.network.head.register_forward_hook(
            lambda _module, _inputs, out: seen.add(
                (len(x), out.dtype, torch.is_inference_mode_enabled(), self.training)
            )
        )
        logits = real(self, x)
        hook.remove()
        return logits

    monkeypatch.setattr(ERM_ViT, "predict", predict)
    hparams = {"precision": "bf16", "eval_batch_size": 10}
    options = {"algorithm": "ERM_ViT", "dataset": "Debug28", "steps": 1, "device": "cpu"}
    train(TrainArgs(output_dir=tmp_path, hparams=hparams, **options))
    # 13 images of each domain are trained on, 3 held out
    assert seen == {(size, torch.bfloat16, True, False) for size in (10, 3)}


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"compile": "blocks"}, {"moe_backend": "triton"}])
def test_on_a_gpu_equal_runs_are_equal(options):
    runs = []
    for _ in range(2):
        algorithm = create("LTDR", precision="bf16", channels_last=True, **options).to("cuda")
        for step in range(3):
            torch.manual_seed(step)
            algorithm.update([(x.cuda(), y.cuda()) for x, y in minibatches(step)])
        assert algorithm.optimizer.param_groups[0]["fused"]
        runs.append(algorithm)
    assert set(differences(*runs).values()) == {0.0}
