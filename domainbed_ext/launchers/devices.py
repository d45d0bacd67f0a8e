"""What this machine has: cores and CUDA devices. Imports torch only where there is a driver."""

from __future__ import annotations

import os
from pathlib import Path


def num_cores() -> int:
    """The cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def cuda_devices() -> list[str]:
    """The CUDA devices, as values of CUDA_VISIBLE_DEVICES."""
    drivers = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")
    if not any(Path(driver).exists() for driver in drivers):
        return []
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if visible is None else [name for name in visible.split(",") if name.strip()]
    count = torch.cuda.device_count()
    return [str(number) for number in range(count)] if names is None else names[:count]
