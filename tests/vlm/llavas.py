"""Tiny LLaVAs with random weights, and inputs for them. Needs transformers."""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    Qwen2Config,
    StableLmConfig,
)

from gmoe_ltdr import moe_layers
from gmoe_ltdr.vlm import vlm_preset
from gmoe_ltdr.vlm.transformers import upcycle_llava

IMAGE, PAD, VOCABULARY = 59, 0, 60
PATCHES = 4  # of a 16 x 16 image
FAMILIES = {"stablelm": StableLmConfig, "qwen2": Qwen2Config, "phi": PhiConfig}


def dense_llava(family: str = "qwen2", *, seed: int = 0) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=32,
    )  # fmt: skip
    text = FAMILIES[family](
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
        pad_token_id=PAD, bos_token_id=1, eos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=PATCHES
    )
    return LlavaForConditionalGeneration(config).eval()


def sparse_llava(family: str = "qwen2", *, seed: int = 0, **overrides):
    """An upcycled model whose experts and gates have been told apart: among equal experts, every
    routing error is invisible."""
    name = overrides.pop("preset", "ltdr")
    model = upcycle_llava(dense_llava(family, seed=seed), vlm_preset(name, **overrides))
    return perturb_(model)


@torch.no_grad()
def perturb_(model, *, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    for layer in moe_layers(model).values():
        for parameter in layer.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise.to(parameter.dtype))
    return model


def questions(*, seed: int = 2, images: int = 2, padding: str | None = "left") -> dict:
    """Two rows of 11 tokens; one image in each, or two in the first and none in the second. Row 1
    is padded by two tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (2, 11), generator=generator)
    mask = torch.ones_like(ids)
    if padding:
        where = slice(0, 2) if padding == "left" else slice(9, 11)
        ids[1, where], mask[1, where] = PAD, 0
    ids[0, 2:6] = IMAGE
    if images == 2:
        ids[1, 4:8] = IMAGE
    else:
        ids[0, 6:10] = IMAGE  # both in the first row
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def with_labels(batch: dict) -> dict:
    """Everything is a target but images and padding."""
    ids = batch["input_ids"]
    hidden = (ids == IMAGE) | (batch["attention_mask"] == 0)
    return {**batch, "labels": ids.masked_fill(hidden, -100)}
