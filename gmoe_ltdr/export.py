"""ONNX files of sparse models.

An ONNX graph has no ragged rows: the exported model computes every expert for every token (the
dense back end) and is otherwise the same function.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from gmoe_ltdr.engines import use_expert_backend


def export_onnx(
    model: nn.Module, path: str | os.PathLike, example: Tensor, *, dynamic_batch: bool = True
) -> Path:
    """Write a model as one ONNX file, for images of the example's size.

    Needs the extra [export]. Predictions in evaluation mode do not depend on an image's batch
    mates, so the file gives the same answers whatever batch size it is run with.

    Args:
        model: Left as it is; a copy is exported, in evaluation mode.
        path: Where to write, ".onnx".
        example: Images (batch, channels, height, width) of the type and size to expect. With
            `dynamic_batch`, two or more of them.
        dynamic_batch: Leave the batch size open.

    Raises:
        ImportError: The extra [export] is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"export_onnx needs {error.name}: pip install 'gmoe-ltdr[export]'"
        ) from error
    path = Path(path)
    model = use_expert_backend(copy.deepcopy(model).eval(), "dense")
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic_batch else None
    with torch.no_grad():
        torch.onnx.export(
            model,
            (example,),
            str(path),
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=["images"],
            output_names=["logits"],
            external_data=False,
            verbose=False,
        )
    return path
