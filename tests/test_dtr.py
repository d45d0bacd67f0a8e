"""EvoMoE's dynamic token-aware router: a network per token, without ever making one."""

import pytest
import torch
import torch.nn.functional as F

from gmoe_ltdr import MoESpec, TokenContext, balance_loss, preset
from gmoe_ltdr.routers import create_router
from gmoe_ltdr.routers.dtr import HyperNetwork
from gmoe_ltdr.routing import Modality
from tests.models import tiny_dense_vit, tiny_moe_vit


def a_network_per_token(network: HyperNetwork, tokens_TD: torch.Tensor) -> torch.Tensor:
    """What the class computes, with each token's matrices made."""
    rank, dim = network.rank, tokens_TD.shape[1]
    out = []
    for token_D in tokens_TD:
        weights = network.fc2(network.fc1(token_D))
        down, up = weights[: 2 * rank * dim].view(2 * rank, dim), weights[2 * rank * dim :]
        inner = down @ token_D
        out.append(up.view(dim, rank) @ (F.silu(inner[:rank]) * inner[rank:]))
    return torch.stack(out)


def test_a_network_worked_by_hand():  # TV-C10
    network = HyperNetwork(2, 1, 1)
    router = create_router(2, preset("evomoe", num_experts=3))
    with torch.no_grad():
        network.fc1.weight.copy_(torch.tensor([[1.0, -1.0]]))
        network.fc1.bias.fill_(2.0)
        network.fc2.weight.copy_(torch.tensor([1.0, 0, 0, 1, 1, -1]).unsqueeze(1))
        router.gate.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]))
    router.hypernetworks[0] = network
    token = torch.tensor([[1.0, 2.0]])
    torch.testing.assert_close(network(token), torch.tensor([[1.462117, -1.462117]]))
    plan = router(token, TokenContext.all_vision(1, 1))
    torch.testing.assert_close(
        plan.logits_TE, torch.tensor([[1.462117, -1.462117, 0.0]]), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        plan.probs_TE, torch.tensor([[0.777937, 0.041780, 0.180283]]), atol=1e-6, rtol=0
    )
    # the only expert keeps its raw probability
    assert plan.combine_weights_TE[0].tolist() == [plan.probs_TE[0, 0].item(), 0.0, 0.0]


def test_no_network_is_made_and_the_result_is_the_same():
    torch.manual_seed(0)
    network = HyperNetwork(6, 4, 3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    tokens, cotangent = torch.randn(2, 10, 6)
    found = []
    for compute in (network, lambda x: a_network_per_token(network, x)):
        network.zero_grad()
        x = tokens.clone().requires_grad_()
        out = compute(x)
        out.backward(cotangent)
        grads = [p.grad.clone() for p in network.parameters()]
        found.append([out.detach(), x.grad, *grads])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kinds", "number"), [("shared", 1), ("modality", 2), ("cls", 2)])
def test_number_of_parameters(kinds, number):
    dim, num_experts = 384, 6
    spec = preset("evomoe", num_experts=num_experts, router_options={"hypernetworks": kinds})
    router = create_router(dim, spec)
    each = 16 * dim + 16 + (16 + 1) * 3 * 8 * dim
    assert sum(p.numel() for p in router.parameters()) == number * each + num_experts * dim


def test_routing_starts_near_uniform():
    torch.manual_seed(0)
    router = create_router(64, preset("evomoe"))
    plan = router(torch.randn(50, 64), TokenContext.all_vision(5, 10))
    assert (plan.probs_TE - 0.25).abs().max() < 1e-3
    assert plan.tokens_per_expert_E.max() < 50


def test_kinds_of_tokens_have_hypernetworks_of_their_own():
    torch.manual_seed(0)
    tokens = torch.randn(4, 8)
    modality = torch.tensor([[Modality.VISION, Modality.LANGUAGE] * 2], dtype=torch.uint8)
    is_cls = torch.tensor([[True, False, False, False]])
    context = TokenContext(modality, is_cls_BL=is_cls)
    for kinds, of_first in (
        ("modality", [False, True, False, True]),
        ("cls", [True, False, False, False]),
    ):
        router = create_router(8, preset("evomoe", router_options={"hypernetworks": kinds}))
        with torch.no_grad():
            router.hypernetworks[0].fc2.bias.fill_(1.0)
        before = router(tokens, context).logits_TE
        with torch.no_grad():
            router.hypernetworks[0].fc2.bias.fill_(2.0)
        changed = (router(tokens, context).logits_TE != before).any(-1)
        assert changed.tolist() == of_first
    with pytest.raises(ValueError, match="this model has none; use 'shared'"):
        router(tokens, TokenContext(modality))
    # where all tokens are of one kind
    plain = router(tokens, TokenContext(modality, is_cls_BL=torch.zeros_like(is_cls)))
    (balance_loss([plain], router.spec) + plain.combine_weights_TE.sum()).backward()
    assert all(p.grad is not None for p in router.parameters())


@pytest.mark.parametrize("weighting", ["renormalize", "raw", "softmax_of_probs"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_first_expert_alone(weighting, top_k):
    router = create_router(8, preset("evomoe", top_k=top_k, weighting=weighting, noise_std=1.0))
    router.first_expert_only.fill_(True)
    for training in (True, False):
        router.train(training)
        plan = router(torch.randn(6, 8), TokenContext.all_vision(2, 3))
        assert torch.equal(plan.combine_weights_TE, torch.eye(4)[:1].expand(6, -1))
        assert plan.experts_per_token_T.tolist() == [1] * 6
        assert plan.open_TE.tolist() == [[True, False, False, False]] * 6
    assert "first_expert_only" in router.state_dict()


def test_with_the_first_expert_alone_the_model_is_the_dense_one():
    torch.manual_seed(0)
    spec = preset("evomoe", expert_dropout=0.0)
    model = tiny_moe_vit(spec).eval()
    images = torch.randn(2, 3, 16, 16)
    for layer in (model.blocks[0].mlp, model.blocks[2].mlp):
        layer.router.first_expert_only.fill_(True)
        with torch.no_grad():  # what the others hold is of no account
            layer.experts.fc1_weight[1:].fill_(torch.nan)
    torch.testing.assert_close(model(images), tiny_dense_vit().eval()(images))


def test_what_is_refused():
    for options, message in (
        ({"rank": 0}, "rank"),
        ({"hidden_dim": 1.5}, "hidden_dim"),
        ({"hypernetworks": "many"}, "hypernetworks"),
    ):
        with pytest.raises(ValueError, match=message):
            create_router(8, MoESpec(router="dtr", router_options=options))
