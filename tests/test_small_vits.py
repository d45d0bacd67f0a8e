"""Small dense ViTs: shapes, gradients, and what the gradient stem does not react to."""

from __future__ import annotations

import pytest
import timm
import torch

import gmoe_ltdr
from gmoe_ltdr.small_vits import GradientStem, OrientedGradients

MODELS = {
    "vit_dim64_patch4_16": (16, 153_360),
    "vit_dim64_patch4_28": (28, 157_520),
    "vit_dim128_stem16_64": (64, 1_297_136),
    "vit_dim128_stem16_reg1_64": (64, 1_297_136 + 128),
}


def white(n: int = 1, size: int = 64) -> torch.Tensor:
    return torch.ones(n, 3, size, size)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_a_registered_model_learns(name):
    size, _ = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, in_chans=2, img_size=(size, size))
    logits = model(torch.rand(3, 2, size, size) * 2 - 1)
    assert logits.shape == (3, 5)
    (logits * torch.randn(3, 5)).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
        if parameter_name != "head.bias":
            assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", MODELS)
def test_default_size_and_parameters(name):
    size, parameters = MODELS[name]
    model = timm.create_model(name, in_chans=1 if name.endswith("16") else 3, num_classes=16)
    assert model.patch_embed.img_size == (size, size)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", MODELS)
def test_upcycling_keeps_the_function(name):
    size, _ = MODELS[name]
    torch.manual_seed(1)
    dense = timm.create_model(name, num_classes=4, in_chans=3).eval()
    x = torch.rand(2, 3, size, size) * 2 - 1
    with torch.no_grad():
        expected = dense(x)
        sparse = gmoe_ltdr.upcycle_(dense, gmoe_ltdr.preset("ltdr"))
        assert gmoe_ltdr.moe_layers(sparse)
        torch.testing.assert_close(sparse(x), expected, atol=1e-5, rtol=1e-5)


def test_other_multiples_of_the_patch_size_and_no_others():
    model = timm.create_model("vit_dim128_stem16_64", img_size=96, num_classes=3).eval()
    assert model(white(size=96)).shape == (1, 3)
    with pytest.raises(ValueError, match="pass img_size to create_model"):
        model(white(size=64))
    with pytest.raises(ValueError, match="img_size=72x72 is not a multiple of patch_size=16"):
        timm.create_model("vit_dim128_stem16_64", img_size=72)
    with pytest.raises(ValueError, match="patch_size=8 does not fit 3 stages; it is 16"):
        GradientStem(patch_size=8)


def test_logits_do_not_depend_on_batch_mates_in_evaluation():
    torch.manual_seed(2)
    model = timm.create_model("vit_dim128_stem16_64", num_classes=3).eval()
    x = torch.rand(4, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), atol=1e-5, rtol=1e-5)


def test_the_register_token_reaches_the_head_through_attention_alone():
    torch.manual_seed(3)
    with_token = timm.create_model("vit_dim128_stem16_reg1_64", num_classes=3).eval()
    without = timm.create_model("vit_dim128_stem16_64", num_classes=3).eval()
    weights = with_token.state_dict()
    assert weights.pop("reg_token").shape == (1, 1, 128)
    without.load_state_dict(weights)
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        assert with_token.forward_features(x).shape == (2, 17, 128)
        assert (with_token(x) - without(x)).abs().max() > 1e-6
        for model in (with_token, without):
            for block in model.blocks:
                block.attn.proj.weight.zero_()
        torch.testing.assert_close(with_token(x), without(x))


def test_gradients_of_white_are_nothing():
    energies = OrientedGradients()(white())
    assert energies.shape == (1, 9, 32, 32)
    assert energies.abs().max() < 0.01


@pytest.mark.parametrize(("axis", "expected"), [(3, 0), (2, 4)])
def test_an_edge_is_seen_in_its_own_direction(axis, expected):
    # the right (or lower) half black: brightness changes along x (angle 0) or y (8 * 90 / 180 = 4)
    x = white()
    x.narrow(axis, 32, 32).fill_(-1)
    inner = OrientedGradients()(x)[0, :8, 4:-4, 4:-4]
    per_direction = inner.sum((1, 2))
    assert per_direction.argmax() == expected
    # neighbours 22.5 degrees away, 45 at twice the angle: max(cos 45 - 0.4, 0) against 1 - 0.4
    neighbour = per_direction[(expected + 1) % 8] / per_direction[expected]
    assert neighbour == pytest.approx((2**-0.5 - 0.4) / 0.6, abs=1e-3)
    assert per_direction[(expected + 4) % 8] == 0


def test_the_sign_and_the_colour_of_an_edge_do_not_count():
    """Swapping black and white, or the channel that has the contrast, keeps the energies."""
    x = white()
    x[..., 20:44, 20:44] = -1
    gradients = OrientedGradients()

    def energies(image):
        return gradients(image)[0, :8, 4:-4, 4:-4]

    torch.testing.assert_close(energies(-x), energies(x))
    red, blue = white(), white()
    red[:, 1:, 20:44, 20:44] = -1
    blue[:, :2, 20:44, 20:44] = -1
    torch.testing.assert_close(energies(red), energies(blue))


def test_the_gradients_are_not_learnt_and_not_saved():
    stem = GradientStem()
    assert not list(stem.gradients.parameters())
    assert not [key for key in stem.state_dict() if key.startswith("gradients")]


def test_pretrained_weights_do_not_exist():
    with pytest.raises((ValueError, RuntimeError)):
        gmoe_ltdr.create_moe_vit(
            "vit_dim128_stem16_64", gmoe_ltdr.preset("ltdr"), pretrained=True, num_classes=3
        )
