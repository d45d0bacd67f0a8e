"""The files of a model's folder: its configuration, and weights that are read one tensor at a time
and written in pieces of bounded size."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor


def read_config_json(folder: str | os.PathLike) -> dict[str, Any]:
    """What a folder's config.json says.

    Raises:
        ValueError: There is none, it cannot be read, or it holds no names and values.
    """
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no readable config.json: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"the config.json of {folder} holds a {type(config).__name__}, and no names and values"
        )
    return config


def needed(config: Any, name: str, *, of: str) -> Any:
    """A value that cannot be done without.

    Args:
        config: Values by name.
        name: Which one.
        of: Where they stand, for the error.

    Raises:
        ValueError: It is not there.
    """
    if not isinstance(config, Mapping) or config.get(name) is None:
        raise ValueError(f"{of} lacks {name!r}; is it complete?")
    return config[name]


def refuse_same_folder(source: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Raises a ValueError where writing would destroy what is read."""
    if Path(source).resolve() == Path(folder).resolve():
        raise ValueError(f"{folder} is where the model is read from; write into another folder")


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of a folder by name, read when asked for. Never runs code from the files.

    Args:
        folder: Holds *.safetensors, or pytorch_model*.bin.
        stack: Closes the files.

    Raises:
        ValueError: It holds neither, or a damaged file; later, a tensor that is not there.
    """

    def __init__(self, folder: Path, stack: ExitStack):
        self._readers: dict[str, Callable[[str], Tensor]] = {}
        files = sorted(folder.glob("*.safetensors"))
        if files:
            for file in files:
                opened = stack.enter_context(_open(file))
                self._readers.update(dict.fromkeys(opened.keys(), opened.get_tensor))
            return
        for file in sorted(folder.glob("pytorch_model*.bin")):
            try:
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except (RuntimeError, EOFError, UnpicklingError) as error:
                raise _damaged(file, error) from error
            self._readers.update(dict.fromkeys(state, state.__getitem__))
        if not self._readers:
            raise ValueError(f"{folder} holds neither *.safetensors nor pytorch_model*.bin")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._readers:
            raise ValueError(f"the checkpoint lacks {name}")
        return self._readers[name](name)

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> ValueError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ValueError(f"{file} is cut off or damaged ({reason}); copy or download it again")


def tensor_sizes(folder: Path) -> dict[str, int]:
    """How many numbers each tensor of a folder's safetensors has; reads no weights.

    Raises:
        ValueError: There are no such files, or one is damaged.
    """
    sizes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with _open(file) as opened:
            for name in opened.keys():
                sizes[name] = math.prod(opened.get_slice(name).get_shape())
    if not sizes:
        raise ValueError(f"{folder} holds no *.safetensors")
    return sizes


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, max_bytes: int) -> None:
    """safetensors files of at most `max_bytes`, and the index that transformers looks for."""
    from safetensors.torch import save_file

    partial: list[Path] = []
    placed: dict[str, int] = {}
    shard: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f".shard-{len(partial)}.partial"
        partial.append(path)
        save_file(shard, path, metadata={"format": "pt"})
        shard.clear()

    try:
        for name, value in tensors:
            num_bytes = value.numel() * value.element_size()
            if shard and size + num_bytes > max_bytes:
                flush()
                size = 0
            shard[name] = value.contiguous()
            placed[name] = len(partial)
            size += num_bytes
            total += num_bytes
        flush()
    except BaseException:
        for path in partial:
            path.unlink()
        raise
    names = ["model.safetensors"]
    if len(partial) > 1:
        names = [f"model-{i + 1:05}-of-{len(partial):05}.safetensors" for i in range(len(partial))]
        weight_map = {name: names[number] for name, number in placed.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for path, name in zip(partial, names, strict=True):
        os.replace(path, folder / name)
