"""MoE-LLaVA at its own pins, with DeepSpeed 0.9.5, against itself with our gates in it.

In an environment of MoE-LLaVA's own (Python 3.10, about 5 GB; no GPU):

    pip install torch==2.0.1 torchvision==0.15.2 "numpy<2" "setuptools<70" wheel
    pip install transformers==4.37.0 tokenizers==0.15.1 sentencepiece==0.1.99 accelerate==0.21.0 \\
        peft==0.4.0 einops==0.6.1 protobuf==4.24.4 tiktoken==0.5.2 requests "pydantic<2,>=1" \\
        httpx==0.24.0 scikit-learn==1.2.2 pytest ninja "timm>=1.0"
    pip install --no-build-isolation deepspeed==0.9.5
    MOE_LLAVA_DIR=/path/to/MoE-LLaVA PYTHONPATH=. \\
        python -m pytest -p no:cacheprovider tests/vlm/test_moe_llava_pins.py

(MoE-LLaVA pins an older timm, which it does not use here.) The native layer needs today's torch:
test_moe_llava_checkout.py compares it with what this environment computes. DeepSpeed draws the
second expert; here its noise is zero, and it has room for every token, so that there is something
to compare.
"""

import os
from importlib.util import find_spec

import pytest
import torch

from gmoe_ltdr.vlm import convert_moe_llava, vlm_preset
from tests.distributed import run_ranks
from tests.vlm.goldens import golden
from tests.vlm.real_moe_llava import (
    CHECKOUT,
    FAMILIES,
    batch,
    model_of,
    start_deepspeed,
    why_not,
    write_tower_here,
)

MISSING = why_not() or ("" if find_spec("deepspeed") else "DeepSpeed is not installed")
pytestmark = [
    pytest.mark.moe_llava,
    pytest.mark.skipif(bool(MISSING), reason=MISSING or "it is there"),
]
ATOL = 1e-5  # of logits
AS_THE_HOST = {"router_options": {"padding": "language"}}  # which counts padding, too


@pytest.fixture(autouse=True)
def gumbel(tmp_path, monkeypatch):
    """The drawing of the second expert, which is switched off."""
    monkeypatch.syspath_prepend(CHECKOUT)
    monkeypatch.chdir(tmp_path)
    write_tower_here()
    start_deepspeed(29541)
    import deepspeed.moe.sharded_moe as sharded

    drawn = sharded.gumbel_rsample
    monkeypatch.setattr(
        sharded, "gumbel_rsample", lambda shape, device: torch.zeros(shape, device=device)
    )
    return drawn


def output_of(model):
    with torch.no_grad():
        return model(**batch())


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_off_equals_the_original(family, residual, k):
    moe = {"top_k_experts": k, "use_residual": residual}
    model = model_of(family, moe=moe)
    expected = output_of(model)
    names = list(model.state_dict())
    convert_moe_llava(model, vlm_preset("baseline", top_k=k, **AS_THE_HOST), "deepspeed")
    found = output_of(model)
    torch.testing.assert_close(found.logits, expected.logits, atol=ATOL, rtol=0)
    torch.testing.assert_close(found.loss, expected.loss, atol=ATOL, rtol=0)
    for ours, theirs in zip(found.moe_loss_list, expected.moe_loss_list, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert list(model.state_dict()) == names
    fresh = model_of(family, moe=moe)
    for parameter in fresh.parameters():
        torch.nn.init.zeros_(parameter)
    fresh.load_state_dict(model.state_dict())  # strict
    assert torch.equal(output_of(fresh).logits, expected.logits)


def test_a_presets_name_takes_top_k_from_the_model():
    for k in (1, 2):
        model = convert_moe_llava(
            model_of("stablelm", moe={"top_k_experts": k}), "baseline", "deepspeed"
        )
        gates = [m.gate for m in model.modules() if hasattr(m, "gate") and hasattr(m, "experts")]
        assert [gate.spec.top_k for gate in gates] == [k, k]


@pytest.mark.parametrize("family", FAMILIES)
def test_language_alone_is_plain_top_k(family):
    """With LTDR on, and no image."""
    inputs = {"input_ids": torch.randint(3, 120, (2, 9)), "return_dict": True}
    inputs["labels"], inputs["images"] = inputs["input_ids"], None
    model = model_of(family)
    with torch.no_grad():
        expected = model(**inputs)
        found = convert_moe_llava(model, vlm_preset("ltdr"), "deepspeed")(**inputs)
    torch.testing.assert_close(found.logits, expected.logits, atol=ATOL, rtol=0)
    torch.testing.assert_close(found.loss, expected.loss, atol=ATOL, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_the_originals(family):
    """Of the class for training, with the balance loss; only checkpointing loses that."""

    def gradients(convert):
        model = model_of(family, trained=True, use_cache=False)
        if convert:
            convert_moe_llava(model, vlm_preset("baseline", **AS_THE_HOST), "deepspeed")
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model(**batch()).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(False), gradients(True)
    assert any("gate.wg" in name for name in expected)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_evaluation_is_random_in_the_original_alone(gumbel, monkeypatch):
    import deepspeed.moe.sharded_moe as sharded

    monkeypatch.setattr(sharded, "gumbel_rsample", gumbel)
    model = model_of("stablelm")
    assert (output_of(model).logits - output_of(model).logits).abs().max() > 1e-2
    convert_moe_llava(model, vlm_preset("ltdr"), "deepspeed")
    assert torch.equal(output_of(model).logits, output_of(model).logits)


def test_adapters_compute_what_they_did():
    """PEFT's LoRA on experts, put in before the conversion."""
    peft = pytest.importorskip("peft")
    targets = ["gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model_of("stablelm", use_cache=False), config).eval()
    plain = output_of(model).logits
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = output_of(model).logits
    assert (expected - plain).abs().max() > 1e-3
    convert_moe_llava(model, vlm_preset("baseline", **AS_THE_HOST), "deepspeed")
    torch.testing.assert_close(output_of(model).logits, expected, atol=ATOL, rtol=0)


def shared_by_ranks(folder, checkout, ep_size):
    """One rank's golden output and gradients; with ep_size=2 it holds half of the experts."""
    import sys

    sys.path.insert(0, checkout)
    os.chdir(folder)
    start_deepspeed(29542)
    from gmoe_ltdr.tail import TailRule

    rank, held = torch.distributed.get_rank(), 4 // ep_size
    model = model_of("stablelm", moe={"ep_size": ep_size}, use_qkv_bias=True)
    state = {}
    for name, value in golden().state.items():
        before, mark, after = name.partition("deepspeed_experts.")
        number, _, rest = after.partition(".")
        if mark and ep_size > 1:
            if int(number) // held != rank:
                continue
            name = f"{before}{mark}{int(number) % held}.{rest}"
        state[name] = value
    model.load_state_dict(state)
    for layer in model.get_model().layers:
        if hasattr(layer.mlp, "set_deepspeed_parallelism"):
            layer.mlp.set_deepspeed_parallelism()
    spec = vlm_preset("ltdr", tail_rule=TailRule(eval_scope="batch"))
    convert_moe_llava(model, spec, "deepspeed")
    output = model(**batch())
    output.loss.backward()
    gradients = {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None and "experts." not in n
    }
    return output.logits.detach(), [a.detach() for a in output.moe_loss_list], gradients


def test_two_ranks_share_the_experts(tmp_path):
    """Against ranks that hold all of them, and the golden LTDR output."""
    apart = run_ranks(shared_by_ranks, 2, str(tmp_path), CHECKOUT, 2, limit_s=120)
    alone = run_ranks(shared_by_ranks, 2, str(tmp_path), CHECKOUT, 1, limit_s=120)
    real = golden().real
    for (logits, losses, grads), (_, _, expected) in zip(apart, alone, strict=True):
        torch.testing.assert_close(logits[real], golden().ltdr_logits[real], atol=ATOL, rtol=0)
        for ours, theirs in zip(losses, golden().ltdr_aux, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-4, msg=name)
