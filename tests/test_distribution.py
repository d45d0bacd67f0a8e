"""DISTRIBUTION: one cluster of tokens per combination of experts."""

import copy

import pytest
import torch

from gmoe_ltdr import MoESpec, TokenContext, collect_routing, moe_layers, preset
from gmoe_ltdr.routers import create_router
from gmoe_ltdr.routers.distribution import expert_combinations, route_clusters
from gmoe_ltdr.token_clusters import fit_token_clusters_, sample_tokens
from tests.models import tiny_dense_vit, tiny_moe_vit
from tests.vectors import B, logits, vision

SPEC = preset("gmoe_dar", router="distribution", num_experts=4, top_k=2, noise_std=0.0)
IMAGES = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_combinations_are_in_lexicographic_order():  # TV-C6c
    pairs = [mask.nonzero().flatten().tolist() for mask in expert_combinations(4, 2)]
    assert pairs == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    many = expert_combinations(6, 2)
    assert many.shape == (15, 6)
    assert many[14].tolist() == [False] * 4 + [True] * 2
    assert expert_combinations(3, 3).tolist() == [[True] * 3]
    assert torch.equal(expert_combinations(3, 1), torch.eye(3).bool())


@pytest.mark.parametrize(
    ("cluster", "experts", "weights"), [(4, [1, 3], [0.75, 0.25]), (0, [0, 1], [4 / 7, 3 / 7])]
)
def test_a_cluster_is_a_pair_of_experts(cluster, experts, weights):  # TV-C6, TV-C6b
    plan = route_clusters(
        logits([B]),
        torch.tensor([cluster]),
        vision(1, 1),
        combinations_CE=expert_combinations(4, 2),
        weighting="renormalize",
    )
    assert plan.dispatch_mask_TE[0].nonzero().flatten().tolist() == experts
    torch.testing.assert_close(plan.combine_weights_TE[0, experts], torch.tensor(weights))
    assert plan.max_experts_per_token == 2


def test_tokens_follow_the_nearest_centroid_whatever_the_gate_says():
    router = create_router(3, SPEC).eval()
    centroids = torch.cat([torch.eye(3), -torch.eye(3)]) * 5
    router.set_centroids_(centroids)
    tokens = centroids[[4, 0, 5, 2]] * 1.1
    plan = router(tokens, TokenContext.all_vision(2, 2))
    expected = expert_combinations(4, 2)[[4, 0, 5, 2]]
    assert torch.equal(plan.dispatch_mask_TE, expected)
    probs = plan.probs_TE * expected
    torch.testing.assert_close(plan.combine_weights_TE, probs / probs.sum(1, keepdim=True))


def test_noise_moves_the_weights_alone():
    router = create_router(3, MoESpec(router="distribution", num_experts=4, noise_std=4.0))
    router.set_centroids_(torch.cat([torch.eye(3), -torch.eye(3)]))
    tokens, context = torch.randn(10, 3), TokenContext.all_vision(1, 10)
    noisy, plan = router(tokens, context), router.eval()(tokens, context)
    assert torch.equal(noisy.dispatch_mask_TE, plan.dispatch_mask_TE)
    assert not torch.allclose(noisy.combine_weights_TE, plan.combine_weights_TE)


def test_samples_are_the_inputs_of_the_dense_model():
    dense = tiny_dense_vit().eval()
    # one raw expert scales the layer's output, so the sparse model's own inputs would be others
    spec = preset("gmoe_dar", router="distribution", num_experts=4, top_k=1, layers=(0, 2))
    sparse = tiny_moe_vit(spec)
    seen = {0: [], 2: []}
    for index, inputs in seen.items():
        dense.blocks[index].mlp.register_forward_pre_hook(
            lambda _mlp, given, inputs=inputs: inputs.append(given[0].flatten(0, 1))
        )
    for images in IMAGES.split(5):
        dense(images)
    state = copy.deepcopy(sparse.state_dict())
    sample = sample_tokens(sparse, IMAGES.split(5))
    assert list(sample) == ["blocks.0.mlp", "blocks.2.mlp"]
    for index, tokens in seen.items():  # 12 images of 17 tokens: fewer than 4 * 256, so all
        torch.testing.assert_close(sample[f"blocks.{index}.mlp"], torch.cat(tokens))
    for name, value in sparse.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert sparse.training


def test_a_fitted_vit_uses_all_pairs_and_keeps_the_dense_function():
    model = tiny_moe_vit(SPEC)
    with pytest.raises(ValueError, match="fit_token_clusters_"):
        model(IMAGES)
    rng = torch.get_rng_state()
    fit_token_clusters_(model, IMAGES.split(6))
    assert torch.equal(torch.get_rng_state(), rng)
    model.eval()
    with collect_routing(model) as routings:
        out = model(IMAGES)
    for name, plan in routings.items():
        # k-means leaves no cluster empty, and here it was fitted to these very tokens
        assert len(plan.dispatch_mask_TE.unique(dim=0)) == 6, name
        assert (plan.experts_per_token_T == 2).all()
    torch.testing.assert_close(out, tiny_dense_vit().eval()(IMAGES), atol=1e-5, rtol=1e-5)
    twin = tiny_moe_vit(SPEC)
    fit_token_clusters_(twin, IMAGES.split(6))
    assert torch.equal(twin.eval()(IMAGES), out)


def test_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match="which are 4426165368, more than 1024"):
        create_router(8, MoESpec(router="distribution", num_experts=64, top_k=8))
    router = create_router(8, SPEC)
    with pytest.raises(ValueError, match="5 centroids for the 6 combinations of 2 of 4 experts"):
        router.set_centroids_(torch.zeros(5, 8))
    model = tiny_moe_vit(preset("gmoe_dar", router="distribution", num_experts=12, top_k=5))
    assert len(moe_layers(model)) == 2
    with pytest.raises(ValueError, match="each of its 792 clusters, but there are 34"):
        fit_token_clusters_(model, [IMAGES[:2]])
