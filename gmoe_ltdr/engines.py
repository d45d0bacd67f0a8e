"""Choosing how a model's experts are computed: a matter of speed, never of values."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from gmoe_ltdr.collect import moe_layers
from gmoe_ltdr.dispatch import LocalDispatcher
from gmoe_ltdr.dispatch.dense import DenseDispatcher
from gmoe_ltdr.expert_backends import EXPERT_BACKENDS

Model = TypeVar("Model", bound=nn.Module)


def use_expert_backend(model: Model, name: str) -> Model:
    """Compute the experts of every sparse layer with one back end.

        use_expert_backend(model, "dense")      # for torch.export, ONNX, compilers
        use_expert_backend(model, "auto")       # back to the default

    The choice belongs to the model object: copies keep it, checkpoints do not know it.

    Args:
        model: A model with MoE layers; changed in place.
        name: "auto" or a name in `EXPERT_BACKENDS`; see docs/engines.md.

    Returns:
        The same model.

    Raises:
        ValueError: No such back end, no MoE layer, or "dense" for experts on several devices.
    """
    names = ("auto", *EXPERT_BACKENDS)
    if name not in names:
        raise ValueError(f"expert back end {name!r} is not one of {', '.join(names)}")
    layers = moe_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no MoE layer, so no expert back end to choose"
        )
    for layer_name, layer in layers.items():
        on_one_device = isinstance(layer.dispatcher, (LocalDispatcher, DenseDispatcher))
        if name == "dense" and not on_one_device:
            raise ValueError(
                f"layer {layer_name!r} sends tokens with a {type(layer.dispatcher).__name__}; the "
                "dense back end computes all experts on one device, so load the model without an "
                "expert-parallel group first"
            )
    for layer in layers.values():
        layer.experts.backend = name
        if layer.shared_experts is not None and name != "dense":
            layer.shared_experts.backend = name
        if isinstance(layer.dispatcher, (LocalDispatcher, DenseDispatcher)):
            layer.dispatcher = (
                DenseDispatcher() if name == "dense" else LocalDispatcher(triton=name == "triton")
            )
    return model
