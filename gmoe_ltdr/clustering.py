"""k-means for routers that choose experts by where a point lies: CLUSTER, DISTRIBUTION.

Shapes: N points, C clusters, D their width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# More points than this per cluster hardly move a centroid, and cost time.
POINTS_PER_CLUSTER = 256


def fit_kmeans(points_ND: Tensor, num_clusters: int, *, seed: int = 0) -> Tensor:
    """Centroids, float32 (C, D): scikit-learn's k-means, best of ten k-means++ starts.

    In one thread, whose sums do not depend on timing: the same points give the same centroids, in
    the same order.

    Args:
        points_ND: At least `num_clusters` of them.
        num_clusters: C.
        seed: Of the starts.

    Raises:
        ValueError: Fewer points than clusters, or points that are not finite.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    if len(points_ND) < num_clusters:
        raise ValueError(
            f"k-means needs a point for each of its {num_clusters} clusters, but there are "
            f"{len(points_ND)}; ask for fewer clusters or give more images"
        )
    points = points_ND.detach().cpu().double().numpy()
    kmeans = KMeans(num_clusters, init="k-means++", n_init=10, random_state=seed)
    with threadpool_limits(limits=1):
        centroids = kmeans.fit(points).cluster_centers_
    return torch.from_numpy(centroids).float()


def nearest_centroid(
    points_ND: Tensor, centroids_CD: Tensor, *, exists_C: Tensor | None = None
) -> Tensor:
    """The cluster of each point, int64 (N,): smallest Euclidean distance, lowest index of equals.

    Args:
        points_ND: Points.
        centroids_CD: Centroids.
        exists_C: Bool, which of them count; None: all.
    """
    # in double, since expanding the square of a difference cancels digits that decide
    points_ND, centroids_CD = points_ND.double(), centroids_CD.double()
    # half of the squared distance, less half of |x|^2, which is the same for all clusters
    score_NC = centroids_CD.square().sum(1) / 2 - points_ND @ centroids_CD.T
    if exists_C is not None:
        score_NC = score_NC.masked_fill(~exists_C, torch.inf)
    return score_NC.argmin(1)


class Centroids(nn.Module):
    """Frozen centroids of one layer: buffers, so that checkpoints and saved models hold them.

    Args:
        num_clusters: Room for so many; `set_` may use less of it.
        dim: Width of the points.
    """

    points: Tensor
    num_fitted: Tensor

    def __init__(self, num_clusters: int, dim: int):
        super().__init__()
        self.register_buffer("points", torch.zeros(num_clusters, dim))
        self.register_buffer("num_fitted", torch.zeros((), dtype=torch.int64))
        self._is_fitted = False

    @torch.no_grad()
    def set_(self, centroids_CD: Tensor) -> None:
        """Take these from now on.

        Raises:
            ValueError: Too many, or of another width.
        """
        num_clusters, dim = centroids_CD.shape
        if not 1 <= num_clusters <= len(self.points) or dim != self.points.shape[1]:
            raise ValueError(
                f"{num_clusters} centroids of width {dim} do not fit: there is room for "
                f"{len(self.points)} of width {self.points.shape[1]}"
            )
        self.points.zero_()
        self.points[:num_clusters] = centroids_CD.to(self.points)
        self.num_fitted.fill_(num_clusters)
        self._is_fitted = True

    @property
    def is_fitted(self) -> bool:
        """Whether there are any. Waits for the device until the answer is yes, and no more then."""
        if not self._is_fitted:
            self._is_fitted = bool(self.num_fitted > 0)
        return self._is_fitted

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """Learns whether it is fitted here, and not in a forward that may be traced."""
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        saved = state_dict.get(f"{prefix}num_fitted")
        if saved is not None:
            self._is_fitted = bool(saved > 0)

    def forward(self, points_ND: Tensor) -> Tensor:
        """The cluster of each point, int64 (N,).

        Raises:
            ValueError: Points of another width.
        """
        if points_ND.shape[-1] != self.points.shape[1]:
            raise ValueError(
                f"points of width {points_ND.shape[-1]} have no place among centroids of width "
                f"{self.points.shape[1]}"
            )
        exists_C = torch.arange(len(self.points), device=points_ND.device) < self.num_fitted
        return nearest_centroid(points_ND, self.points, exists_C=exists_C)


class PointSample:
    """A uniform random sample, without replacement, of points that come in batches.

    Args:
        max_points: Its size, when so many have come.
        seed: The same points in the same batches give the same sample.
    """

    def __init__(self, max_points: int, *, seed: int = 0):
        self.max_points = max_points
        self.num_seen = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._tickets = torch.empty(0, dtype=torch.float64)
        self._points: Tensor | None = None

    def add(self, points_ND: Tensor) -> None:
        """Each point draws a ticket; the lowest ones of all that came stay."""
        self.num_seen += len(points_ND)
        tickets = torch.rand(len(points_ND), generator=self._generator, dtype=torch.float64)
        tickets = torch.cat([self._tickets, tickets])
        kept = tickets.argsort(stable=True)[: self.max_points].sort().values
        num_old = len(self._tickets)
        new = kept[kept >= num_old] - num_old
        parts = [points_ND.detach()[new.to(points_ND.device)].float().cpu()]
        if self._points is not None:
            parts.insert(0, self._points[kept[kept < num_old]])
        self._points, self._tickets = torch.cat(parts), tickets[kept]

    @property
    def points_ND(self) -> Tensor:
        """The sample, in the order in which it came."""
        if self._points is None:
            raise ValueError("no point has come")
        return self._points
