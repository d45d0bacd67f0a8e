"""DeepSpeed's own layers of today (0.19) with our gates in them, on one process and on two that
share the experts.

    pip install --no-build-isolation deepspeed==0.19.8    # it compiles its CPU collectives once
    python -m pytest -m deepspeed
"""

import functools
import os
from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("transformers")

from gmoe_ltdr.tail import TailRule
from gmoe_ltdr.vlm import convert_moe_llava, vlm_preset
from tests.distributed import run_ranks
from tests.vlm.goldens import golden

pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]
LIMIT_S = 400  # the first start compiles
BATCH = ("input_ids", "attention_mask", "labels", "images")


def start():
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29544", WORLD_SIZE=str(size))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    return rank, size


def golden_model(rank, size):
    """With DeepSpeed's layers, each rank holding its part of the experts; not converted."""
    from deepspeed.moe.layer import MoE

    from tests.vlm.fake_moe_llava import FakeMoELlava, golden_state

    layer = functools.partial(
        MoE, capacity_factor=2.0, eval_capacity_factor=2.0, min_capacity=0, ep_size=size
    )
    model = FakeMoELlava(golden().config, golden().clip, moe_class=layer)
    state, held = {}, 4 // size
    for name, value in golden_state(model).items():
        before, mark, after = name.partition("deepspeed_experts.")
        number, _, rest = after.partition(".")
        if mark and int(number) // held != rank:
            continue
        state[f"{before}{mark}{int(number) % held}.{rest}" if mark else name] = value
    model.load_state_dict(state)
    for one in model.model.layers:
        if hasattr(one.mlp, "set_deepspeed_parallelism"):
            one.mlp.set_deepspeed_parallelism()
    return model.eval()


def shared_gradients(model):
    return {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None and "experts." not in n
    }


def ltdr_of_rank():
    model = golden_model(*start())
    spec = vlm_preset("ltdr", tail_rule=TailRule(eval_scope="batch"))
    convert_moe_llava(model, spec, "deepspeed")
    output = model(**{name: getattr(golden(), name) for name in BATCH})
    output.loss.backward()
    losses = [loss.detach() for loss in output.moe_losses]
    return output.logits.detach(), losses, shared_gradients(model)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_our_gate_in_deepspeeds_layer(num_ranks):
    """Logits and balance losses of the golden file, gradients of the native layer."""
    from tests.vlm.fake_moe_llava import golden_host

    native = golden_host()
    convert_moe_llava(native, vlm_preset("ltdr", tail_rule=TailRule(eval_scope="batch")))
    native(**{name: getattr(golden(), name) for name in BATCH}).loss.backward()
    expected, real = shared_gradients(native), golden().real
    for logits, losses, gradients in run_ranks(ltdr_of_rank, num_ranks, limit_s=LIMIT_S):
        torch.testing.assert_close(logits[real], golden().ltdr_logits[real], atol=1e-5, rtol=0)
        for found, loss in zip(losses, golden().ltdr_aux, strict=True):
            torch.testing.assert_close(found, loss, atol=1e-6, rtol=0)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def trained_by_engine(stage):
    """Parameters after three steps of DeepSpeed's engine on Hugging Face's LLaVA."""
    rank, _ = start()
    import deepspeed

    from tests.vlm.llavas import questions, sparse_llava, with_labels

    model = sparse_llava().train()
    model.model.vision_tower.requires_grad_(False)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    losses = []
    for step in range(3):
        loss = engine(**with_labels(questions(seed=2 * step + rank))).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses, {name: p.detach().float() for name, p in model.named_parameters()}


@pytest.mark.parametrize("stage", [0, 2])
def test_the_engine_trains_hugging_faces_llava(stage):
    """Two ranks with different rows stay one model, which moves."""
    from tests.vlm.llavas import sparse_llava

    (losses, first), (_, second) = run_ranks(trained_by_engine, 2, stage, limit_s=LIMIT_S)
    assert all(0 < loss < 20 for loss in losses)
    start = dict(sparse_llava().named_parameters())
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        moved = not torch.equal(value, start[name])
        assert moved == ("vision_tower" not in name), name
