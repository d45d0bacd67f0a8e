"""The weight files of a folder: read one tensor at a time, written in pieces of bounded size."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of a folder by name, read when asked for. Never runs code from the files.

    Args:
        folder: Holds *.safetensors, or pytorch_model*.bin.
        stack: Closes the files.

    Raises:
        ValueError: It holds neither; later, a tensor that is not there.
    """

    def __init__(self, folder: Path, stack: ExitStack):
        self._readers: dict[str, Callable[[str], Tensor]] = {}
        files = sorted(folder.glob("*.safetensors"))
        if files:
            from safetensors import safe_open

            for file in files:
                opened = stack.enter_context(safe_open(file, "pt"))
                self._readers.update(dict.fromkeys(opened.keys(), opened.get_tensor))
            return
        for file in sorted(folder.glob("pytorch_model*.bin")):
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
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


def tensor_sizes(folder: Path) -> dict[str, int]:
    """How many numbers each tensor of a folder's safetensors has; reads no weights.

    Raises:
        ValueError: There are no such files.
    """
    from safetensors import safe_open

    sizes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
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
