"""Registered names, pretrained weights, saving and loading."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2

import gmoe_ltdr
from gmoe_ltdr import create_moe_vit, load_model, moe_layers, preset, save_model, upcycle_
from tests.models import TINY, tiny_dense_vit, tiny_moe_vit

NAMES = [
    f"{prefix}_{family}_{size}_patch16_224"
    for prefix in ("ltdr", "gmoe")
    for family in ("deit", "vit")
    for size in ("tiny", "small", "base")
]
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_names_are_registered():
    assert set(NAMES) <= set(timm.list_models())
    assert "ltdr_deit_small_patch16_224.fb_in1k" in timm.list_pretrained("ltdr_*")


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(name):
    torch.manual_seed(0)
    model = timm.create_model(name, **{**TINY, "depth": 3})
    out = model(IMAGES)
    assert out.shape == (2, 5)
    assert out.isfinite().all()
    out.mean().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not missing


def test_the_real_size():
    model = timm.create_model("ltdr_deit_small_patch16_224", num_classes=7)
    assert list(moe_layers(model)) == ["blocks.8.mlp", "blocks.10.mlp"]
    dense = 22_050_664 - 1000 * 384 - 1000 + 7 * 384 + 7
    expert = 2 * 384 * 1536 + 1536 + 384
    router = 384 * 256 + 256 + 256 * 6 + 1
    assert sum(p.numel() for p in model.parameters()) == dense + 2 * (5 * expert + router)


def test_features_and_another_spec():
    model = timm.create_model(
        "gmoe_vit_tiny_patch16_224", spec=preset("ltdr", num_experts=3), **TINY
    )
    assert model.blocks[0].mlp.spec.num_experts == 3
    assert model.forward_features(IMAGES).shape == (2, 17, 16)
    assert model.forward_intermediates(IMAGES, indices=[1], intermediates_only=True)[0].ndim == 4


@pytest.fixture
def dense_weights(tmp_path):
    """A file with the weights of a dense tiny model."""
    dense = tiny_dense_vit(seed=3)
    path = tmp_path / "dense.safetensors"
    save_file(dense.state_dict(), path)
    return dense, path


def test_pretrained_weights_reach_every_expert(dense_weights):
    dense, path = dense_weights
    overlay = {"file": str(path), "num_classes": 5, "custom_load": False}
    model = timm.create_model(
        "ltdr_vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, **TINY
    )
    for block in (0, 2):
        experts = model.blocks[block].mlp.experts
        for weight in experts.fc1_weight:
            assert torch.equal(weight, dense.blocks[block].mlp.fc1.weight)
    torch.testing.assert_close(model.eval()(IMAGES), dense.eval()(IMAGES), atol=1e-5, rtol=1e-5)


def test_weights_that_cannot_be_had_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="no pretrained weights"):
        create_moe_vit("vit_small_patch16_18x2_224", preset("ltdr"), pretrained=True)
    overlay = {"file": str(tmp_path / "absent.safetensors")}
    with pytest.raises(RuntimeError, match="could not be loaded"):
        timm.create_model(
            "ltdr_vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, **TINY
        )
    with pytest.raises(ValueError, match="no model 'vit_gigantic'"):
        create_moe_vit("vit_gigantic", preset("ltdr"))


def test_save_and_load(tmp_path):
    model = tiny_moe_vit(preset("ltdr", num_experts=3)).eval()
    folder = save_model(model, tmp_path / "a" / "b")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_model(folder)
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert loaded.blocks[0].mlp.spec == model.blocks[0].mlp.spec
    assert save_model(loaded, tmp_path / "again")
    assert torch.equal(load_model(tmp_path / "again")(IMAGES), model(IMAGES))


def test_save_a_registered_and_an_upcycled_model(tmp_path):
    registered = timm.create_model("gmoe_deit_tiny_patch16_224", **TINY).eval()
    save_model(registered, tmp_path / "registered")
    assert torch.equal(load_model(tmp_path / "registered")(IMAGES), registered(IMAGES))
    upcycled = upcycle_(timm.create_model("vit_tiny_patch16_224", num_classes=3), preset("ltdr"))
    save_model(upcycled.eval(), tmp_path / "upcycled")
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(load_model(tmp_path / "upcycled")(x), upcycled(x))


def test_a_new_head_is_saved_as_it_is(tmp_path):
    model = tiny_moe_vit(preset("ltdr"))
    model.reset_classifier(9)
    save_model(model, tmp_path)
    assert load_model(tmp_path)(IMAGES).shape == (2, 9)


def test_damaged_folders(tmp_path):
    with pytest.raises(ValueError, match="no readable"):
        load_model(tmp_path)
    save_model(tiny_moe_vit(preset("ltdr")), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="does not fit"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="was not written by save_model"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="timm name"):
        save_model(tiny_dense_vit(), tmp_path / "dense")


def test_timm_optimizers_take_the_model():
    create_optimizer_v2(tiny_moe_vit(preset("ltdr")), opt="adamw", lr=1e-3, weight_decay=0.1)


def test_compile_runs():
    model = tiny_moe_vit(preset("ltdr")).eval()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES))


def test_import_is_light_and_silent():
    code = (
        "import sys, time, torch, timm; t = time.process_time(); import gmoe_ltdr; "
        "t = time.process_time() - t; "
        "heavy = 'tutel transformers matplotlib pandas sklearn domainbed_ext.hparams'; "
        "print(sorted(set(heavy.split()) & set(sys.modules)), t < 0.3)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip().endswith("[] True")
    assert run.stderr == ""


def test_public_names():
    assert all(hasattr(gmoe_ltdr, name) for name in gmoe_ltdr.__all__)
