"""Communities of a graph at several resolutions, and their stability."""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_sae.analysis.links import Graph
from dist_sae.errors import ConfigError

LEAST_SIZE = 3
"""Fewest latents of a cluster. The latents of smaller communities are in no cluster."""
STABLE = 0.6
"""Lowest Jaccard index of a stable cluster (Hennig 2007)."""
_KEPT = 0.8  # share of the nodes in a resample
_FINEST = 64  # sets the finest resolution: about this many latents per cluster


class Level(NamedTuple):
    """Clusters at one resolution."""

    resolution: float
    cluster_of: NDArray[np.int32]
    """Cluster of each latent; -1 if it is in none. Cluster 0 is the largest."""
    sizes: NDArray[np.int64]
    stability: NDArray[np.float64]
    """Mean over resamples of each cluster's Jaccard index with its best match. NaN for a cluster of
    which no resample has two nodes."""


def resolutions(n_connected: int) -> tuple[float, float, float]:
    """Return three resolutions, from a few large clusters to many small ones."""
    finest = max(4.0, n_connected / _FINEST)
    return 1.0, math.sqrt(finest), finest


def find_level(graph: Graph, resolution: float, resamples: int, seed: int) -> Level:
    """Cluster a graph by the Leiden method on modularity, and resample its nodes for stability.

    A resample has about four fifths of the nodes and is clustered separately. Each cluster is
    compared with its best match there, both restricted to the nodes of the resample. Their Jaccard
    index shows how much the cluster depends on which latents are included.

    Raises:
        ConfigError: scikit-network is not installed.
    """
    own = _numbered(_leiden(graph, resolution, seed, None))
    cluster_of = np.full(graph.n, -1, np.int32)
    cluster_of[graph.nodes] = own
    sizes = np.bincount(own[own >= 0])
    sums, times = np.zeros(len(sizes)), np.zeros(len(sizes))
    for draw in range(resamples):
        kept = np.random.default_rng((seed, draw)).random(len(own), np.float32) < _KEPT
        found = _jaccard(own, _leiden(graph, resolution, seed, kept), kept, len(sizes))
        seen = np.isfinite(found)
        sums[seen] += found[seen]
        times += seen
    stability = np.divide(sums, times, out=np.full(len(sizes), np.nan), where=times > 0)
    return Level(resolution, cluster_of, sizes, stability)


def _leiden(
    graph: Graph, resolution: float, seed: int, kept: NDArray[np.bool_] | None
) -> NDArray[np.int64]:
    """Return the community of each node. The method visits nodes in random order.

    Args:
        graph: Graph to cluster.
        resolution: Resolution of the modularity.
        seed: Seed of the order.
        kept: Nodes whose links are used. Each other node is a separate community.
    """
    method, n = _method(resolution), len(graph.nodes)
    from scipy.sparse import csr_matrix

    others, weight, starts = graph.others, graph.weight, graph.starts
    if kept is not None:
        both = np.repeat(kept, np.diff(starts))
        both &= kept[others]
        counts = np.add.reduceat(both, starts[:-1], dtype=np.int32) if n else starts[:0]
        others, weight = others[both], weight[both]
        starts = np.concatenate([[0], counts.cumsum(dtype=np.int64)])
    if not len(others):
        return np.arange(n)
    order = np.random.default_rng(seed).permutation(n).astype(np.int32)
    place = np.empty(n, np.int32)
    place[order] = np.arange(n, dtype=np.int32)
    matrix = csr_matrix((weight, others, starts), shape=(n, n))[order]
    matrix.indices = place[matrix.indices]
    del others, weight, starts
    return np.asarray(method.fit_predict(matrix))[place].astype(np.int64)


def _method(resolution: float) -> Any:
    """Return the Leiden method for a symmetric fp32 matrix, which it changes in place.

    This saves memory: the library's own preparation makes the matrix symmetric, in double
    precision, and needs five copies of it.
    """
    try:
        from scipy.sparse import identity  # the import takes a second
        from sknetwork.clustering import Leiden
    except ImportError as exc:
        raise ConfigError(
            "communities need scikit-network; run pip install '.[analysis]' in the repository"
        ) from exc

    class InPlace(Leiden):  # type: ignore[misc]
        def _pre_processing(self, input_matrix: Any, force_bipartite: bool) -> tuple[Any, ...]:  # noqa: ARG002, FBT001 - as in the library
            self._init_vars()
            input_matrix.data /= input_matrix.data.sum(dtype=np.float64)
            n = input_matrix.shape[0]
            weights = np.asarray(input_matrix.sum(1, dtype=np.float64)).ravel()
            return input_matrix, weights, weights, identity(n, format="csr"), np.arange(n)

    return InPlace(
        resolution=resolution, sort_clusters=False, return_probs=False, return_aggregate=False
    )


def _numbered(labels: NDArray[np.int64]) -> NDArray[np.int32]:
    """Number clusters of at least `LEAST_SIZE` nodes, the largest first; -1 for other nodes."""
    _, first, place, counts = np.unique(
        labels, return_index=True, return_inverse=True, return_counts=True
    )
    order = np.lexsort((first, -counts))
    order = order[counts[order] >= LEAST_SIZE]
    number = np.full(len(counts), -1, np.int32)
    number[order] = np.arange(len(order))
    return number[place]


def _jaccard(
    cluster_of: NDArray[np.int32], labels: NDArray[np.int64], kept: NDArray[np.bool_], n: int
) -> NDArray[np.float64]:
    """Return the Jaccard index of each of `n` clusters with its best match in a resample.

    Args:
        cluster_of: Cluster of each node; -1 if it is in none.
        labels: Community of each node in the resample.
        kept: Nodes of the resample.
        n: Number of clusters.
    """
    here = kept & (cluster_of >= 0)
    _, matched = np.unique(labels, return_inverse=True)
    mine = np.bincount(cluster_of[here], minlength=n)
    theirs = np.bincount(matched[kept])
    width = len(theirs) if len(theirs) else 1
    pairs, common = np.unique(
        cluster_of[here].astype(np.int64) * width + matched[here], return_counts=True
    )
    cluster, match = pairs // width, pairs % width
    best = np.zeros(n)
    np.maximum.at(best, cluster, common / (mine[cluster] + theirs[match] - common))
    return np.where(mine > 1, best, np.nan)
