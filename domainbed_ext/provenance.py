"""What a record's numbers rest on: code, libraries, device, data and weights."""

from __future__ import annotations

import configparser
import functools
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

DISTRIBUTION = "gmoe-ltdr"


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, without importing it."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


@functools.cache
def code_version() -> str:
    """The package's version, and the commit when it runs from a git checkout: "0.1.0+g1a2b3c4"."""
    root = Path(__file__).resolve().parents[1]
    number = installed_version(DISTRIBUTION) or _version_of_checkout(root)
    if not (root / ".git").exists():
        return number
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--exclude=*",
        "--abbrev=7",
    ]
    try:
        commit = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return number
    return f"{number}+g{commit}"


def _version_of_checkout(root: Path) -> str:
    config = configparser.ConfigParser(interpolation=None)
    config.read(root / "setup.cfg")
    return config.get("metadata", "version", fallback="0")


def device_name(device: str) -> str:
    """The name of the device that numbers were computed on."""
    import torch

    return torch.cuda.get_device_name() if device.startswith("cuda") else device


def provenance(
    *, dataset: Any, algorithm: Any, hparams: Mapping[str, Any], device: str
) -> dict[str, Any]:
    """The "provenance" of a run's records."""
    import torch

    reduced = {} if dataset.image_side is None else {"image_side": dataset.image_side}
    return {
        "code_version": code_version(),
        "torch": torch.__version__,
        "device": device_name(device),
        "backbone_weights": getattr(algorithm, "weights_tag", "unknown"),
        "data_fingerprint": dataset.fingerprint(),
        "eval_tail_scope": hparams.get("ltdr_eval_tail_scope"),
        "environments": [environment.name for environment in dataset.datasets],
        "num_classes": dataset.num_classes,
        **reduced,
    }


def environment_lines() -> list[str]:
    """Versions of what a run depends on, for the top of out.txt."""
    import torch

    lines = [
        f"Python: {platform.python_version()} ({sys.platform})",
        f"gmoe-ltdr: {code_version()}",
        f"PyTorch: {torch.__version__}",
        f"CUDA: {torch.version.cuda}",
        f"cuDNN: {torch.backends.cudnn.version()}",
        f"CPU threads: {torch.get_num_threads()}",
    ]
    lines += [
        f"{name}: {installed_version(name)}" for name in ("torchvision", "timm", "numpy", "pillow")
    ]
    return lines
