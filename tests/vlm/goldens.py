"""The golden MoE-LLaVA as files of a checkpoint, and its inputs and outputs."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gmoe_ltdr.routing import Modality

_STEM = Path(__file__).parent.parent / "goldens" / "moe_llava_stablelm_tiny"
# the file's numbers for modalities
_MODALITY = {-1: Modality.PADDING, 0: Modality.LANGUAGE, 1: Modality.VISION}


@dataclass(frozen=True)
class Golden:
    """See tests/goldens/README.md."""

    state: dict[str, Tensor]
    config: dict
    clip: dict
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    images: list[Tensor]
    modality: Tensor
    logits: Tensor
    ltdr_logits: Tensor
    ltdr_aux: list[Tensor]

    @property
    def real(self) -> Tensor:
        """Tokens that are no padding."""
        return self.modality != int(Modality.PADDING)


@functools.cache
def golden() -> Golden:
    tensors = load_file(f"{_STEM}.safetensors")
    text = json.loads(Path(f"{_STEM}.json").read_text())
    modality = torch.zeros_like(tensors["modality"], dtype=torch.uint8)
    for number, meaning in _MODALITY.items():
        modality[tensors["modality"] == number] = int(meaning)
    return Golden(
        state={k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")},
        config=text["config"],
        clip=text["clip"],
        input_ids=tensors["batch/input_ids"],
        attention_mask=tensors["batch/attention_mask"],
        labels=tensors["batch/labels"],
        images=[tensors["batch/images/0"], tensors["batch/images/1"]],
        modality=modality,
        logits=tensors["logits"],
        ltdr_logits=tensors["ltdr_logits"],
        ltdr_aux=[tensors["ltdr_aux/0"], tensors["ltdr_aux/1"]],
    )


def write_checkpoint(
    folder: Path, *, shards: int = 1, drop: tuple[str, ...] = (), pickled: bool = False, **config
) -> Path:
    """The golden model as MoE-LLaVA saves it.

    Args:
        folder: Created.
        shards: How many files; neighbouring tensors go into different ones.
        drop: Tensors whose names begin so are left out.
        pickled: PyTorch files in place of safetensors.
        **config: Changed fields of its configuration.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**golden().config, **config}))
    state = {k: v for k, v in golden().state.items() if not k.startswith(drop or ("-",))}
    for number in range(shards):
        part = {name: state[name] for name in list(state)[number::shards]}
        if pickled:
            torch.save(part, folder / f"pytorch_model-{number}.bin")
        else:
            save_file(part, folder / f"model-{number}.safetensors")
    return folder


def write_tower(folder: Path, *, weights: bool = False) -> Path:
    """Its image tower as a CLIP folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(golden().clip))
    if weights:
        prefix = "model.image_tower.image_tower."
        tower = {k.removeprefix(prefix): v for k, v in golden().state.items() if prefix in k}
        save_file(tower, folder / "model.safetensors")
    return folder
