"""Checkpoints that let a run go on bit for bit, and saved models. Safetensors and JSON: loading
never runs code.

A checkpoint is one file, replaced atomically: tensors as safetensors, and everything else (step,
optimizer settings, states of the random number generators) as JSON in that file's header.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_file, save_model

from domainbed_ext.distributed import current_ranks, gather
from domainbed_ext.errors import UsageError
from domainbed_ext.jobs import write_atomically
from domainbed_ext.weight_averaging import ValleyAverage

CHECKPOINT_FILE = "checkpoint.safetensors"
MODEL_NAME = "model"
FORMAT = "gmoe-ltdr checkpoint 1"

_TENSOR, _TUPLE, _ITEMS = "__tensor__", "__tuple__", "__items__"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        step: The last step that was taken.
        info: JSON values that say which run this is.
        training_state: Of the algorithm: parameters, optimizer, schedule.
        rng_state: Of Python, NumPy, torch and CUDA.
        other_rng_states: Of the ranks after the first, in a distributed run.
        since_record: What each step has measured since the last record; empty right after one.
    """

    step: int
    info: dict[str, Any]
    training_state: dict[str, Any]
    rng_state: dict[str, Any]
    other_rng_states: list[dict[str, Any]] = field(default_factory=list)
    since_record: dict[str, list[float]] = field(default_factory=dict)

    def rng_state_of(self, rank: int) -> dict[str, Any] | None:
        """The state of a rank; None for one that was not there when this was written."""
        states = [self.rng_state, *self.other_rng_states]
        return states[rank] if rank < len(states) else None


def save_checkpoint(
    path: Path,
    *,
    step: int,
    algorithm: torch.nn.Module,
    info: Mapping[str, Any],
    since_record: Mapping[str, list[float]] | None = None,
) -> None:
    """Writes all that a run needs to go on after `step`; atomically, over an older checkpoint.

    In a distributed run all ranks call this; rank 0 writes, in the same form.
    """
    tensors: dict[str, torch.Tensor] = {}
    state, rng_states = training_state(algorithm), gather(rng_state())
    if not current_ranks().is_first:
        return
    content = {
        "format": FORMAT,
        "step": step,
        "info": dict(info),
        "since_record": dict(since_record or {}),
        "training_state": _encode(state, tensors, {}),
        "rng_state": _encode(rng_states[0], tensors, {}),
        "other_rng_states": _encode(rng_states[1:], tensors, {}),
    }
    _save_tensors(path, tensors, {"content": json.dumps(content)})


def load_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint at `path`, or None if there is none."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})["content"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}")
        return Checkpoint(
            step=content["step"],
            info=content["info"],
            training_state=_decode(content["training_state"], tensors),
            rng_state=_decode(content["rng_state"], tensors),
            other_rng_states=_decode(content.get("other_rng_states", []), tensors),
            since_record=content.get("since_record", {}),
        )
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is not a checkpoint of this version ({error}); delete it to start that run "
            "from its first step"
        ) from None


def training_state(algorithm: torch.nn.Module) -> dict[str, Any]:
    """The algorithm's state dict, and its `training_state()` or else its optimizer's state.

    With experts on several ranks, `full_state_dict()` has all of them.
    """
    state = {"algorithm": getattr(algorithm, "full_state_dict", algorithm.state_dict)()}
    average = getattr(algorithm, "average", None)
    if isinstance(average, ValleyAverage):
        state["average"] = average.training_state()
    own = getattr(algorithm, "training_state", None)
    if own is not None:
        return {**state, "own": own()}
    optimizer = getattr(algorithm, "optimizer", None)
    return {**state, "optimizer": None if optimizer is None else optimizer.state_dict()}


def load_training_state(algorithm: Any, state: Mapping[str, Any]) -> None:
    """Puts back what `training_state` gave."""
    algorithm.load_state_dict(state["algorithm"])
    if "average" in state:
        algorithm.average.load_training_state(state["average"])
    if "own" in state:
        algorithm.load_training_state(state["own"])
    elif state["optimizer"] is not None:
        algorithm.optimizer.load_state_dict(state["optimizer"])


def rng_state() -> dict[str, Any]:
    """The states of all global random number generators."""
    state: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, gauss = state
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": _cuda_rng_states(),
    }


def _cuda_rng_states() -> list[torch.Tensor]:
    if not torch.cuda.is_available():
        return []
    if current_ranks().size > 1:  # a rank has one device
        return [torch.cuda.get_rng_state()]
    return torch.cuda.get_rng_state_all()


def load_rng_state(state: Mapping[str, Any]) -> None:
    """Puts back what `rng_state` gave. CUDA's is skipped when the number of devices has changed."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if not state["cuda"] or not torch.cuda.is_available():
        return
    if len(state["cuda"]) == 1:
        torch.cuda.set_rng_state(state["cuda"][0])
    elif len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def save_algorithm(
    folder: Path, algorithm: torch.nn.Module, info: Mapping[str, Any], *, name: str = MODEL_NAME
) -> None:
    """Writes the state dict as `<name>.safetensors`, shared tensors once, and `<name>.json`.

    In a distributed run all ranks call this; rank 0 writes, as one process would.
    """
    algorithm = getattr(algorithm, "unsharded", lambda: algorithm)()
    if not current_ranks().is_first:
        return
    path = folder / f"{name}.safetensors"
    partial = path.with_name(path.name + ".partial")
    try:
        save_model(algorithm, str(partial), metadata={"format": "pt"})
        _readable_like_other_files(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    write_atomically(
        folder / f"{name}.json", json.dumps(dict(info), indent=2, sort_keys=True) + "\n"
    )


def load_algorithm(
    folder: str | os.PathLike[str], *, name: str = MODEL_NAME, device: str = "cpu"
) -> torch.nn.Module:
    """The trained algorithm of a job's folder: `load_algorithm(folder).predict(images)`."""
    from domainbed_ext.algorithms import get_algorithm_class

    path = Path(folder) / f"{name}.safetensors"
    if not path.is_file():
        raise UsageError(
            f"{path} does not exist; give the folder of a finished job, run without "
            "--skip_model_save"
        )
    info = json.loads((Path(folder) / f"{name}.json").read_text(encoding="utf-8"))
    # The weights come from the file, so nothing needs to be downloaded first.
    hparams = {**info["model_hparams"], "pretrained": False}
    if "moe_dispatcher" in hparams:  # one process, which need not have Tutel
        hparams["moe_dispatcher"] = "local"
    algorithm = get_algorithm_class(info["args"]["algorithm"])(
        tuple(info["model_input_shape"]),
        info["model_num_classes"],
        info["model_num_domains"],
        hparams,
    )
    load_model(algorithm, str(path))
    return algorithm.to(device).eval()


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, str(partial), metadata=metadata)
        _readable_like_other_files(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _readable_like_other_files(path: Path) -> None:
    # safetensors makes files that only their owner may read; models are shared in groups.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _encode(value: Any, tensors: dict[str, torch.Tensor], seen: dict[tuple[Any, ...], str]) -> Any:
    """Turns nested values into JSON; tensors move to `tensors`, each piece of memory once."""
    if isinstance(value, torch.Tensor):
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if key not in seen or value.numel() == 0:
            seen[key] = str(len(tensors))
            tensors[seen[key]] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: seen[key]}
    if isinstance(value, tuple):
        return {_TUPLE: [_encode(item, tensors, seen) for item in value]}
    if isinstance(value, list):
        return [_encode(item, tensors, seen) for item in value]
    if isinstance(value, Mapping):
        # Optimizers key their state by integers, which JSON would turn into strings.
        return {
            _ITEMS: [
                [_encode(k, tensors, seen), _encode(v, tensors, seen)] for k, v in value.items()
            ]
        }
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"a checkpoint holds tensors and JSON values, not {type(value).__name__}: {value!r}"
    )


def _decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == _TENSOR:
        return tensors[content]
    if kind == _TUPLE:
        return tuple(_decode(item, tensors) for item in content)
    return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
