"""k-means, nearest centroids, and the sample that it is fitted to."""

import copy

import numpy as np
import pytest
import torch

from gmoe_ltdr.clustering import Centroids, PointSample, fit_kmeans, nearest_centroid

CORNERS = torch.tensor([[0.0, 0], [4, 0], [0, 4]])


def test_nearest_centroid_and_ties():  # TV-C2
    # squared distances 2; 2 from the second; 8, 8, 8; 4, 4
    points = torch.tensor([[1.0, 1], [3, 1], [2, 2], [2, 0]])
    assert nearest_centroid(points, CORNERS).tolist() == [0, 1, 0, 0]
    assert nearest_centroid(points[:0], CORNERS).shape == (0,)
    # equal far away from the origin, where an expanded square has no digits left
    far = torch.tensor([[1000.0, 1000], [1000, 1000.5]])
    assert nearest_centroid(torch.tensor([[1000.0, 1000.25]]), far).tolist() == [0]
    assert nearest_centroid(torch.tensor([[1000.0, 1000.3]]), far).tolist() == [1]


def blobs(num_points: int = 300) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(num_points, 2, generator=generator)
    return noise + CORNERS[torch.arange(num_points) % 3]


def test_kmeans_finds_the_means():
    points = blobs()
    centroids = fit_kmeans(points, 3)
    expected = torch.stack([points[i::3].mean(0) for i in range(3)])
    order = nearest_centroid(CORNERS, centroids)
    assert sorted(order.tolist()) == [0, 1, 2]
    torch.testing.assert_close(centroids[order], expected, atol=1e-5, rtol=0)


def test_kmeans_repeats_itself_and_leaves_generators_alone():
    np.random.seed(0)
    state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    first = fit_kmeans(torch.randn(200, 5, generator=torch.Generator().manual_seed(1)), 7)
    again = fit_kmeans(torch.randn(200, 5, generator=torch.Generator().manual_seed(1)), 7)
    assert torch.equal(first, again)
    assert first.dtype == torch.float32
    assert np.array_equal(np.random.get_state()[1], state)
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_too_few_points():
    with pytest.raises(ValueError, match="each of its 4 clusters, but there are 3"):
        fit_kmeans(CORNERS, 4)


def test_centroids_may_be_fewer_than_there_is_room_for():
    clusters = Centroids(5, 2)
    assert not clusters.is_fitted
    clusters.set_(CORNERS + 1)  # an unused row is nearer to the origin, and must not win
    assert clusters.is_fitted
    assert clusters(torch.tensor([[0.0, 0], [5, 0], [1, 6]])).tolist() == [0, 1, 2]
    assert clusters.points.isfinite().all()
    for wrong in (torch.zeros(6, 2), torch.zeros(2, 3), torch.zeros(0, 2)):
        with pytest.raises(ValueError, match="room for 5 of width 2"):
            clusters.set_(wrong)
    with pytest.raises(ValueError, match="points of width 3"):
        clusters(torch.zeros(1, 3))


def test_fitted_is_what_the_checkpoint_says():
    fitted, fresh = Centroids(3, 2), Centroids(3, 2)
    fitted.set_(CORNERS)
    twin = copy.deepcopy(fresh)
    fresh.load_state_dict(fitted.state_dict())
    assert fresh._is_fitted  # learnt while loading: a forward may be traced
    assert not twin.is_fitted
    assert fresh(CORNERS).tolist() == [0, 1, 2]


def test_a_sample_holds_everything_that_fits():
    sample = PointSample(100)
    batches = torch.randn(60, 3).split([25, 25, 10])
    for batch in batches:
        sample.add(batch)
    assert torch.equal(sample.points_ND, torch.cat(batches))
    assert sample.num_seen == 60


def test_a_sample_is_uniform_over_all_that_came():
    """400 samples of 4 out of 12 in batches of 5, 5 and 2: each is in a third of them."""
    counts = torch.zeros(12)
    for seed in range(400):
        sample = PointSample(4, seed=seed)
        for batch in torch.arange(12.0).unsqueeze(1).split(5):
            sample.add(batch)
        kept = sample.points_ND.flatten().long()
        assert len(set(kept.tolist())) == 4
        assert kept.tolist() == sorted(kept.tolist())
        counts[kept] += 1
    # 133 expected, standard deviation 9.4
    assert counts.min() > 90
    assert counts.max() < 176
    again = PointSample(4, seed=399)
    again.add(torch.arange(12.0).unsqueeze(1)[:5])
    again.add(torch.arange(12.0).unsqueeze(1)[5:10])
    again.add(torch.arange(12.0).unsqueeze(1)[10:])
    assert torch.equal(again.points_ND, sample.points_ND)


def test_an_empty_sample():
    with pytest.raises(ValueError, match="no point has come"):
        _ = PointSample(3).points_ND
