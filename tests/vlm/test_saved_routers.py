"""Every router in Hugging Face's LLaVA, saved and loaded: the same model, in any precision."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from gmoe_ltdr import available_routers, moe_layers
from gmoe_ltdr.image_info import set_image_info
from gmoe_ltdr.tail import TailRule
from tests.vlm.llavas import questions, sparse_llava, with_labels

EMBEDDINGS = torch.tensor([[1.0, 0, 0], [0, 0, 2.0]])
# what a router cannot do without, or what gives it more to save
SETTINGS = {
    "cluster": {"router_options": {"num_clusters": 4, "embedding_dim": 3}},
    "dtr": {"router_options": {"hypernetworks": "modality"}},
    "dynamic": {"router_options": {"initial_experts": 3}},
    "task_hard": {"router_options": {"num_tasks": 2, "unseen": "nearest"}},
    "token_choice": {"preset": "ltdr", "tail_rule": TailRule(scope="ema", eval_scope="ema")},
}


def trained_llava(router):
    """A model with something in each of its router's buffers."""
    settings = {"preset": "baseline", "router": router, **SETTINGS.get(router, {})}
    model = sparse_llava(**settings)
    generator = torch.Generator().manual_seed(3)
    for layer in moe_layers(model).values():
        if router == "cluster":
            layer.router.set_centroids_(torch.randn(3, 3, generator=generator))
        if router == "distribution":
            layer.router.set_centroids_(torch.randn(6, 32, generator=generator))
    set_image_info(model, domain_B=torch.tensor([0, 1]), embedding_BD=EMBEDDINGS)
    model.train()(**with_labels(questions()))
    return model.eval()


def logits_of(model, batch):
    embedded = {"embedding_BD": EMBEDDINGS} if model.config.spec.router == "cluster" else {}
    set_image_info(model, **embedded)
    with torch.no_grad():
        return model(**batch).logits


def load(folder, **options):
    """Tensors lie in a mapped file where it happens to have them, and how they are aligned is worth
    a last digit of a product on some processors: a copy has memory like any other model's."""
    return copy.deepcopy(AutoModelForImageTextToText.from_pretrained(folder, **options))


def buffers_of(model):
    return {name: b for name, b in model.named_buffers() if ".router." in name}


@pytest.mark.parametrize("router", available_routers())
def test_a_loaded_model_is_the_saved_one(router, tmp_path):
    model = trained_llava(router)
    expected = logits_of(model, questions())
    model.save_pretrained(tmp_path)
    twin = load(tmp_path)
    assert torch.equal(logits_of(twin, questions()), expected)
    saved, loaded = buffers_of(model), buffers_of(twin)
    assert saved.keys() == loaded.keys()
    for name, buffer in saved.items():
        torch.testing.assert_close(loaded[name], buffer, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("router", available_routers())
def test_in_half_precision_counts_and_flags_stay_what_they_are(router, tmp_path):
    model = trained_llava(router)
    model.save_pretrained(tmp_path)
    half = load(tmp_path, dtype=torch.bfloat16)
    routers = [layer.router for layer in moe_layers(half).values()]
    assert {p.dtype for r in routers for p in r.parameters()} <= {torch.float32}
    for name, buffer in buffers_of(model).items():
        loaded = half.get_buffer(name)
        torch.testing.assert_close(loaded, buffer, rtol=0, atol=0, equal_nan=True, msg=name)
    assert half.lm_head.weight.dtype == torch.bfloat16
    batch = questions()
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    expected = logits_of(half, batch)
    assert torch.isfinite(expected).all()
    # and again from a folder that says bfloat16, which nobody repeats
    half.save_pretrained(tmp_path / "half")
    twin = load(tmp_path / "half", dtype="auto")  # the default since transformers 5
    assert twin.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(logits_of(twin, batch), expected)


def test_made_where_half_precision_is_the_default():
    """As loaders do it; the weights of some routers could not even be drawn in it."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = sparse_llava(preset="dynamic", num_experts=4, router_options={})
    finally:
        torch.set_default_dtype(torch.float32)
    types = {".router." in name: p.dtype for name, p in model.named_parameters()}
    assert types == {True: torch.float32, False: torch.bfloat16}


def test_what_a_folder_lacks_of_a_sparse_layer_is_not_made_up(tmp_path):
    sparse_llava().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = ("layers.0.mlp.experts.fc1_weight", "layers.2.mlp.router.gate.weight")
    kept = {name: value for name, value in tensors.items() if not name.endswith(lost)}
    assert len(kept) == len(tensors) - 2
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks 2 tensors .*{lost[0]}, .*{lost[1]};"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)
