"""The real MoE-LLaVA, converted: needs its checkout and the transformers that it runs on.

    pip install --target old_transformers --no-deps transformers==4.37.0 tokenizers==0.15.1 \\
        huggingface_hub==0.23.5 einops==0.6.1 sentencepiece tiktoken
    export PYTHONPATH=old_transformers:. MOE_LLAVA_DIR=/path/to/MoE-LLaVA
    python -m pytest -n 0 tests/vlm/test_moe_llava_checkout.py

DeepSpeed is not needed, nor MoE-LLaVA's own torch. transformers 4.37 takes the place of today's in
this process, so run this file alone. With peft 0.4.0 and accelerate 0.21.0 in that folder, LoRA and
the host's trainer are tried, too; with MOE_LLAVA_PYTHON, numbers against MoE-LLaVA at its pins
(tests/vlm/moe_llava_references.py).
"""

import itertools
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from gmoe_ltdr import collect_routing, moe_layers
from gmoe_ltdr.routing import Modality
from gmoe_ltdr.tail import TailRule
from gmoe_ltdr.vlm import convert_moe_llava, load_moe_llava, spliced_modality_map, vlm_preset
from tests.vlm import moe_llava_references
from tests.vlm.goldens import golden
from tests.vlm.real_moe_llava import CHECKOUT, FAMILIES, batch, model_of, why_not, write_tower_here

pytestmark = [
    pytest.mark.moe_llava,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "it is there"),
]


@pytest.fixture(autouse=True)
def checkout(tmp_path, monkeypatch):
    """The checkout on the path, and a tiny CLIP where its image tower looks for one."""
    monkeypatch.syspath_prepend(CHECKOUT)
    monkeypatch.chdir(tmp_path)
    write_tower_here()


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
@pytest.mark.parametrize("beams", [1, 2])
def test_a_prompt_decides_for_its_answer(family, beams):
    """INSTRUCT: every step routes as the prompt did, through the host's cache and beam search."""
    spec = vlm_preset("baseline", router="instruct")
    model = convert_moe_llava(model_of(family, tokenizer_padding_side="left"), spec)
    plans = []
    handle = next(iter(moe_layers(model).values())).router.register_forward_hook(
        lambda _router, _inputs, plan: plans.append(plan.logits_TE.view(*plan.shape_BL, 4)[:, -1])
    )
    # a tensor, since the host repeats no list of images for its beams
    prompt = {
        "images": torch.stack(golden().images[:1]),
        "attention_mask": golden().attention_mask[:1],
    }
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        model.generate(golden().input_ids[:1], **prompt, **options, num_beams=beams)
    handle.remove()
    assert len(plans) == 4
    for decided in plans[1:]:
        assert torch.equal(decided, plans[0])


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
    assert find_spec("deepspeed") or "deepspeed" not in sys.modules


@pytest.mark.skipif(bool(moe_llava_references.why_not()), reason="MOE_LLAVA_PYTHON is not set")
@pytest.mark.parametrize("case", moe_llava_references.CASES, ids=str)
def test_off_equals_moe_llava_at_its_pins(case):
    """The native layer, in another torch and without DeepSpeed, against DeepSpeed 0.9.5."""
    family, k, residual = case
    expected = moe_llava_references.references()[case]
    model = model_of(family, moe={"top_k_experts": k, "use_residual": residual})
    model.load_state_dict(expected["state"])
    spec = vlm_preset("baseline", top_k=k, router_options={"padding": "language"})
    convert_moe_llava(model, spec)
    with torch.no_grad():
        output = model(**batch())
    torch.testing.assert_close(output.logits, expected["logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.loss, expected["loss"], atol=1e-5, rtol=0)
    for found, loss in zip(output.moe_loss_list, expected["losses"], strict=True):
        torch.testing.assert_close(found, loss, atol=1e-6, rtol=0)


def test_adapters():
    """PEFT's LoRA on experts, put in before the conversion; numbers in test_moe_llava_pins.py."""
    peft = pytest.importorskip("peft")
    targets = ["gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model_of("stablelm", use_cache=False), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    names = list(model.state_dict())
    convert_moe_llava(model, vlm_preset("ltdr"))
    assert list(model.state_dict()) == names
    model.train()(**batch()).loss.backward()
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    assert len(adapters) == (2 * 4 + 2) * 3 * 2  # two sparse layers, two dense ones
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_hosts_trainer(checkpointing, tmp_path):
    pytest.importorskip("accelerate")
    from moellava.train.llava_trainer import LLaVATrainer
    from moellava.train.train import TrainingArguments

    model = convert_moe_llava(
        model_of("stablelm", trained=True, use_cache=False), vlm_preset("ltdr")
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), no_cuda=True, max_steps=3, learning_rate=1e-2,
        per_device_train_batch_size=2, report_to=[], save_strategy="no",
        gradient_checkpointing=checkpointing, remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    arguments.moe_enable = False
    g = golden()
    names = ("input_ids", "labels", "attention_mask", "images")
    rows = [{name: getattr(g, name)[row] for name in names} for row in (0, 1) * 3]

    def collate(some):
        return {
            name: [row[name] for row in some] if name == "images"
            else torch.stack([row[name] for row in some])
            for name in names
        }  # fmt: skip

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = LLaVATrainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collate, tokenizer=None
    )
    assert 0 < trainer.train().training_loss < 10
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved or not parameter.requires_grad or "image_tower" in name, name
