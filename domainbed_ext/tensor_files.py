"""Safetensors files that appear whole or not at all, and that say when they were damaged.

Such a file holds tensors and a text, in its header, and a checksum of both: safetensors notices a
file that was cut off, but not one whose bytes have changed.
"""

from __future__ import annotations

import contextlib
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from domainbed_ext.atomic_files import replaced

_TEXT, _CHECKSUM = "content", "checksum"
# "(os error 28)", or "Os { code: 28" in older versions
_SYSTEM_ERROR = re.compile(r"(?:os error|code:) (\d+)")


class DamagedFileError(ValueError):
    """A file is not what was written."""


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], text: str, *, keep: Path | None = None
) -> None:
    """Writes a file, in place of an older one, which is moved to `keep`.

    Raises:
        CannotWriteError: The older one is still in its place.
    """
    metadata = {_TEXT: text, _CHECKSUM: _checksum(tensors, text)}
    with replaced(path, keep=keep) as unfinished, safetensors_writing(unfinished):
        save_file(tensors, str(unfinished), metadata=metadata)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """What `write_tensors` wrote.

    Raises:
        DamagedFileError: The file is cut off, was changed, or is something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(str(error)) from None
    if _TEXT not in metadata or _CHECKSUM not in metadata:
        raise DamagedFileError("no checksum in it")
    if metadata[_CHECKSUM] != _checksum(tensors, metadata[_TEXT]):
        raise DamagedFileError("its content has changed")
    return tensors, metadata[_TEXT]


@contextlib.contextmanager
def safetensors_writing(path: Path) -> Iterator[None]:
    """Gives the system's error where safetensors words its own, and the file its usual mode."""
    try:
        yield
    except SafetensorError as error:
        number = _SYSTEM_ERROR.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    # safetensors makes files that only their owner may read; models are shared in groups.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def file_checksum(path: Path) -> str:
    """A checksum of a whole file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def _checksum(tensors: Mapping[str, torch.Tensor], text: str) -> str:
    value = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        # as bytes, which NumPy has for every type
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        value = zlib.crc32(content.data, value)
    return f"{value:08x}"
