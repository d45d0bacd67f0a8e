"""STGC: hand-worked conflicts and losses, and gradients of single tokens out of a fused layer."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from gmoe_ltdr import MoE, collect_routing, moe_layers, preset, use_expert_backend
from gmoe_ltdr.dispatch.static_rows import combine_static, dispatch_static
from gmoe_ltdr.linear_outputs import collect_linear_outputs
from gmoe_ltdr.token_conflicts import conflict_loss, conflicting_rows, token_conflicts
from tests.models import tiny_moe_vit
from tests.oracle import plan

QUIET = {"noise_std": 0.0, "expert_dropout": 0.0}


def test_a_token_against_the_mean_conflicts():  # TV-C5
    grads = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert conflicting_rows([grads]).tolist() == [False, False, True]
    assert conflicting_rows([grads * 1e-25]).tolist() == [False, False, True]  # scale-free


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.0, [False, False, True]), (0.7, [False, False, True]), (0.71, [True, True, True])],
)
def test_cosines(threshold, expected):  # TV-C5b: .707107, .707107, -1
    grads = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.5, -0.5]])
    assert conflicting_rows([grads], threshold).tolist() == expected


def test_both_linear_layers_count():
    against = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    # cosines with the mean [2/3, 1/3]: .894, .894, .447; averages with 1, 1, -1: all but the last
    along = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert conflicting_rows([against, along]).tolist() == [False, False, True]
    assert conflicting_rows([against, along], -0.5).tolist() == [False, False, False]


def test_lonely_and_still_tokens_do_not_conflict():
    assert conflicting_rows([torch.tensor([[-1.0, 0.0]])]).tolist() == [False]
    assert conflicting_rows([torch.zeros(0, 2)]).tolist() == []
    grads = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert conflicting_rows([grads]).tolist() == [False, False]
    assert conflicting_rows([torch.zeros(3, 2)]).tolist() == [False] * 3


def routing_of(logits) -> object:
    logits_TE = torch.tensor(logits, requires_grad=True)
    return plan(torch.ones(logits_TE.shape, dtype=torch.bool), logits_TE=logits_TE)


def test_conflict_loss():  # TV-C5
    routing = routing_of([[2.0, 0.0]])
    conflicts = torch.tensor([[True, False]])
    loss = conflict_loss(routing, conflicts, divide_by_experts=False)
    assert loss.item() == pytest.approx(2.126928, abs=1e-6)
    loss.backward()
    expected = torch.tensor([[0.880797, -0.880797]])
    torch.testing.assert_close(routing.logits_TE.grad, expected, atol=1e-6, rtol=0)
    assert conflict_loss(routing, conflicts).item() == pytest.approx(1.063464, abs=1e-6)


def test_conflict_loss_is_a_mean_over_conflicts():  # TV-C5c
    routing = routing_of([[1.0, 0.0, -1.0], [1.0, 0.0, -1.0], [5.0, 0.0, 0.0]])
    conflicts = torch.zeros(3, 3, dtype=torch.bool)
    nothing = conflict_loss(routing, conflicts)
    assert nothing == 0
    nothing.backward()
    assert (routing.logits_TE.grad == 0).all()
    conflicts[0, 0] = conflicts[1, 2] = True
    loss = conflict_loss(routing, conflicts, divide_by_experts=False)
    assert loss.item() == pytest.approx((2.407606 + 0.407606) / 2, abs=1e-6)


class StaticRows:
    """The layout of rows on a GPU."""

    def dispatch(self, tokens_TD, routing):
        return dispatch_static(tokens_TD, routing)

    def combine(self, expert_out_ND, dispatched):
        return combine_static(expert_out_ND, dispatched.ticket)


def layer_and_tokens():
    torch.manual_seed(0)
    layer = MoE(8, 16, preset("gmoe_dropless", num_experts=4, top_k=2, **QUIET)).train()
    # with equal experts and weights that sum to 1 nothing would tell the experts apart
    return layer, torch.randn(1, 12, 8)


@pytest.mark.parametrize("static", [False, True])
def test_conflicts_are_those_of_each_tokens_bias_gradients(static, monkeypatch):
    layer, x = layer_and_tokens()
    target = torch.randn(1, 12, 8)
    if static:
        monkeypatch.setattr(type(layer.dispatcher), "dispatch", StaticRows.dispatch)
        monkeypatch.setattr(type(layer.dispatcher), "combine", StaticRows.combine)
    with collect_linear_outputs(layer) as outputs, collect_routing(layer) as routings:
        loss = F.mse_loss(layer(x), target)
        conflicts = token_conflicts(loss, outputs, routings)[""]
    routing, experts = routings[""], layer.experts
    assert conflicts.any()
    assert not conflicts.all()
    assert not (conflicts & ~routing.dispatch_mask_TE).any()

    # the reference: every (token, expert) pair with biases of its own
    fc1_bias_TEF = experts.fc1_bias.detach().expand(12, 4, 16).clone().requires_grad_()
    fc2_bias_TED = experts.fc2_bias.detach().expand(12, 4, 8).clone().requires_grad_()
    hidden_TEF = torch.einsum("td,efd->tef", x[0], experts.fc1_weight) + fc1_bias_TEF
    out_TED = torch.einsum("tef,edf->ted", F.gelu(hidden_TEF), experts.fc2_weight) + fc2_bias_TED
    out_TD = (routing.combine_weights_TE.detach().unsqueeze(-1) * out_TED).sum(1)
    grads = torch.autograd.grad(F.mse_loss(out_TD, target[0]), [fc1_bias_TEF, fc2_bias_TED])
    expected = torch.zeros(12, 4, dtype=torch.bool)
    for e in range(4):
        chosen = routing.dispatch_mask_TE[:, e]
        if chosen.sum() > 1:
            cosines = [
                F.cosine_similarity(grad[chosen, e], grad[chosen, e].mean(0, keepdim=True))
                for grad in grads
            ]
            expected[chosen, e] = (cosines[0] + cosines[1]) / 2 < 0
    assert torch.equal(conflicts, expected)


def test_collecting_changes_neither_values_nor_gradients_and_leaves_nothing():
    layer, x = layer_and_tokens()
    layer(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    attributes = set(vars(layer.experts))
    with collect_linear_outputs(layer) as outputs, collect_routing(layer) as routings:
        loss = layer(x).square().sum()
        token_conflicts(loss, outputs, routings)
    loss.backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-5)
    assert set(vars(layer.experts)) == attributes
    assert layer.experts.backend == "auto"
    assert not layer.experts._forward_hooks
    assert not layer.experts._forward_pre_hooks
    assert not layer.experts.act._forward_pre_hooks
    with pytest.raises(KeyError), collect_linear_outputs(layer):
        raise KeyError
    assert layer.experts.backend == "auto"


def test_shared_experts_are_not_collected():
    torch.manual_seed(0)
    spec = preset("gmoe_dropless", num_experts=3, shared_experts=2, **QUIET)
    model = tiny_moe_vit(spec).train()  # whose shared experts have the same activation module
    with collect_linear_outputs(model) as outputs, collect_routing(model) as routings:
        loss = model(torch.randn(2, 3, 16, 16)).square().sum()
        token_conflicts(loss, outputs, routings)
    for name, routing in routings.items():
        counts = [len(rows) for rows in outputs[name].fc1]
        assert counts == routing.tokens_per_expert_E.tolist()


def test_under_autocast_gradients_agree_with_float32():
    torch.manual_seed(0)
    layer = MoE(64, 128, preset("gmoe_dropless", num_experts=3, top_k=2, **QUIET)).train()
    x, target = torch.randn(2, 1, 500, 64)
    found = []
    for enabled in (False, True):
        with (
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled),
            collect_linear_outputs(layer) as outputs,
            collect_routing(layer) as routings,
        ):
            loss = F.mse_loss(layer(x).float(), target)
            found.append(token_conflicts(loss, outputs, routings)[""])
        assert outputs[""].fc2.dtype == (torch.bfloat16 if enabled else torch.float32)
    loss.backward()
    both, either = (found[0] & found[1]).sum(), (found[0] | found[1]).sum()
    assert found[0].sum() > 20
    assert both / either > 0.9


def test_activation_checkpointing_is_refused():
    model = tiny_moe_vit(preset("gmoe_dropless", **QUIET)).train()
    model.set_grad_checkpointing()
    images = torch.randn(2, 3, 16, 16)
    with (
        pytest.raises(RuntimeError, match=r"activation checkpointing.*set_grad_checkpointing"),
        collect_linear_outputs(model) as outputs,
        collect_routing(model) as routings,
    ):
        token_conflicts(model(images).square().sum(), outputs, routings)
    layer, x = layer_and_tokens()
    with (
        pytest.raises(RuntimeError, match="activation checkpointing"),
        collect_linear_outputs(layer),
    ):
        checkpoint(layer, x.requires_grad_(), use_reentrant=True)


def test_what_else_is_refused():
    layer, x = layer_and_tokens()
    with collect_linear_outputs(layer):
        layer(x)
        with pytest.raises(RuntimeError, match="ran twice"):
            layer(x)
    model = use_expert_backend(tiny_moe_vit(preset("ltdr")), "dense")
    with (
        pytest.raises(ValueError, match=r"blocks\.0\.mlp' sends .* a DenseDispatcher"),
        collect_linear_outputs(model),
    ):
        pass
    assert all(layer.experts.backend == "dense" for layer in moe_layers(model).values())
