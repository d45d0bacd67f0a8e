"""Checkpoints that let a run go on bit for bit. Safetensors and JSON: loading never runs code.

A checkpoint is one file, replaced atomically: tensors as safetensors, and everything else (step,
optimizer settings, states of the random number generators) as JSON in that file's header. It holds
the records so far too, so that damage to results.jsonl costs none. The one before it is kept, in
case it is itself damaged.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from domainbed_ext.distributed import current_ranks, gather, on_first_rank
from domainbed_ext.errors import UsageError
from domainbed_ext.job_files import CHECKPOINT_FILE, PREVIOUS_CHECKPOINT_FILE
from domainbed_ext.records import Record, format_records, parse_records
from domainbed_ext.tensor_files import DamagedFileError, read_tensors, write_tensors
from domainbed_ext.weight_averaging import ValleyAverage

FORMAT = "gmoe-ltdr checkpoint 2"

_TENSOR, _TUPLE, _ITEMS = "__tensor__", "__tuple__", "__items__"
_RECORDS = "records"  # a tensor: the header of a safetensors file must not grow without bound


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
        records: All that were made up to this step.
        path: The file it comes from.
    """

    step: int
    info: dict[str, Any]
    training_state: dict[str, Any]
    rng_state: dict[str, Any]
    other_rng_states: list[dict[str, Any]] = field(default_factory=list)
    since_record: dict[str, list[float]] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    path: Path = Path(CHECKPOINT_FILE)

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
    records: Sequence[Record] = (),
) -> None:
    """Writes all that a run needs to go on after `step`, atomically. The checkpoint that was there
    becomes the previous one.

    In a distributed run all ranks call this; rank 0 writes, in the same form. None returns before
    that is done: a rank that leaves after it takes no checkpoint with it.

    Raises:
        CannotWriteError: The disk is full, say.
        OtherRankError: Rank 0 could not write; on the other ranks.
    """
    state, rng_states = training_state(algorithm), gather(rng_state())

    def write() -> None:
        tensors: dict[str, torch.Tensor] = {}
        content = {
            "format": FORMAT,
            "step": step,
            "info": dict(info),
            "since_record": dict(since_record or {}),
            "training_state": _encode(state, tensors, {}),
            "rng_state": _encode(rng_states[0], tensors, {}),
            "other_rng_states": _encode(rng_states[1:], tensors, {}),
        }
        lines = np.frombuffer(bytearray(format_records(records).encode()), np.uint8)
        tensors[_RECORDS] = torch.from_numpy(lines)
        previous = path.with_name(PREVIOUS_CHECKPOINT_FILE)
        write_tensors(path, tensors, json.dumps(content), keep=previous)

    on_first_rank(write)


def load_last_checkpoint(folder: Path) -> Checkpoint | None:
    """The last checkpoint of a job's folder that is whole, or None if there never was one.

    In a distributed run all ranks call this, and get the same one.
    """
    found: list[Checkpoint] = []
    path = on_first_rank(lambda: _last_whole(folder, found))
    if path is None:
        return None
    return found[0] if found else load_checkpoint(path)


def load_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint at `path`, or None if there is none."""
    if not path.exists():
        return None
    try:
        return _read(path)
    except DamagedFileError as error:
        raise UsageError(
            f"{path} is damaged ({error}); delete it to start that run from its first step"
        ) from None


def _last_whole(folder: Path, found: list[Checkpoint]) -> Path | None:
    """Where it is; appends it to `found`."""
    last, previous = folder / CHECKPOINT_FILE, folder / PREVIOUS_CHECKPOINT_FILE
    if not previous.exists():
        checkpoint = load_checkpoint(last)
        found += [] if checkpoint is None else [checkpoint]
        return last if found else None
    problem = None
    if last.exists():
        try:
            found.append(_read(last))
            return last
        except DamagedFileError as error:
            problem = error
    # where there is no last one, the process was killed between moving the two
    try:
        found.append(_read(previous))
    except DamagedFileError as error:
        damaged = f"{previous} is damaged ({error})"
        if problem is not None:
            damaged = f"{last} ({problem}) and {previous} ({error}) are damaged"
        raise UsageError(f"{damaged}; delete them to start that run from its first step") from None
    if problem is not None:
        print(f"{last} is damaged ({problem}): going on from the checkpoint before it")
        last.unlink()  # or it would take the place of the good one when the next is written
    return previous


def _read(path: Path) -> Checkpoint:
    tensors, text = read_tensors(path)
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise UsageError(
                f"{path} is of another version (format {content['format']!r}, not {FORMAT!r}); "
                "go on with that version, or delete the file to start the run from its first step"
            )
        return Checkpoint(
            path=path,
            step=content["step"],
            info=content["info"],
            training_state=_decode(content["training_state"], tensors),
            rng_state=_decode(content["rng_state"], tensors),
            other_rng_states=_decode(content["other_rng_states"], tensors),
            since_record=content["since_record"],
            records=parse_records(tensors[_RECORDS].numpy().tobytes()),
        )
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{type(error).__name__}: {error}") from None


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
