"""MoE-LLaVA checkpoints for Hugging Face's LLaVA, converted tensor by tensor.

    from_moe_llava("moe-llava-stablelm", "converted", tokenizer="moe-llava-stablelm")
    model = LTDRLlavaForConditionalGeneration.from_pretrained("converted")

Neither MoE-LLaVA nor DeepSpeed is needed, and no model is built: tensors get their new names, those
of one layer's experts are stacked, and what is written goes from one file to the other. Weights do
not change; with the preset "baseline" the converted model computes what the original does in
evaluation, where DeepSpeed drops nothing (except that its second expert is drawn at random).

Shapes: E experts, D width, F hidden width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmoe_ltdr.vlm.checkpoint_files import TensorFiles, refuse_same_folder, write_shards
from gmoe_ltdr.vlm.moe_llava_config import (
    feature_strategy,
    num_features,
    read_config,
    spec_of,
    text_config_of,
    vision_config_of,
)

# Old names in front of new ones, tried in this order
_PREFIXES = (
    ("model.image_tower.image_tower.vision_model.", "model.vision_tower."),
    ("model.image_tower.image_tower.", "model.vision_tower."),
    ("model.mm_projector.image_spatial_proj.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.image_spatial_proj.2.", "model.multi_modal_projector.linear_2."),
    ("model.", "model.language_model."),
    ("lm_head.", "lm_head."),
)
# What has no counterpart and carries nothing that was learned for images
_LEFT_OUT = ("video_tower", "mm_projector.video_", "rotary_emb.inv_freq", "position_ids")
_EXPERTS = ".mlp.deepspeed_moe.experts.deepspeed_experts."
IMAGE_TOKEN = "<image>"


def from_moe_llava(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    preset: str = "baseline",
    vision_tower: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    max_shard_bytes: int = 4 * 2**30,
) -> Path:
    """Convert a MoE-LLaVA checkpoint (StableLM, Phi, Qwen1.5) for transformers.

    Args:
        source: A folder with config.json and safetensors or PyTorch files.
        folder: Where to write, another one; created if need be.
        preset: Which router, see `vlm_preset`. "baseline" is MoE-LLaVA's. "ltdr" gives its tail
            tokens more experts than it was trained with, which reproduces nothing published; it is
            where training with LTDR starts.
        vision_tower: A CLIP folder: its configuration, and its weights where the checkpoint has
            none. Not needed for openai/clip-vit-large-patch14-336 with weights.
        tokenizer: A folder of the tokenizer. Gets the token "<image>" and is saved with a processor
            beside the model. Without it, the image token is one more row of the embeddings.
        max_shard_bytes: At most so much goes into one file, and into memory.

    Returns:
        The folder.

    Raises:
        ValueError: Not such a checkpoint, or one that has no counterpart; the message says why.
        NotImplementedError: Experts that lie on several ranks, or Tutel's.
        ImportError: transformers is missing.
    """
    source, folder = Path(source), Path(folder)
    refuse_same_folder(source, folder)
    old = read_config(source)
    spec = spec_of(old, preset)
    from gmoe_ltdr.vlm.transformers import LTDRLlavaConfig, LTDRLlavaForConditionalGeneration

    vision_config = vision_config_of(old, source, vision_tower)
    words = _load_tokenizer(tokenizer, old.get("tokenizer_padding_side", "right"))
    with ExitStack() as stack:
        tensors = TensorFiles(source, stack)
        _check_names(tensors)
        spare = _ImageToken.choose(old, words)
        config = LTDRLlavaConfig(
            text_config=text_config_of(old, spare.vocab_size),
            vision_config=vision_config,
            moe_spec=spec.to_dict(),
            image_token_index=spare.id,
            image_seq_length=num_features(vision_config, old),
            vision_feature_layer=old.get("mm_vision_select_layer", -2),
            vision_feature_select_strategy=feature_strategy(old),
            projector_hidden_act="gelu",
        )
        config.dtype = tensors["model.embed_tokens.weight"].dtype
        config.architectures = [LTDRLlavaForConditionalGeneration.__name__]
        with torch.device("meta"):  # names and shapes, no memory
            wanted = LTDRLlavaForConditionalGeneration(config).state_dict()
        tower = _tower_weights(tensors, vision_tower, stack)
        written = _convert(tensors, tower, wanted, old, spare)
        write_shards(written, folder, max_shard_bytes)
    config.save_pretrained(folder)
    _save_generation_config(config, folder)
    if words is not None:
        _save_processor(words, old, config, vision_tower, folder)
    return folder


@dataclass(frozen=True)
class _ImageToken:
    """The id that stands for image features, in place of -200, which is no row of the embeddings.

    Attributes:
        id: A row that no text uses.
        vocab_size: Rows of the embeddings; one more than before where none was left over.
    """

    id: int
    vocab_size: int

    @classmethod
    def choose(cls, old: Mapping[str, Any], tokenizer: Any) -> _ImageToken:
        size = int(old["vocab_size"])
        if tokenizer is None:
            return cls(id=size, vocab_size=size + 1)
        if IMAGE_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
        number = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        return cls(id=number, vocab_size=max(size, number + 1))


def _check_names(tensors: TensorFiles) -> None:
    adapters = [name for name in tensors if ".lora_" in name]
    if adapters:
        raise ValueError(
            f"the checkpoint holds LoRA adapters ({adapters[0]}, ...); merge them into the model "
            "and save that first"
        )
    if not any(_EXPERTS in name for name in tensors):
        raise ValueError("the checkpoint holds no experts (deepspeed_moe.experts)")


def _tower_weights(
    tensors: TensorFiles, vision_tower: str | os.PathLike | None, stack: ExitStack
) -> Mapping[str, Tensor]:
    """Where the image tower's weights are: the checkpoint itself, or a folder of its own."""
    if any(name.startswith("model.image_tower.") for name in tensors):
        return tensors
    if vision_tower is None:
        raise ValueError(
            "the checkpoint was saved without its image tower; pass vision_tower=, a folder with "
            "that CLIP's weights"
        )
    return TensorFiles(Path(vision_tower), stack)


def _convert(
    tensors: TensorFiles,
    tower: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    old: Mapping[str, Any],
    image_token: _ImageToken,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the new model, by its name there.

    Raises:
        ValueError: One is missing, has another shape, or is left over.
    """
    new_names = {_new_name(name, wanted): name for name in tensors if _EXPERTS not in name}
    used = set()
    for name, shape in ((name, tuple(value.shape)) for name, value in wanted.items()):
        if ".mlp.experts." in name:
            value, sources = _stacked(tensors, name, num_experts=shape[0])
            used |= sources
        elif name.startswith("model.vision_tower.") and tower is not tensors:
            value = _of_tower(tower, name)
        elif name in new_names:
            value = tensors[new_names[name]]
            used.add(new_names[name])
        elif name == "lm_head.weight" and old.get("tie_word_embeddings"):
            continue
        else:
            raise ValueError(f"the checkpoint holds nothing for {name}")
        if name.endswith(".router.gate.weight"):
            value = value.float()
        if value.shape[0] == old["vocab_size"] < shape[0] == image_token.vocab_size:
            rows = value.new_zeros(shape[0] - value.shape[0], *value.shape[1:])
            value = torch.cat([value, rows])
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, but its config says {shape}")
        yield name, value
    left = [n for n in tensors if n not in used and not any(part in n for part in _LEFT_OUT)]
    if left:
        raise ValueError(
            f"{len(left)} tensors of the checkpoint have no place in the new model: "
            f"{', '.join(left[:3])}{', ...' if len(left) > 3 else ''}"
        )


def _new_name(name: str, wanted: Mapping[str, Tensor]) -> str:
    name = name.replace(".mlp.deepspeed_moe.gate.wg.", ".mlp.router.gate.")
    for old, new in _PREFIXES:
        if name.startswith(old):
            renamed = new + name[len(old) :]
            # before transformers 5, CLIP kept its tower one level deeper
            deeper = renamed.replace("vision_tower.", "vision_tower.vision_model.", 1)
            return deeper if deeper in wanted else renamed
    return name


def _of_tower(tower: Mapping[str, Tensor], name: str) -> Tensor:
    """A weight of the image tower from a CLIP folder, whole or vision alone."""
    short = name.removeprefix("model.vision_tower.").removeprefix("vision_model.")
    return tower[short if short in tower else f"vision_model.{short}"]


def _stacked(tensors: TensorFiles, name: str, *, num_experts: int) -> tuple[Tensor, set[str]]:
    """One tensor of all experts, and the names of what it is made of.

    fc1_weight is (E, 2F, D) of gate_proj and up_proj, or (E, F, D) of fc1.
    """
    layer, _, field = name.partition(".mlp.experts.")
    prefix = layer.replace("model.language_model.", "model.", 1) + _EXPERTS
    linear, kind = field.split("_")  # fc1 or fc2, weight or bias
    gated = f"{prefix}0.gate_proj.{kind}" in tensors
    parts = {"fc1": ("gate_proj", "up_proj"), "fc2": ("down_proj",)}[linear] if gated else (linear,)
    sources = [[f"{prefix}{e}.{part}.{kind}" for part in parts] for e in range(num_experts)]
    stacked = torch.stack([torch.cat([tensors[n] for n in names]) for names in sources])
    return stacked, {n for names in sources for n in names}


def _save_generation_config(config: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    text = config.text_config
    GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        suppress_tokens=[config.image_token_id],  # no word of the original model
    ).save_pretrained(folder)


def _load_tokenizer(folder: str | os.PathLike | None, padding_side: str) -> Any:
    if folder is None:
        return None
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():  # a name would be looked for on the net
        raise ValueError(f"tokenizer={str(folder)!r} is no folder")
    try:
        return AutoTokenizer.from_pretrained(folder, padding_side=padding_side)
    except (OSError, ValueError) as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"tokenizer={str(folder)!r} cannot be loaded: {first_line}") from error


def _save_processor(
    tokenizer: Any,
    old: Mapping[str, Any],
    config: Any,
    vision_tower: str | os.PathLike | None,
    folder: Path,
) -> None:
    """What turns pictures and words into the model's inputs, as MoE-LLaVA prepares them."""
    from transformers import CLIPImageProcessor, LlavaImageProcessor, LlavaProcessor

    side = config.vision_config.image_size
    values = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    settings = Path(vision_tower or folder) / "preprocessor_config.json"
    if settings.is_file():
        wanted = ("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor")
        found = json.loads(settings.read_text())
        values.update({name: found[name] for name in wanted if name in found})
    images: Any
    if old.get("image_aspect_ratio") == "pad":  # to a square, in the colour of the mean
        images = LlavaImageProcessor(do_pad=True, **values)
    else:
        images = CLIPImageProcessor(**values)
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
