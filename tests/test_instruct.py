"""INSTRUCT: one decision per image, of its mean patch or of a prompt's mean token."""

import pytest
import torch
from torch.nn.functional import linear

from gmoe_ltdr import MoE, MoESpec, TokenContext, collect_routing
from gmoe_ltdr.decoding import reuse_decisions, sequence_decisions
from gmoe_ltdr.routers import create_router
from gmoe_ltdr.routers.image_level import image_means, route_images
from gmoe_ltdr.routers.instruct import instruction_tokens
from gmoe_ltdr.routing import Modality
from tests.vectors import vision

SPEC = MoESpec(router="instruct", num_experts=3, top_k=2, gate="linear", noise_std=0.0)
P, V, T = int(Modality.PADDING), int(Modality.VISION), int(Modality.LANGUAGE)


def worked_router(**options):
    """The gate of the worked example: rows [2, 0], [0, 0], [0, 4]."""
    router = create_router(2, MoESpec(**{**vars(SPEC), "router_options": options}))
    with torch.no_grad():
        router.gate.weight.copy_(torch.tensor([[2.0, 0], [0, 0], [0, 4]]))
    return router


def patches(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def test_the_mean_patch_decides():  # TV-C3
    plan = worked_router()(patches([1, 0], [0, 1]), TokenContext.all_vision(1, 2))
    assert plan.logits_TE.tolist() == [[1, 0, 2]] * 2
    probs = torch.tensor([0.244728, 0.090031, 0.665241])
    torch.testing.assert_close(plan.probs_TE[0], probs, atol=1e-6, rtol=0)
    assert plan.dispatch_mask_TE.tolist() == [[True, False, True]] * 2
    # .244728 and .665241 over their sum, for both tokens alike
    expected = torch.tensor([0.268941, 0.0, 0.731059])
    torch.testing.assert_close(plan.combine_weights_TE, expected.expand(2, 3), atol=1e-6, rtol=0)


def test_the_class_token_has_no_say_unless_asked():  # TV-C3
    tokens, context = patches([9, 9], [1, 0], [0, 1]), TokenContext.all_vision(1, 3)
    with_cls = TokenContext.all_vision(1, 3, num_prefix_tokens=1)
    assert worked_router()(tokens, with_cls).logits_TE[0].tolist() == [1, 0, 2]
    included = worked_router(cls="include")(tokens, with_cls).logits_TE[0]
    torch.testing.assert_close(included, torch.tensor([6.666667, 0, 13.333333]), atol=1e-5, rtol=0)
    assert torch.equal(included, worked_router()(tokens, context).logits_TE[0])


def test_the_order_of_patches_does_not_matter():  # TV-C3b
    router = create_router(8, SPEC)
    tokens = torch.randn(2, 6, 8)
    context = TokenContext.all_vision(2, 6)
    plan = router(tokens.flatten(0, 1), context)
    for image in plan.combine_weights_TE.view(2, 6, 3):
        assert torch.equal(image, image[:1].expand(6, 3))
    again = router(tokens[:, torch.randperm(6)].flatten(0, 1), context)
    torch.testing.assert_close(again.combine_weights_TE, plan.combine_weights_TE)


def test_without_any_token_all_experts_are_alike():  # TV-C3c
    context = TokenContext(torch.tensor([[V, V]]), instruction_BL=torch.zeros(1, 2).bool())
    plan = worked_router()(patches([1, 0], [0, 1]), context)
    torch.testing.assert_close(plan.probs_TE, torch.full((2, 3), 1 / 3))
    assert plan.dispatch_mask_TE.tolist() == [[True, True, False]] * 2


def test_whose_mean_it_is():
    modality = torch.tensor([[V, V, T, T, P], [V, V, V, P, P]], dtype=torch.uint8)
    is_cls = torch.tensor([[1, 0, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()

    def chosen(include_cls=False, **fields):
        context = TokenContext(modality, is_cls_BL=is_cls, **fields)
        return instruction_tokens(context, include_cls=include_cls).int().tolist()

    assert chosen() == [[0, 0, 1, 1, 0], [0, 1, 1, 0, 0]]
    assert chosen(include_cls=True)[1] == [1, 1, 1, 0, 0]
    prompt = torch.tensor([[0, 0, 1, 0, 1], [0, 0, 0, 0, 0]]).bool()
    assert chosen(instruction_BL=prompt) == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]
    with pytest.raises(ValueError, match="instruction_BL has shape"):
        TokenContext(modality, instruction_BL=prompt[:, :3])


def test_means_ignore_what_is_not_chosen():
    tokens = torch.tensor([[1.0], [float("nan")], [3.0], [5.0]])
    chosen = torch.tensor([[1, 0], [1, 1]]).bool()
    assert image_means(tokens, chosen).tolist() == [[1.0], [4.0]]
    assert image_means(tokens.bfloat16(), chosen).dtype == torch.float32


def test_an_answer_does_not_change_the_experts():
    """In training the answer stands behind the prompt; it must not choose."""
    router = create_router(8, SPEC)
    tokens = torch.randn(5, 8)
    prompt = torch.tensor([[0, 0, 1, 1, 0]]).bool()
    context = TokenContext(torch.tensor([[V, V, T, T, T]]), instruction_BL=prompt)
    first = router(tokens, context)
    tokens[4] += 10
    assert torch.equal(router(tokens, context).combine_weights_TE, first.combine_weights_TE)


def test_noise_is_drawn_once_per_image():
    router = create_router(8, MoESpec(router="instruct", num_experts=4, noise_std=1.0))
    tokens = torch.randn(40_000, 8)
    plan = router(tokens, TokenContext.all_vision(20_000, 2))
    noise = (plan.noisy_logits_TE - plan.logits_TE).view(20_000, 2, 4)
    assert torch.equal(noise[:, 0], noise[:, 1])
    assert noise.std().item() == pytest.approx(0.25, abs=0.005)
    assert router.eval()(tokens, TokenContext.all_vision(20_000, 2)).noisy_logits_TE is None


def test_the_gradient_reaches_the_gate_through_the_weights():
    logits = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).log().requires_grad_()
    plan = route_images(logits, vision(1, 2), top_k=2, weighting="renormalize")
    (plan.combine_weights_TE @ torch.tensor([1.0, 2, 3, 4])).sum().backward()
    # twice the gradient of one token, which is -7/64, 7/64
    expected = torch.tensor([[-0.21875, 0.21875, 0, 0]])
    torch.testing.assert_close(logits.grad, expected, atol=1e-6, rtol=0)


class Sequences:
    """`context_of` of a stand-in for a language model."""

    def __init__(self):
        self.context = None

    def __call__(self, x):
        return self.context


def test_decoding_goes_on_with_the_experts_of_the_prompt():
    torch.manual_seed(0)
    told = Sequences()
    layers = [MoE(8, 16, SPEC, context_of=told) for _ in range(2)]
    model = torch.nn.Sequential(*layers).eval()
    told.context = TokenContext(torch.tensor([[V, V, T, T], [V, V, T, P]], dtype=torch.uint8))
    prompts = torch.randn(2, 4, 8) + torch.tensor([5.0, -5.0]).view(2, 1, 1)
    with collect_routing(model) as prefill:
        model(prompts)
    decided = sequence_decisions(model, prefill)
    assert list(decided) == ["0", "1"]

    told.context = TokenContext(torch.full((2, 1), T, dtype=torch.uint8))
    token = torch.randn(2, 1, 8)
    with reuse_decisions(model, decided), collect_routing(model) as step:
        model(token)
    for name, plan in step.items():
        per_sequence = prefill[name].combine_weights_TE.view(2, 4, 3)[:, 0]
        assert torch.equal(plan.combine_weights_TE, per_sequence)
    with collect_routing(model) as alone:
        model(token)
    assert not torch.equal(alone["0"].logits_TE, step["0"].logits_TE)

    # three beams of the second sequence
    told.context = TokenContext(torch.full((3, 1), T, dtype=torch.uint8))
    beams = {name: logits[[1, 1, 1]] for name, logits in decided.items()}
    with reuse_decisions(model, beams), collect_routing(model) as step:
        model(token[[1, 1, 1]])
    last = prefill["1"].combine_weights_TE.view(2, 4, 3)[1, 0]
    assert torch.equal(step["1"].combine_weights_TE, last.expand(3, 3))
    with pytest.raises(ValueError, match="decided_logits_BE describes 2 images"):
        with reuse_decisions(model, decided):
            model(token[[1, 1, 1]])
    assert not layers[0].router._forward_pre_hooks


def test_the_layer_computes_the_chosen_experts():
    torch.manual_seed(0)
    layer = MoE(8, 16, SPEC).eval()
    x = torch.randn(2, 5, 8)
    weights = linear(x.mean(1), layer.router.gate.weight).softmax(-1)
    out = layer(x)
    for image in range(2):
        best = weights[image].topk(2)
        share = best.values / best.values.sum()
        expected = sum(
            w * layer.experts(x[image], [5 if e == i else 0 for i in range(3)])
            for w, e in zip(share, best.indices.tolist(), strict=True)
        )
        torch.testing.assert_close(out[image], expected, atol=1e-6, rtol=1e-5)
