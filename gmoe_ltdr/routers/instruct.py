"""INSTRUCT: an image's mean token chooses its experts; in a language model the mean of the prompt
(after Octavius and LoRA-MoE).

Shapes: B images, L tokens per image, T = B * L, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gmoe_ltdr.capacity import CAPACITY_OPTIONS
from gmoe_ltdr.gates import GATES
from gmoe_ltdr.routers.base import register_router
from gmoe_ltdr.routers.image_level import ImageLevelRouter, image_means
from gmoe_ltdr.routing import Modality, TokenContext
from gmoe_ltdr.spec import MoESpec


def instruction_tokens(context: TokenContext, *, include_cls: bool = False) -> Tensor:
    """Whose mean decides, bool (B, L); padding never.

    Those the context names. Without that, a sequence's language tokens; of an image without
    language the patches.

    Args:
        context: Of the layer's tokens.
        include_cls: Class and register tokens of an image count as patches.
    """
    modality_BL = context.modality_BL
    if context.instruction_BL is not None:
        return context.instruction_BL & (modality_BL != int(Modality.PADDING))
    language_BL = modality_BL == int(Modality.LANGUAGE)
    patches_BL = modality_BL == int(Modality.VISION)
    if context.is_cls_BL is not None and not include_cls:
        patches_BL = patches_BL & ~context.is_cls_BL
    return language_BL | (patches_BL & ~language_BL.any(1, keepdim=True))


@register_router("instruct")
class InstructRouter(ImageLevelRouter):
    """softmax(gate(u)) where u is the mean of an image's patches in the layer's input.

    `MoESpec.router_options`: `cls` ("exclude", "include": class and register tokens count as
    patches), and those of capacity and losses. The source's gate is "linear".
    """

    options: Mapping[str, Sequence[Any] | None] = {
        **CAPACITY_OPTIONS,
        "cls": ("exclude", "include"),
    }

    def __init__(self, dim: int, spec: MoESpec):
        super().__init__(dim, spec)
        self.gate = GATES[spec.gate](dim, spec.num_experts)

    def image_logits(self, tokens_TD: Tensor, context: TokenContext) -> Tensor:
        include_cls = self.spec.router_options.get("cls") == "include"
        chosen_BL = instruction_tokens(context, include_cls=include_cls)
        return self.gate(image_means(tokens_TD, chosen_BL))
