"""Upcycling keeps the function where the weights sum to 1, and refuses what it cannot copy."""

import copy

import pytest
import timm
import torch

from gmoe_ltdr import MoE, collect_routing, moe_layers, preset, upcycle_
from gmoe_ltdr.tail import TailRule
from gmoe_ltdr.upcycle import dense_copy
from tests.models import tiny_dense_vit, tiny_moe_vit

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))

VITS = {
    "plain": {"name": "vit_tiny_patch16_224"},
    "deit": {"name": "deit_tiny_patch16_224"},
    "deit_distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "layer_scale": {"name": "deit3_small_patch16_224"},
    "registers": {"name": "vit_small_patch16_224", "reg_tokens": 4},
    "no_class_token": {"name": "vit_tiny_patch16_224", "class_token": False, "global_pool": "avg"},
}


@pytest.mark.parametrize("kind", VITS)
@pytest.mark.parametrize("name", ["ltdr", "ltdr_v2_literal"])
def test_upcycled_equals_dense(kind, name):
    dense = tiny_dense_vit(**VITS[kind]).eval()
    with torch.no_grad():
        for parameter in dense.parameters():  # LayerScale starts at 1e-6 and would hide anything
            parameter.add_(0.05 * torch.randn_like(parameter))
    expected = dense(IMAGES)
    sparse = upcycle_(copy.deepcopy(dense), preset(name, layers="every_other"))
    assert all(isinstance(sparse.blocks[i].mlp, MoE) for i in (0, 2))
    torch.testing.assert_close(sparse(IMAGES), expected, atol=1e-5, rtol=1e-5)
    # and in training mode without noise and dropout
    quiet = preset(name, layers="every_other", noise_std=0.0, expert_dropout=0.0)
    sparse = upcycle_(copy.deepcopy(dense), quiet).train()
    torch.testing.assert_close(sparse(IMAGES), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", VITS)
def test_a_dense_copy_is_the_model_that_was_upcycled(kind):
    dense = tiny_dense_vit(**VITS[kind])
    sparse = upcycle_(copy.deepcopy(dense), preset("gmoe", layers="every_other"))
    before = torch.get_rng_state()
    twin = dense_copy(sparse)
    assert torch.equal(torch.get_rng_state(), before)
    assert twin.state_dict().keys() == dense.state_dict().keys()
    for name, value in dense.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value), name
    assert torch.equal(twin.eval()(IMAGES), dense.eval()(IMAGES))
    assert all(isinstance(sparse.blocks[i].mlp, MoE) for i in (0, 2))
    with torch.no_grad():
        twin.blocks[0].mlp.fc1.weight.zero_()
    assert sparse.blocks[0].mlp.experts.fc1_weight[0].any()


@pytest.mark.parametrize("name", ["gmoe_dropless", "ltdr_v1_literal"])
def test_raw_weights_scale_the_dense_output(name):
    layer = MoE(16, 32, preset(name)).eval()
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter).clone())
    x = torch.randn(2, 5, 16)
    with collect_routing(layer) as routings:
        out = layer(x)
    scale = routings[""].combine_weights_TE.sum(-1).view(2, 5, 1)
    assert (scale < 0.999).any()
    hidden = torch.nn.functional.gelu(x @ layer.experts.fc1_weight[0].T + layer.experts.fc1_bias[0])
    dense = hidden @ layer.experts.fc2_weight[0].T + layer.experts.fc2_bias[0]
    torch.testing.assert_close(out, scale * dense, atol=1e-5, rtol=1e-5)


def test_router_gradient_of_identical_experts():
    def gradient(weighting):
        spec = preset("ltdr", weighting=weighting, noise_std=0.0, expert_dropout=0.0)
        model = tiny_moe_vit(spec, drop_path_rate=0.0)
        model(IMAGES).square().sum().backward()
        return sum(m.router.gate.expert_embed.grad.abs().sum() for m in moe_layers(model).values())

    # normalised weights of equal experts sum to 1 whatever the router says
    assert gradient("renormalize") < 1e-4 * gradient("raw")


@pytest.mark.parametrize(
    ("layers", "depth", "blocks"),
    [
        ("gmoe", 12, (8, 10)),
        ("gmoe", 4, (0, 2)),
        ("gmoe", 3, (0, 2)),
        ("gmoe", 6, (2, 4)),
        ("every_other", 5, (0, 2, 4)),
        ("last_two", 4, (2, 3)),
        ((3, 1), 4, (1, 3)),
        ((-1,), 4, (3,)),
    ],
)
def test_which_blocks_become_sparse(layers, depth, blocks):
    model = tiny_moe_vit(preset("ltdr", layers=layers), depth=depth)
    assert tuple(moe_layers(model)) == tuple(f"blocks.{i}.mlp" for i in blocks)


def test_attention_scores_are_the_class_token_row_of_the_attention_map():
    spec = preset("ltdr", tail_rule=TailRule(kind="attention", value=0.25), layers=(1,))
    model = tiny_moe_vit(spec).eval()
    for block in model.blocks:
        block.attn.fused_attn = False
    maps = []
    # timm's own attention map, read where it is dropped out
    handle = model.blocks[1].attn.attn_drop.register_forward_hook(
        lambda module, inputs, output: maps.append(output)
    )
    with collect_routing(model) as routings:
        model(IMAGES)
    handle.remove()
    scores = maps[0][:, :, 0].mean(1)
    torch.testing.assert_close(model.blocks[1].mlp.context_of._attention_BL, scores)
    tail = routings["blocks.1.mlp"].tail_mask_T.view(3, 17)
    assert not tail[:, 0].any()
    assert (tail.sum(1) == 4).all()  # floor(.25 * 16)
    for image in range(3):
        best = scores[image, 1:].topk(4).indices + 1
        assert tail[image, best].all()
    twin = copy.deepcopy(model)
    assert twin.blocks[1].mlp.context_of is not model.blocks[1].mlp.context_of
    torch.testing.assert_close(twin(IMAGES.flip(0)), model(IMAGES.flip(0)))


def test_what_cannot_be_copied_is_refused_and_left_alone():
    swiglu = timm.create_model(
        "vit_tiny_patch16_224", mlp_layer=timm.layers.SwiGLUPacked, depth=2, img_size=32
    )
    with pytest.raises(TypeError, match=r"blocks\.0\.mlp is a GluMlp"):
        upcycle_(swiglu, preset("ltdr"))
    assert not moe_layers(swiglu)
    with pytest.raises(TypeError, match="no `blocks`"):
        upcycle_(torch.nn.Linear(2, 2), preset("ltdr"))
    with pytest.raises(ValueError, match="sparse already"):
        upcycle_(tiny_moe_vit(preset("ltdr")), preset("ltdr"))
    with pytest.raises(ValueError, match="blocks 0 to 3"):
        upcycle_(tiny_dense_vit(), preset("ltdr", layers=(4,)))
    no_class_token = tiny_dense_vit(class_token=False, global_pool="avg")
    with pytest.raises(ValueError, match="class token"):
        upcycle_(no_class_token, preset("ltdr", tail_rule=TailRule(kind="attention")))


@pytest.mark.parametrize("layer", ["AttentionRope", "DiffAttention"])
def test_attention_of_another_kind_is_not_taken_for_the_plain_one(layer):
    """They have the same parts, and make other scores of them."""
    model = tiny_dense_vit(attn_layer=getattr(timm.layers, layer))
    with pytest.raises(TypeError, match=rf"blocks\.0\.attn is a {layer} and not timm's plain"):
        upcycle_(model, preset("ltdr", tail_rule=TailRule(kind="attention")))


def test_a_class_token_that_joins_behind_the_blocks_is_none_of_their_tokens():
    cait = timm.create_model("cait_xxs24_224", img_size=32, num_classes=2)
    model = upcycle_(cait, preset("ltdr", layers=(0,), tail_rule=TailRule(cls="exclude"))).eval()
    with collect_routing(model) as routings, torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert routings["blocks.0.mlp"].shape_BL == (1, 4)  # four patches and nothing before them
    assert model.blocks[0].mlp.context_of.num_prefix_tokens == 0


def test_nothing_is_left_behind_when_a_router_cannot_be_made():
    model = tiny_dense_vit()
    rule = TailRule(kind="attention")
    with pytest.raises(ValueError, match="sharpening"):
        upcycle_(model, preset("ltdr", tail_rule=rule, router_options={"sharpening_strength": 1}))
    assert not moe_layers(model)
    assert not any(block.attn._forward_hooks for block in model.blocks)


def test_precision_and_mode_are_kept():
    dense = tiny_dense_vit().bfloat16().eval()
    sparse = upcycle_(dense, preset("ltdr"))
    assert sparse.blocks[0].mlp.experts.fc1_weight.dtype == torch.bfloat16
    assert not sparse.blocks[0].mlp.training
    assert sparse(IMAGES.bfloat16()).dtype == torch.bfloat16
