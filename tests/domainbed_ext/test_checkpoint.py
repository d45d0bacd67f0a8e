"""Checkpoints give back exactly what went in, and appear whole or not at all."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from domainbed_ext import checkpoint as module
from domainbed_ext.checkpoint import (
    load_checkpoint,
    load_rng_state,
    load_training_state,
    rng_state,
    save_algorithm,
    save_checkpoint,
)
from domainbed_ext.errors import UsageError


class Plain(torch.nn.Module):
    """An algorithm with nothing but DomainBed's conventions: parameters and an `optimizer`."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.tied = self.layer  # the same tensors under two names
        self.register_buffer("empty", torch.empty(0, 4))
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=0.1, betas=(0.8, 0.9))

    def step(self):
        self.optimizer.zero_grad()
        self.layer(torch.randn(4, 3)).square().sum().backward()
        self.optimizer.step()


class Scheduled(Plain):
    """And one that keeps more than that."""

    def training_state(self):
        return {"optimizer": self.optimizer.state_dict(), "count": 7, "mean": torch.tensor(0.1)}

    def load_training_state(self, state):
        self.optimizer.load_state_dict(state["optimizer"])
        self.loaded = state


@pytest.fixture(params=[Plain, Scheduled])
def algorithm(request):
    torch.manual_seed(0)
    algorithm = request.param()
    algorithm.step()
    return algorithm


def test_going_on_takes_the_same_steps(algorithm, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, step=5, algorithm=algorithm, info={"name": "x"})
    algorithm.step()
    expected = {name: value.clone() for name, value in algorithm.state_dict().items()}

    other = type(algorithm)()
    loaded = load_checkpoint(path)
    assert (loaded.step, loaded.info) == (5, {"name": "x"})
    load_training_state(other, loaded.training_state)
    assert other.optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    load_rng_state(loaded.rng_state)
    other.step()
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())


def test_an_algorithm_gets_its_own_state_back(tmp_path):
    algorithm = Scheduled()
    save_checkpoint(tmp_path / "c", step=0, algorithm=algorithm, info={})
    load_training_state(algorithm, load_checkpoint(tmp_path / "c").training_state)
    assert algorithm.loaded["count"] == 7
    assert torch.equal(algorithm.loaded["mean"], torch.tensor(0.1))


def test_random_number_generators_go_on(tmp_path):
    def draw():
        return random.random(), np.random.rand(3).tolist(), np.random.randn(), torch.rand(3)

    np.random.randn()  # leaves a second Gaussian behind, which is part of the state
    save_checkpoint(tmp_path / "c", step=0, algorithm=Plain(), info={})
    first = draw()
    load_rng_state(load_checkpoint(tmp_path / "c").rng_state)
    second = draw()
    assert first[:3] == second[:3]
    assert torch.equal(first[3], second[3])
    assert rng_state()["cuda"] == [] or torch.cuda.is_available()


def test_no_tensor_is_stored_twice(tmp_path):
    save_checkpoint(tmp_path / "c", step=0, algorithm=Plain(), info={})
    with safe_open(tmp_path / "c", framework="pt") as file:
        shapes = sorted(tuple(file.get_tensor(name).shape) for name in file.keys())
    # Weight, bias, the empty buffer, and the states of NumPy (624 words) and torch.
    assert shapes[:-1] == [(0, 4), (2,), (2, 3), (624,)]
    assert len(shapes) == 5


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, step=1, algorithm=Plain(), info={})

    def full_disk(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, step=2, algorithm=Plain(), info={})
    assert load_checkpoint(path).step == 1
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_what_is_no_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "checkpoint.safetensors"
    if content is None:
        save_file({"x": torch.zeros(1)}, str(path))
    else:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"checkpoint\.safetensors is not a checkpoint.*delete it"):
        load_checkpoint(path)
    assert load_checkpoint(tmp_path / "nothing") is None


def test_objects_are_refused(tmp_path):
    algorithm = Scheduled()
    algorithm.training_state = lambda: {"object": object()}
    with pytest.raises(TypeError, match="tensors and JSON values, not object"):
        save_checkpoint(tmp_path / "c", step=0, algorithm=algorithm, info={})


def test_a_model_is_safetensors_and_json(tmp_path):
    save_algorithm(tmp_path, Plain(), {"b": 1, "a": [2]})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = {name.rpartition(".")[2] for name in file.keys()}
    assert names == {"weight", "bias", "empty"}
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o044
