"""Whether Triton kernels can run here."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


@functools.cache
def triton_available() -> bool:
    """Whether Triton is installed and has a device: a GPU of compute capability 8.0, or its own
    interpreter (`TRITON_INTERPRET=1`), in which tests run the kernels on a CPU."""
    if importlib.util.find_spec("triton") is None:
        return False
    if triton_interprets():
        return True
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def triton_takes(tensor: torch.Tensor) -> bool:
    """Whether Triton kernels can run where a tensor is."""
    return triton_available() and (tensor.is_cuda or triton_interprets())


def triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
