"""What is known of each image besides its pixels, for routers that want it.

    set_image_info(model, domain_B=domains)   # before the forward that it describes
    logits = model(images)

A ViT's blocks pass tokens on and nothing else, so this reaches a layer through its `context_of`, as
part of the `TokenContext`. It stays until it is set again, since activation checkpointing runs a
layer a second time during backward. So with checkpointing, call backward before it is set for the
next forward: the second run would be told about the wrong images.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gmoe_ltdr.collect import routed_modules


def set_image_info(
    model: nn.Module, *, domain_B: Tensor | None = None, embedding_BD: Tensor | None = None
) -> None:
    """Tell all sparse layers about the images of the next forward.

    Args:
        model: A ViT with MoE layers, or a vision-language model, whose rows are meant then.
        domain_B: Training environment of each image, int64; None: not known, as for a test image.
        embedding_BD: One embedding per image, of a frozen model for instance.

    Raises:
        TypeError: A layer takes its context from something that cannot be told.
    """
    given = {"domain_B": domain_B, "embedding_BD": embedding_BD}
    info = {name: value.detach() for name, value in given.items() if value is not None}
    for name, layer in routed_modules(model).items():
        context_of: Any = layer.context_of
        if not hasattr(context_of, "image_info"):
            raise TypeError(
                f"layer {name!r} gets its context from a {type(context_of).__name__}, which "
                "has to be told itself"
            )
        context_of.image_info = info
