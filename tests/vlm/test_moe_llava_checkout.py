"""The real MoE-LLaVA, converted: needs its checkout and the transformers that it runs on.

    pip install --target old_transformers --no-deps transformers==4.37.0 tokenizers==0.15.1 \\
        huggingface_hub==0.23.5 einops==0.6.1 sentencepiece tiktoken
    export PYTHONPATH=old_transformers MOE_LLAVA_DIR=/path/to/MoE-LLaVA
    pytest tests/vlm/test_moe_llava_checkout.py

DeepSpeed is not needed, nor MoE-LLaVA's own torch. transformers 4.37 takes the place of today's in
this process, so run this file alone.
"""

import importlib
import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from gmoe_ltdr import collect_routing, moe_layers
from gmoe_ltdr.routing import Modality
from gmoe_ltdr.tail import TailRule
from gmoe_ltdr.vlm import convert_moe_llava, load_moe_llava, spliced_modality_map, vlm_preset
from gmoe_ltdr.vlm.deepspeed_stub import deepspeed_stub
from tests.vlm.goldens import golden

CHECKOUT = os.environ.get("MOE_LLAVA_DIR", "")
FAMILIES = {  # module, configuration, class, sizes of its own
    "stablelm": ("llava_stablelm_moe", "MoELLaVAStablelm", {"rope_pct": 0.25}),
    "phi": ("llava_phi_moe", "MoELLaVAPhi", {}),
    "qwen1_5": ("llava_qwen1_5_moe", "MoELLaVAQwen1_5", {}),
}


def old_transformers() -> bool:
    try:
        import transformers
    except ImportError:
        return False
    return transformers.__version__.startswith("4.37")


pytestmark = [
    pytest.mark.moe_llava,
    pytest.mark.skipif(not Path(CHECKOUT, "moellava").is_dir(), reason="MOE_LLAVA_DIR is not set"),
    pytest.mark.skipif(not old_transformers(), reason="needs transformers 4.37"),
]


@pytest.fixture(autouse=True)
def checkout(tmp_path, monkeypatch):
    """The checkout on the path, and a tiny CLIP where its image tower looks for one."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    monkeypatch.syspath_prepend(CHECKOUT)
    monkeypatch.chdir(tmp_path)
    config = CLIPVisionConfig(**{k: v for k, v in golden().clip.items() if v is not None})
    tower = CLIPVisionModel(config)
    prefix = "model.image_tower.image_tower."
    state = {k.removeprefix(prefix): v for k, v in golden().state.items() if prefix in k}
    tower.load_state_dict(state, strict=False)
    tower.save_pretrained("openai/clip-tiny")
    side = golden().clip["image_size"]
    crop = {"height": side, "width": side}
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size=crop).save_pretrained(
        "openai/clip-tiny"
    )


def model_of(family: str, **changes):
    """A model with random weights, experts and gates told apart; not converted."""
    module, name, own = FAMILIES[family]
    with deepspeed_stub():
        classes = importlib.import_module(f"moellava.model.language_model.{module}")
    kept = ("mm_image_tower", "mm_hidden_size", "image_projector_type", "mm_vision_select_layer",
            "mm_vision_select_feature", "use_mm_proj", "vocab_size", "hidden_size",
            "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings")  # fmt: skip
    sizes = {name: golden().config[name] for name in kept}
    config = getattr(classes, f"{name}Config")(**sizes, **own, **changes)
    config.moe = dict(golden().config["moe"])
    torch.manual_seed(0)
    model = getattr(classes, f"Eval{name}ForCausalLM")(config)
    model.get_image_tower().load_model()
    for parameter in model.get_model().layers.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def batch():
    g = golden()
    names = ("input_ids", "attention_mask", "labels", "images")
    return {name: getattr(g, name) for name in names} | {"return_dict": True}


def test_golden_logits_and_a_checkpoint_of_its_own(tmp_path):
    model = model_of("stablelm", use_qkv_bias=True, tokenizer_padding_side="right")
    model.load_state_dict(golden().state)
    convert_moe_llava(model, vlm_preset("baseline"))
    real = golden().real
    with torch.no_grad():
        logits = model(**batch()).logits
    torch.testing.assert_close(logits[real], golden().logits[real], atol=1e-5, rtol=0)
    model.save_pretrained("saved")
    assert json.loads(Path("saved/config.json").read_text())["moe_spec"]["router"]
    spec = vlm_preset("ltdr", tail_rule=TailRule(eval_scope="batch"))
    twin = load_moe_llava("saved", spec)
    with torch.no_grad():
        output = twin(**batch())
    torch.testing.assert_close(output.logits[real], golden().ltdr_logits[real], atol=1e-5, rtol=0)
    for found, expected in zip(output.moe_loss_list, golden().ltdr_aux, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


PROMPTS = [
    [[5, -200, 6, 7, 8], [-200, 9, 0, 0, 0]],
    [[-200, 5, -200, 6], [7, -200, 0, 0]],
    [[5, 6, 7], [-200, 8, 0]],
]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_map_is_the_layout(family):
    options = ((0, 1, 2), ("left", "right"), (None, 20), (False, True), (False, True))
    for number, side, limit, with_labels, with_mask in itertools.product(*options):
        model = model_of(family, tokenizer_padding_side=side, tokenizer_model_max_length=limit)
        ids = torch.tensor(PROMPTS[number])
        mask = ids != 0 if with_mask else None
        labels = ids.masked_fill(ids < 6, -100) if with_labels else None
        num_images = int((ids == -200).sum()) + (number == 2)
        images = [torch.randn(3, 16, 16) for _ in range(num_images)]
        arguments = (ids, None, mask, None, labels, images)
        expected = model.prepare_inputs_labels_for_multimodal(*arguments)
        convert_moe_llava(model, vlm_preset("ltdr"))
        found = model.prepare_inputs_labels_for_multimodal(*arguments)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs)
        told = model.prepare_inputs_labels_for_multimodal.take().modality_BL
        layout = spliced_modality_map(
            ids, mask, [16] * num_images, max_length=limit, padding_side=side
        )
        assert torch.equal(told, layout)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_does_not_depend_on_the_cache(family):
    model = convert_moe_llava(model_of(family, tokenizer_padding_side="left"), vlm_preset("ltdr"))
    prompt = {"images": golden().images[:1], "attention_mask": golden().attention_mask[:1]}
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        found = [
            model.generate(golden().input_ids[:1], **prompt, **options, use_cache=use_cache)
            for use_cache in (True, False)
        ]
    assert torch.equal(*found)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_nothing(family):
    def gradients(checkpointing):
        model = convert_moe_llava(model_of(family), vlm_preset("ltdr")).train()
        model.config.use_cache = False
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": True})
            model.enable_input_require_grads()
        loss = model(**batch()).loss
        model(**{**batch(), "input_ids": golden().input_ids.flip(0)})  # another one in between
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(False), gradients(True)
    assert any("gate.wg" in name for name in found)
    for name, grad in found.items():
        assert torch.equal(grad, expected[name]), name


def test_routings_are_collected():
    model = convert_moe_llava(model_of("phi"), vlm_preset("ltdr"))
    with torch.no_grad(), collect_routing(model) as routings:
        model(**batch())
    assert list(routings) == list(moe_layers(model))
    vision = sum(int(r.of(Modality.VISION).sum()) for r in routings.values())
    assert vision == 2 * 2 * 16
    assert "deepspeed" not in sys.modules
