"""Checkpoints give back exactly what went in, and appear whole or not at all."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from domainbed_ext import tensor_files
from domainbed_ext.checkpoint import (
    load_checkpoint,
    load_last_checkpoint,
    load_rng_state,
    load_training_state,
    rng_state,
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
    # No record, weight, bias, the empty buffer, and the states of NumPy (624 words) and torch.
    assert shapes[:-1] == [(0,), (0, 4), (2,), (2, 3), (624,)]
    assert len(shapes) == 6


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, step=1, algorithm=Plain(), info={})

    def full_disk(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", full_disk)
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
    with pytest.raises(UsageError, match=r"checkpoint\.safetensors is damaged .*; delete it"):
        load_checkpoint(path)
    assert load_checkpoint(tmp_path / "nothing") is None


def test_objects_are_refused(tmp_path):
    algorithm = Scheduled()
    algorithm.training_state = lambda: {"object": object()}
    with pytest.raises(TypeError, match="tensors and JSON values, not object"):
        save_checkpoint(tmp_path / "c", step=0, algorithm=algorithm, info={})


def damage(path, kind):
    """What disks and people do to files."""
    content = bytearray(path.read_bytes())
    if kind == "cut off":
        del content[-100:]
    elif kind == "emptied":
        content.clear()
    elif kind == "a bit of a tensor":
        content[-1000] ^= 1
    elif kind == "a digit of the header":
        content[content.index(b"0.125")] = ord("9")
    else:
        content[:8] = b"garbage!"
    path.write_bytes(content)


DAMAGE = ["cut off", "emptied", "a bit of a tensor", "a digit of the header", "overwritten"]


@pytest.fixture
def two_checkpoints(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    for step in (1, 2):
        record = {"step": step, "args": {}, "loss": 0.1 * step}
        info = {"number": 0.125}
        save_checkpoint(path, step=step, algorithm=Plain(), info=info, records=[record])
    return path


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(two_checkpoints, capsys, kind):
    assert load_last_checkpoint(two_checkpoints.parent).step == 2
    damage(two_checkpoints, kind)
    found = load_last_checkpoint(two_checkpoints.parent)
    assert (found.step, found.records) == (1, [{"step": 1, "args": {}, "loss": 0.1}])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert f"{two_checkpoints} is damaged (" in printed
    # The next one written must not push the good one out.
    save_checkpoint(two_checkpoints, step=2, algorithm=Plain(), info={})
    damage(two_checkpoints, "emptied")
    assert load_last_checkpoint(two_checkpoints.parent).step == 1


def test_a_process_killed_between_moving_two_checkpoints(two_checkpoints, capsys):
    two_checkpoints.unlink()
    assert load_last_checkpoint(two_checkpoints.parent).step == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("last", ["damaged", "absent"])
def test_no_checkpoint_that_is_whole(two_checkpoints, last):
    previous = two_checkpoints.with_name("checkpoint.previous.safetensors")
    damage(previous, "cut off")
    if last == "absent":
        two_checkpoints.unlink()
    else:
        damage(two_checkpoints, "cut off")
    with pytest.raises(UsageError, match=r"damaged; delete them|is damaged .*; delete") as said:
        load_last_checkpoint(previous.parent)
    # what has to go is named all at once
    assert str(previous) in str(said.value)
    assert (str(two_checkpoints) in str(said.value)) == (last == "damaged")
    assert previous.exists()


def test_a_checkpoint_of_another_version_is_never_deleted(two_checkpoints, monkeypatch):
    monkeypatch.setattr("domainbed_ext.checkpoint.FORMAT", "gmoe-ltdr checkpoint 3")
    save_checkpoint(two_checkpoints, step=3, algorithm=Plain(), info={})
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"checkpoint\.safetensors is of another version"):
        load_last_checkpoint(two_checkpoints.parent)
    assert two_checkpoints.exists()
