"""torch.export and ONNX: the dense path, for any batch size."""

import pytest
import torch

from gmoe_ltdr import TailRule, moe_layers, preset
from gmoe_ltdr.engines import use_expert_backend
from gmoe_ltdr.export import export_onnx
from tests.models import tiny_moe_vit


def test_torch_export_with_an_open_batch_size():
    model = use_expert_backend(tiny_moe_vit(preset("ltdr")).eval(), "dense")
    x = torch.randn(3, 3, 16, 16)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    for images in (x, x[:1], torch.randn(7, 3, 16, 16)):
        torch.testing.assert_close(program.module()(images), model(images))


@pytest.mark.parametrize("num_shared", [1, 2])
def test_shared_experts_leave_the_batch_size_open(num_shared):
    spec = preset("deepseek_1x1.0+3x1.0", shared_experts=num_shared)
    model = use_expert_backend(tiny_moe_vit(spec).eval(), "dense")
    x = torch.randn(3, 3, 16, 16)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    for images in (x[:1], torch.randn(7, 3, 16, 16)):
        torch.testing.assert_close(program.module()(images), model(images))


ONNX_SPECS = {
    "ltdr": preset("ltdr"),
    "gmoe": preset("gmoe"),
    "deepseek": preset("deepseek_1x1.0+3x1.0"),
    "expert_choice": preset("ltdr_expert_choice"),
    "quantile": preset("ltdr", tail_rule=TailRule(kind="quantile", value=0.2)),
    "attention": preset("ltdr", tail_rule=TailRule(kind="attention")),
}


@pytest.mark.parametrize(
    "name", ["ltdr", *(pytest.param(n, marks=pytest.mark.slow) for n in ONNX_SPECS if n != "ltdr")]
)
def test_onnx_runtime_gives_the_same_logits(name, tmp_path):
    pytest.importorskip("onnx", reason="needs the extra [export]")
    pytest.importorskip("onnxscript", reason="needs the extra [export]")
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra [export]")
    model = tiny_moe_vit(ONNX_SPECS[name]).eval()
    for layer in moe_layers(model).values():
        for parameter in layer.parameters():  # decisions that differ between tokens
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    backend = next(iter(moe_layers(model).values())).experts.backend
    path = export_onnx(model, tmp_path / "model.onnx", torch.randn(2, 3, 16, 16))
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 16, 16)
        (logits,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(images))
    # the model itself is as it was
    assert next(iter(moe_layers(model).values())).experts.backend == backend


def test_export_says_which_extra_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    pytest.importorskip("onnx", reason="needs the extra [export]")
    with pytest.raises(ImportError, match=r"gmoe-ltdr\[export\]"):
        export_onnx(tiny_moe_vit(preset("ltdr")), tmp_path / "m.onnx", torch.randn(2, 3, 16, 16))
