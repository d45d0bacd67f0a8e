"""Trained algorithms on the disk: `model.safetensors`, and `model.json` to build them again from.
Loading never runs code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model

from domainbed_ext.atomic_files import replaced, write_atomically
from domainbed_ext.distributed import current_ranks
from domainbed_ext.errors import UsageError
from domainbed_ext.tensor_files import file_checksum, safetensors_writing

MODEL_NAME = "model"
CHECKSUM = "weights_crc32"


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
    with replaced(path) as unfinished, safetensors_writing(unfinished):
        save_model(algorithm, str(unfinished), metadata={"format": "pt"})
    content = {**info, CHECKSUM: file_checksum(path)}
    write_atomically(folder / f"{name}.json", json.dumps(content, indent=2, sort_keys=True) + "\n")


def load_algorithm(
    folder: str | os.PathLike[str],
    *,
    name: str = MODEL_NAME,
    device: str = "cpu",
    hparams: Mapping[str, Any] | None = None,
) -> torch.nn.Module:
    """The trained algorithm of a job's folder: `load_algorithm(folder).predict(images)`.

    Args:
        folder: Of a finished job.
        name: Which of its models.
        device: Where it goes.
        hparams: What to change of its hyper-parameters, how it predicts for instance.

    Raises:
        UsageError: There is none, or its files are damaged.
    """
    from domainbed_ext.algorithms import get_algorithm_class

    path, info = Path(folder) / f"{name}.safetensors", read_model_info(folder, name=name)
    # The weights come from the file, so nothing needs to be downloaded first.
    hparams = {**info["model_hparams"], **(hparams or {}), "pretrained": False}
    if "moe_dispatcher" in hparams:  # one process, which need not have Tutel, nor that device
        hparams.update(moe_dispatcher="local", moe_backend="auto")
    algorithm = get_algorithm_class(info["args"]["algorithm"])(
        tuple(info["model_input_shape"]),
        info["model_num_classes"],
        info["model_num_domains"],
        hparams,
    )
    try:
        load_model(algorithm, str(path))
    except (SafetensorError, RuntimeError) as error:
        problem = " ".join(str(error).split()[:40])  # one line of what may be many
        raise UsageError(f"{path} does not fit {name}.json ({problem})") from None
    return algorithm.to(device).eval()


def read_model_info(folder: str | os.PathLike[str], *, name: str = MODEL_NAME) -> dict[str, Any]:
    """What `<name>.json` says of a model whose weights are there and undamaged."""
    weights, description = (Path(folder) / f"{name}.{kind}" for kind in ("safetensors", "json"))
    for path in (weights, description):
        if not path.is_file():
            raise UsageError(
                f"{path} does not exist; give the folder of a finished job, run without "
                "--skip_model_save"
            )
    try:
        info = json.loads(description.read_text(encoding="utf-8"))
        missing = [key for key in _NEEDED if key not in info]
    except (ValueError, TypeError) as error:
        raise _damaged(description, str(error)) from None
    if missing:
        raise _damaged(description, f"it lacks {', '.join(missing)}")
    if CHECKSUM in info and info[CHECKSUM] != file_checksum(weights):
        raise _damaged(weights, f"its checksum is not the one in {description.name}")
    return dict(info)


_NEEDED = ("args", "model_hparams", "model_input_shape", "model_num_classes", "model_num_domains")


def _damaged(path: Path, problem: str) -> UsageError:
    return UsageError(
        f"{path} is damaged ({problem}); take a copy of it, or delete the job's folder and run "
        "the job again"
    )
