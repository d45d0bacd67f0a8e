"""Groups of experts: modalities, or patches and the class token, do not share experts."""

import pytest
import torch
import torch.nn.functional as F

from gmoe_ltdr import (
    MoE,
    MoESpec,
    Routing,
    TokenContext,
    balance_loss,
    collect_routing,
    load_model,
    preset,
    save_model,
)
from gmoe_ltdr.losses import importance_load_loss, load_balancing_loss
from gmoe_ltdr.routers import create_router
from gmoe_ltdr.routers.groups import close_other_groups
from gmoe_ltdr.routing import CLOSED, ExpertGroup, Modality
from gmoe_ltdr.stats import RoutingStats
from tests.models import tiny_moe_vit
from tests.oracle import dense_moe, plan

V, T, P = int(Modality.VISION), int(Modality.LANGUAGE), int(Modality.PADDING)
SETTINGS = [
    "groups_v2Top1-t2Top1",
    "groups_v4Top2-t4Top2",
    "groups_v2Top1-t2Top1-DAR",
    "groups_v2Top1-t2Top1-DAR-shared",
]


def context(kinds, **fields) -> TokenContext:
    return TokenContext(torch.tensor([kinds], dtype=torch.uint8), **fields)


def router(name: str = SETTINGS[0], dim: int = 1, **changes):
    torch.manual_seed(0)
    return create_router(dim, preset(name, gate="linear", noise_std=0.0, **changes))


def scored(scores, kinds, name: str = SETTINGS[0], **changes) -> Routing:
    """What a router decides for tokens whose logits would be `scores`."""
    made = router(name, len(scores[0]), **changes)
    with torch.no_grad():
        made.gate.weight.copy_(torch.eye(len(scores[0])))
    return made(torch.tensor(scores), context(kinds))


def test_a_token_sees_its_own_group():
    """TV-C8."""
    routing = scored([[1.0, 2, 3, 4]] * 2, [V, T])
    expected = torch.tensor([[0.268941, 0.731059, 0, 0], [0, 0, 0.268941, 0.731059]])
    torch.testing.assert_close(routing.probs_TE, expected, atol=1e-6, rtol=0)
    assert (routing.probs_TE == 0).sum() == 4  # exactly
    assert routing.dispatch_mask_TE.tolist() == [[False, True, False, False], [False] * 3 + [True]]
    # one expert keeps its probability
    torch.testing.assert_close(
        routing.combine_weights_TE.amax(-1), torch.full((2,), 0.731059), atol=1e-6, rtol=0
    )


def test_balance_is_per_group():
    """TV-C8b and TV-C8c: 1.5 for vision, 1.0 for text."""
    vision, text = [[0.9, 0.1], [0.6, 0.4]], [[0.3, 0.7], [0.8, 0.2]]
    away = [0.5, 0.5]  # what a token thinks of the other group must not matter
    scores = [[*p, *away] for p in vision] + [[*away, *p] for p in text]
    logs = torch.tensor(scores).log().tolist()

    def loss(kinds, name=SETTINGS[0], rows=slice(None)):
        spec = preset(name, balance_weight=1.0)
        return balance_loss([scored(logs[rows], kinds, name)], spec).item()

    assert loss([V, V, T, T]) == pytest.approx(2.5, abs=1e-6)
    assert loss([V, V, T, T], SETTINGS[2]) == pytest.approx(1.0, abs=1e-6)
    assert loss([V, V, T, T], SETTINGS[3]) == pytest.approx(1.0, abs=1e-6)
    assert loss([V, V], rows=slice(2)) == pytest.approx(1.5, abs=1e-6)
    assert loss([V, V], SETTINGS[2], rows=slice(2)) == 0


def test_padding_is_of_no_group():
    scores = [[1.0, 2, 3, 4], [4.0, 3, 2, 1], [0.0, 5, 0, 5]]
    spec = preset(SETTINGS[0], balance_weight=1.0)
    two, three = scored(scores[:2], [V, T]), scored(scores, [V, T, P])
    assert not three.dispatch_mask_TE[2].any()
    assert balance_loss([three], spec).item() == pytest.approx(balance_loss([two], spec).item())
    nothing = scored(scores, [P, P, P])
    assert balance_loss([nothing], spec).item() == 0
    # DeepSpeed takes padding for language
    assert scored(scores, [V, T, P], router_options={"padding": "language"}).dispatch_mask_TE[2, 3]


def test_a_group_equals_a_router_of_its_own():
    torch.manual_seed(0)
    made = router(SETTINGS[1], dim=6)
    tokens = torch.randn(10, 6)
    kinds = [V, V, T, V, T, T, V, T, V, V]
    routing = made(tokens, context(kinds))
    for kind, experts in ((V, slice(0, 4)), (T, slice(4, 8))):
        alone = create_router(6, MoESpec(num_experts=4, tail_top_k=2, gate="linear", noise_std=0.0))
        with torch.no_grad():
            alone.gate.weight.copy_(made.gate.weight[experts])
        mine = torch.tensor(kinds) == kind
        expected = alone(tokens[mine], TokenContext.all_vision(1, int(mine.sum())))
        torch.testing.assert_close(routing.probs_TE[mine, experts], expected.probs_TE)
        torch.testing.assert_close(
            routing.combine_weights_TE[mine, experts], expected.combine_weights_TE
        )
        assert torch.equal(routing.dispatch_mask_TE[mine, experts], expected.dispatch_mask_TE)


def test_without_text_its_experts_learn_nothing():
    """TV-C8c."""
    torch.manual_seed(0)
    layer = MoE(8, 16, preset(SETTINGS[0], balance_weight=1.0)).train()
    with collect_routing(layer) as routings:
        out = layer(torch.randn(2, 5, 8))
    (out.square().sum() + balance_loss(routings, layer.spec)).backward()
    for name, parameter in layer.experts.named_parameters():
        assert (parameter.grad[2:] == 0).all(), name
        assert (parameter.grad[:2] != 0).any(), name
    embeds = layer.router.gate.expert_embed.grad
    assert (embeds[:, 2:] == 0).all()
    assert torch.isfinite(embeds).all()


@pytest.mark.parametrize("balance", ["switch", "importance_load", "importance_load_tutel"])
def test_every_balance_loss_is_that_of_the_groups(balance):
    spec = preset(SETTINGS[0], balance=balance, balance_weight=1.0)
    torch.manual_seed(0)
    scores = torch.randn(8, 4).requires_grad_()
    is_text = torch.tensor([0, 1, 0, 0, 1, 1, 0, 1]).bool()
    closed = close_other_groups(scores, is_text, 2)
    mask = F.one_hot(closed.argmax(-1), 4).bool()
    groups = (ExpertGroup(~is_text, range(2)), ExpertGroup(is_text, range(2, 4)))
    routing = plan(mask, logits_TE=closed)
    routing = Routing(**{**vars(routing), "balance_groups": groups})
    loss = balance_loss([routing], spec)
    expected = torch.zeros(())
    for rows, columns in ((~is_text, slice(0, 2)), (is_text, slice(2, 4))):
        alone = plan(mask[rows, columns], logits_TE=scores[rows, columns])
        if balance == "switch":
            expected += load_balancing_loss(alone)
        else:
            tutel = balance.endswith("tutel")
            expected += importance_load_loss(
                alone,
                top_k=1,
                noise_std=spec.noise_std,
                variant="tutel" if tutel else "vmoe",
                unbiased=tutel,
            )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert torch.isfinite(scores.grad).all()
    assert (scores.grad[is_text, :2] == 0).all()


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_table_11(name):
    spec = preset(name)
    # widths of the dense network: in all, and active for one token
    shared = name.endswith("shared")
    assert spec.num_experts / spec.expert_split + spec.shared_experts == 4 + shared
    assert spec.top_k / spec.expert_split + spec.shared_experts == 1 + shared
    torch.manual_seed(0)
    modality = torch.tensor([[V, V, V, T, P], [V, T, T, P, P]], dtype=torch.uint8)
    layer = MoE(16, 32, spec, context_of=lambda x: TokenContext(modality)).eval()
    x = torch.randn(2, 5, 16)
    with collect_routing(layer) as routings:
        out = layer(x)
    routing = routings[""]
    half = spec.num_experts // 2
    assert not routing.dispatch_mask_TE[routing.of(Modality.VISION), half:].any()
    assert not routing.dispatch_mask_TE[routing.of(Modality.LANGUAGE), :half].any()
    expected = dense_moe(x.flatten(0, 1), routing, layer.experts)
    if layer.shared_experts is not None:
        real = ~routing.of(Modality.PADDING).unsqueeze(-1)
        expected = expected + dense_moe(x.flatten(0, 1), plan(real), layer.shared_experts)
    torch.testing.assert_close(out, expected.view_as(x), atol=1e-6, rtol=1e-5)


def test_the_class_token_can_have_experts_of_its_own(tmp_path):
    options = {"group_by": "cls", "group_sizes": [3, 1]}
    model = tiny_moe_vit(preset(SETTINGS[0], router_options=options)).eval()
    images = torch.randn(2, 3, 16, 16)
    with collect_routing(model) as routings:
        logits = model(images)
    for routing in routings.values():
        mask = routing.dispatch_mask_TE.view(2, 17, 4)
        assert mask[:, 0, 3].all()
        assert mask[:, 1:, :3].sum() == 2 * 16
    stats = RoutingStats()
    stats.add(routings)
    assert stats.of("blocks.0.mlp").load_E[3] == pytest.approx(1 / 17)
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path)(images), logits)

    patches_first = preset(
        SETTINGS[0], router_options={**options, "balanced_groups": "second"}, balance_weight=1.0
    )
    (part,) = create_router(16, patches_first)(
        torch.randn(34, 16), TokenContext.all_vision(2, 17, num_prefix_tokens=1)
    ).balance_groups
    assert part.tokens_T.nonzero().flatten().tolist() == [0, 17]
    assert part.experts == range(3, 4)
    with pytest.raises(ValueError, match="this model has none; use group_by='modality'"):
        create_router(16, patches_first)(torch.randn(4, 16), TokenContext.all_vision(1, 4))


def test_tail_tokens_get_all_experts_of_their_group():
    routing = scored(
        [[9.0, 0, 0, 0], [1, 0.9, 0, 0], [0, 0, 9, 0]],
        [V, V, T],
        tail_rule=preset("ltdr").tail_rule,
    )
    assert routing.tail_mask_T.tolist() == [True, False, False]
    assert routing.dispatch_mask_TE.int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capacity_factor": 1.5}, "router 'groups' drops no token, but capacity_factor=1.5"),
        ({"router_options": {"group_sizes": [3, 2]}}, r"group_sizes'\]=\[3, 2\] must be two"),
        ({"router_options": {"group_sizes": [4, 0]}}, "of at least top_k=1"),
        ({"top_k": 3}, "of at least top_k=3"),
        ({"router_options": {"group_by": "size"}}, "'size' is not one of"),
        ({"router_options": {"eval_capacity": "batch"}}, "has no option 'eval_capacity'"),
    ],
)
def test_impossible_groups(changes, message):
    with pytest.raises(ValueError, match=message):
        create_router(4, preset(SETTINGS[0], **changes))


def test_closed_logits():
    closed = close_other_groups(torch.zeros(2, 3), torch.tensor([False, True]), 1)
    assert closed.tolist() == [[0, CLOSED, CLOSED], [CLOSED, 0, 0]]


@pytest.mark.parametrize("training", [True, False])
def test_any_tokens(training):
    made = router(SETTINGS[1], dim=6).train(training)
    spec = preset(SETTINGS[1])
    mixed = [[V, V, T, T, P], [V, V, V, V, V], [P, P, P, P, P]]
    for modality in (mixed, [[V]], [[T]], [[P]], torch.empty(1, 0), torch.empty(0, 4)):
        given = TokenContext(torch.as_tensor(modality, dtype=torch.uint8))
        routing = made(torch.randn(given.modality_BL.numel(), 6), given)
        real = ~routing.of(Modality.PADDING)
        assert (routing.experts_per_token_T == 2 * real).all()
        assert routing.logits_TE.isfinite().all()
        assert balance_loss([routing], spec).isfinite()


def test_activation_checkpointing_changes_nothing():
    found = []
    spec = preset(SETTINGS[0], router_options={"group_by": "cls"})
    for checkpointing in (False, True):
        model = tiny_moe_vit(spec).train()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        with collect_routing(model) as routings:
            out = model(torch.randn(2, 3, 16, 16))
        (out.square().sum() + balance_loss(routings, spec)).backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=name)
