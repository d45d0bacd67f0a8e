"""Collecting routings from outside."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from gmoe_ltdr import balance_loss, collect_routing, moe_layers, preset
from tests.models import tiny_moe_vit


def test_layers_come_in_depth_order():
    model = tiny_moe_vit(preset("ltdr", layers="every_other"), depth=12)
    names = [f"blocks.{i}.mlp" for i in (0, 2, 4, 6, 8, 10)]
    assert list(moe_layers(model)) == names
    with collect_routing(model) as routings:
        model(torch.randn(1, 3, 16, 16))
    assert list(routings) == names


def test_hooks_leave_with_the_context():
    model = tiny_moe_vit(preset("ltdr"))
    with collect_routing(model) as routings:
        pass
    model(torch.randn(1, 3, 16, 16))
    assert routings == {}
    with pytest.raises(KeyError), collect_routing(model):
        raise KeyError
    assert not any(layer.router._forward_hooks for layer in moe_layers(model).values())


def test_two_forwards_are_an_error():
    model = tiny_moe_vit(preset("ltdr"))
    x = torch.randn(1, 3, 16, 16)
    with collect_routing(model):
        model(x)
        with pytest.raises(RuntimeError, match="twice"):
            model(x)


def gate_gradient(use_checkpointing: bool, *, backward_inside: bool = False) -> torch.Tensor:
    spec = preset("gmoe_eea", noise_std=0.0, expert_dropout=0.0)
    model = tiny_moe_vit(spec, drop_path_rate=0.0)
    if use_checkpointing:
        model.set_grad_checkpointing()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with collect_routing(model) as routings:
        out = model(x)
        if backward_inside:
            (out.square().sum() + balance_loss(routings, spec)).backward()
    if not backward_inside:
        (out.square().sum() + balance_loss(routings, spec)).backward()
    return torch.cat(
        [layer.router.gate.expert_embed.grad.flatten() for layer in moe_layers(model).values()]
    )


def test_activation_checkpointing_gives_the_same_gradients():
    reference = gate_gradient(False)
    assert reference.abs().sum() > 0
    torch.testing.assert_close(gate_gradient(True), reference)
    torch.testing.assert_close(gate_gradient(True, backward_inside=True), reference)


def test_reentrant_checkpointing_is_refused():
    model = tiny_moe_vit(preset("ltdr"))
    x = torch.randn(1, 3, 16, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"), collect_routing(model):
        checkpoint(model, x, use_reentrant=True)


def test_evaluation_without_gradients_may_collect():
    model = tiny_moe_vit(preset("ltdr")).eval()
    with collect_routing(model) as routings, torch.no_grad():
        model(torch.randn(1, 3, 16, 16))
    assert len(routings) == 2
