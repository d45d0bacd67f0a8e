"""Trained models come back as they were, or not at all."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import safe_open

from domainbed_ext.algorithms import ERM_ViT
from domainbed_ext.errors import UsageError
from domainbed_ext.hparams import default_hparams
from domainbed_ext.saved_models import load_algorithm, save_algorithm


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.tied = self.layer  # the same tensors under two names
        self.register_buffer("empty", torch.empty(0, 4))


def test_a_model_is_safetensors_and_json(tmp_path):
    save_algorithm(tmp_path, Tied(), {"b": 1, "a": [2]})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = {name.rpartition(".")[2] for name in file.keys()}
    assert names == {"weight", "bias", "empty"}
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o044


@pytest.fixture
def saved(tmp_path):
    hparams = default_hparams("ERM_ViT", "RotatedDigits")
    algorithm = ERM_ViT((1, 16, 16), 10, 5, hparams)
    info = {
        "args": {"algorithm": "ERM_ViT"},
        "model_hparams": hparams,
        "model_input_shape": [1, 16, 16],
        "model_num_classes": 10,
        "model_num_domains": 5,
    }
    save_algorithm(tmp_path, algorithm, info)
    return tmp_path, algorithm.eval()


def test_a_model_comes_back(saved):
    folder, algorithm = saved
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(load_algorithm(folder).predict(x), algorithm.predict(x))


def cut_off(folder):
    os.truncate(folder / "model.safetensors", 5000)


def flip_a_bit(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def break_json(folder):
    path = folder / "model.json"
    path.write_text(path.read_text()[:-50])


def no_object(folder):
    (folder / "model.json").write_text("17")


def lose_a_key(folder):
    info = json.loads((folder / "model.json").read_text())
    del info["model_hparams"]
    (folder / "model.json").write_text(json.dumps(info))


def change_hparams(folder):
    info = json.loads((folder / "model.json").read_text())
    info["model_num_classes"] = 7
    (folder / "model.json").write_text(json.dumps(info))


def lose_json(folder):
    (folder / "model.json").unlink()


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (cut_off, r"model\.safetensors is damaged \(its checksum"),
        (flip_a_bit, r"model\.safetensors is damaged \(its checksum"),
        (break_json, r"model\.json is damaged"),
        (no_object, r"model\.json is damaged"),
        (lose_a_key, r"model\.json is damaged \(it lacks model_hparams\)"),
        (change_hparams, r"model\.safetensors does not fit model\.json"),
        (lose_json, r"model\.json does not exist"),
    ],
)
def test_damaged_models_are_refused_in_one_line(saved, harm, expected):
    folder, _ = saved
    harm(folder)
    with pytest.raises(UsageError, match=expected) as caught:
        load_algorithm(folder)
    assert "\n" not in str(caught.value)
