"""Random plans and what the sparse layer or the dense reference makes of them."""

from __future__ import annotations

import torch
from torch import nn

from gmoe_ltdr.dispatch.static_rows import combine_static, dispatch_static
from gmoe_ltdr.experts import StackedExperts
from tests.oracle import dense_moe, plan


class StaticRows:
    """The dispatcher's layout for GPUs and compilers, used in eager code on a CPU."""

    def __init__(self, triton: bool = False):
        self.triton = triton

    def dispatch(self, tokens_TD, routing):
        return dispatch_static(tokens_TD, routing, triton=self.triton)

    def combine(self, expert_out_ND, dispatched):
        return combine_static(expert_out_ND, dispatched.ticket)


def results_of(layer, tokens, weights, mask, cotangent, dispatcher, most=None):
    """Output and gradients by name, of the sparse layer or (no dispatcher) of the reference."""
    layer.zero_grad(set_to_none=True)
    x, w = tokens.clone().requires_grad_(), weights.clone().requires_grad_()
    routing = plan(mask, w)
    if most is not None:
        routing = type(routing)(**{**vars(routing), "max_experts_per_token": most})
    if dispatcher is None:
        out = dense_moe(x, routing, layer)
    else:
        dispatched = dispatcher.dispatch(x, routing)
        rows = layer(dispatched.tokens_ND, dispatched.tokens_per_expert_e)
        out = dispatcher.combine(rows, dispatched)
    out.backward(cotangent.to(out.dtype))
    found = {"out": out.detach(), "tokens": x.grad, "weights": w.grad * mask}
    for name, parameter in layer.named_parameters():
        grad = parameter.grad
        found[name] = torch.zeros_like(parameter) if grad is None else grad.clone()
    return found


def random_case(
    tokens, experts, density, seed, dtype, *, dim=8, hidden=16, gated=False, device="cpu"
):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(tokens, experts, generator=generator) < density
    weights = (torch.rand(tokens, experts, generator=generator) * mask).to(dtype)
    x = torch.randn(tokens, dim, generator=generator, dtype=dtype)
    cotangent = torch.randn(tokens, dim, generator=generator, dtype=dtype)
    torch.manual_seed(seed)
    options = {"gated": True, "act_layer": nn.SiLU} if gated else {}
    layer = StackedExperts(experts, dim, hidden, **options).to(device, dtype)
    return layer, *(t.to(device) for t in (x, weights, mask, cotangent))


def revealing_experts(backend, p, *, device="cpu"):
    """Experts whose output is the dropout mask times a constant: fc1 constant, fc2 the identity."""
    layer = StackedExperts(2, 16, 16, dropout=p).to(device)
    with torch.no_grad():
        layer.fc1_weight.zero_()
        layer.fc1_bias.fill_(3.0)
        layer.fc2_weight.copy_(torch.eye(16).expand(2, 16, 16))
        layer.fc2_bias.zero_()
    layer.backend = backend
    return layer


def check_dropout(layer, *, device="cpu"):
    """The mask that forward used is the one backward uses, its rate is right, and it has no
    pattern."""
    p = layer.drop.p
    x = torch.randn(200, 16, device=device, requires_grad=True)
    counts = torch.tensor([120, 80], device=device)
    torch.manual_seed(0)
    out = layer(x, counts)
    kept = out.detach() != 0
    three = torch.tensor(3.0, device=device, requires_grad=True)
    constant = nn.functional.gelu(three)
    constant.backward()
    constant = constant.detach() / (1 - p)
    torch.testing.assert_close(out.detach(), kept * constant)
    assert abs(kept.float().mean() - (1 - p)) < 0.03
    # neither rows nor columns are dropped as a whole, nor are neighbours dropped together
    assert (kept.float().mean(0) - (1 - p)).abs().max() < 0.15
    assert kept.float().mean(1).std() < 0.2
    together = (~kept[:, 1:] & ~kept[:, :-1]).float().mean()
    assert abs(together - p * p) < 0.03
    cotangent = torch.randn(200, 16, device=device)
    out.backward(cotangent)
    expected = cotangent * kept * three.grad / (1 - p)
    expected = torch.stack([expected[:120].sum(0), expected[120:].sum(0)])
    torch.testing.assert_close(layer.fc1_bias.grad, expected, atol=1e-4, rtol=1e-4)
    torch.manual_seed(1)
    assert ((layer(x, counts) != 0) != kept).any()  # another seed, another mask
    layer.eval()
    torch.testing.assert_close(layer(x, counts), torch.ones_like(x) * constant * (1 - p))
