"""CLUSTER: an image's cluster chooses for all its tokens."""

import pytest
import torch

from gmoe_ltdr import MoESpec, TokenContext
from gmoe_ltdr.routers import create_router

# The worked example: the cluster's row of the table is [4, 0], the gate's rows are these.
GATE = torch.tensor([[0.1, 0], [0, 0.1], [0.05, 0.05]])
CENTROIDS = torch.tensor([[4.0, 0], [0, 4]])


def router_of(*, num_experts=3, top_k=2, noise_std=0.0, weighting="renormalize", **options):
    router = create_router(
        2,
        MoESpec(
            router="cluster",
            gate="linear",
            num_experts=num_experts,
            top_k=top_k,
            noise_std=noise_std,
            weighting=weighting,
            router_options={"num_clusters": 4, **options},
        ),
    )
    with torch.no_grad():
        router.gate.weight.copy_(GATE)
    router.set_centroids_(CENTROIDS)
    return router


def images(*embeddings, length=3, **fields):
    batch = len(embeddings)
    plain = TokenContext.all_vision(batch, length)
    return TokenContext(plain.modality_BL, embedding_BD=torch.tensor(embeddings), **fields)


def route(router, context):
    return router(torch.randn(context.modality_BL.numel(), 2), context)


def test_the_cluster_decides_for_all_tokens():  # TV-C2b, TV-C2c
    plan = route(router_of(), images([3.0, 1.0]))
    logits, probs = [0.4, 0, 0.2], [0.401760, 0.269307, 0.328933]
    weights = torch.tensor([0.549834, 0, 0.450166])
    assert plan.dispatch_mask_TE.tolist() == [[True, False, True]] * 3
    torch.testing.assert_close(plan.logits_TE[0], torch.tensor(logits), atol=1e-6, rtol=0)
    torch.testing.assert_close(plan.probs_TE[0], torch.tensor(probs), atol=1e-6, rtol=0)
    torch.testing.assert_close(plan.combine_weights_TE, weights.expand(3, 3), atol=1e-6, rtol=0)


def test_a_low_temperature_and_the_universal_expert():  # TV-C2b
    plan = route(router_of(temperature=0.05), images([4.0, 0.0]))
    probs = torch.tensor([0.981690, 0.000329, 0.017980])
    torch.testing.assert_close(plan.probs_TE[0], probs, atol=1e-6, rtol=0)

    one_of_three = router_of(num_experts=4, top_k=1, temperature=0.05, universal=True)
    plan = route(one_of_three, images([4.0, 0.0]))
    assert plan.dispatch_mask_TE.tolist() == [[True, False, False, True]] * 3
    expected = torch.tensor([0.981690, 0, 0, 0.018310])
    torch.testing.assert_close(plan.combine_weights_TE[0], expected, atol=1e-6, rtol=0)
    assert plan.probs_TE[0, 3] == 0
    assert plan.max_experts_per_token == 2
    with pytest.raises(ValueError, match="top_k=4 exceeds the 3 experts"):
        create_router(
            2,
            MoESpec(router="cluster", num_experts=4, top_k=4, router_options={"universal": True}),
        )


def test_images_of_one_cluster_are_treated_alike():
    plan = route(router_of(), images([3.0, 1.0], [0.0, 9.0], [40.0, 1.0]))
    first, second, third = plan.combine_weights_TE.view(3, 3, 3)
    assert torch.equal(first, third)
    assert not torch.equal(first, second)


def test_the_gradient_reaches_the_rows_of_present_clusters_only():  # TV-C2c
    router = router_of()
    plan = route(router, images([0.0, 5.0], [1.0, 6.0]))
    (plan.combine_weights_TE @ torch.tensor([1.0, 2, 4])).sum().backward()
    assert router.table.grad[1].abs().min() > 0
    assert not router.table.grad[[0, 2, 3]].any()
    assert router.gate.weight.grad.abs().sum() > 0
    assert not router.clusters.points.requires_grad


def test_noise_is_divided_by_the_temperature():
    router = router_of(noise_std=0.3, temperature=0.5)
    plan = route(router, images(*[[4.0, 0.0]] * 20_000, length=1))
    # .3 / 3 experts / .5
    noise = plan.noisy_logits_TE - plan.logits_TE
    assert noise.std().item() == pytest.approx(0.2, abs=0.004)
    assert route(router.eval(), images([4.0, 0.0])).noisy_logits_TE is None


def test_a_decision_is_used_again():
    for options in ({}, {"num_experts": 4, "universal": True}):
        router = router_of(**options).eval()
        first = route(router, images([3.0, 1.0], [0.0, 9.0]))
        decided = first.logits_TE.view(2, 3, -1)[:, 0]
        token = TokenContext.all_vision(2, 1)
        again = route(router, TokenContext(token.modality_BL, decided_logits_BE=decided))
        expected = first.combine_weights_TE.view(2, 3, -1)[:, 0]
        assert torch.equal(again.combine_weights_TE, expected)


def test_what_is_missing_is_said():
    router = router_of()
    with pytest.raises(ValueError, match=r"set_image_info\(model, embedding_BD"):
        route(router, TokenContext.all_vision(1, 3))
    with pytest.raises(ValueError, match="points of width 3"):
        route(router, images([1.0, 2.0, 3.0]))
    fresh = create_router(2, MoESpec(router="cluster"))
    with pytest.raises(ValueError, match="no centroids"):
        route(fresh, images([1.0, 2.0]))
    limited = MoESpec(router="cluster", capacity_factor=1.0, router_options={"universal": True})
    with pytest.raises(ValueError, match=r"capacity_factor=1\.0 would keep images from the univ"):
        create_router(2, limited)
    for options in ({"temperature": 0.0}, {"num_clusters": 0}):
        with pytest.raises(ValueError, match="positive temperature"):
            create_router(2, MoESpec(router="cluster", router_options=options))
