"""Communities of a graph at several resolutions, and how stable they are."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_sae.analysis.graph import Graph
from dist_sae.errors import ConfigError

LEAST_SIZE = 3
"""Least latents of a cluster; smaller communities are none."""
STABLE = 0.6
"""Jaccard index from which a cluster is called stable (Hennig 2007)."""
_KEPT = 0.8  # share of the nodes in a resample
_FINEST = 64  # latents of a cluster at the finest resolution, about


class Level(NamedTuple):
    """Clusters at one resolution."""

    resolution: float
    of: NDArray[np.int32]
    """Cluster of each node, the largest first; -1 for a node in none."""
    sizes: NDArray[np.int64]
    stability: NDArray[np.float64]
    """Mean Jaccard index of each cluster with its best match, over resamples; nan where no resample
    has two of its nodes."""


def resolutions(n_connected: int) -> tuple[float, float, float]:
    """Three resolutions, from a few large clusters to many small ones."""
    finest = max(4.0, n_connected / _FINEST)
    return 1.0, math.sqrt(finest), finest


def find_level(graph: Graph, resolution: float, resamples: int, seed: int) -> Level:
    """Cluster a graph by the Leiden method on modularity, and resample its nodes.

    A resample has four fifths of the nodes and is clustered alone. A cluster's Jaccard index with
    its best match, both restricted to the nodes of the resample, says how far it depends on which
    latents happen to be there.

    Raises:
        ConfigError: scikit-network is not installed.
    """
    of = _numbered(_leiden(graph, resolution, seed))
    sizes = np.bincount(of[of >= 0])
    sums, times = np.zeros(len(sizes)), np.zeros(len(sizes))
    for draw in range(resamples):
        kept = np.random.default_rng((seed, draw)).random(graph.n) < _KEPT
        both = kept[graph.one] & kept[graph.other]
        part = Graph(graph.n, graph.one[both], graph.other[both], graph.weight[both])
        found = _jaccard(of, _leiden(part, resolution, seed), kept, len(sizes))
        seen = np.isfinite(found)
        sums[seen] += found[seen]
        times += seen
    stability = np.divide(sums, times, out=np.full(len(sizes), np.nan), where=times > 0)
    return Level(resolution, of, sizes, stability)


def _leiden(graph: Graph, resolution: float, seed: int) -> NDArray[np.int64]:
    """Community of each node; a node without edges is one of its own."""
    try:
        from scipy.sparse import coo_matrix  # takes a second
        from sknetwork.clustering import Leiden
    except ImportError as exc:
        raise ConfigError(
            "communities need scikit-network; run pip install '.[analysis]' in the repository"
        ) from exc
    ends = np.concatenate([graph.one, graph.other])
    nodes, place = np.unique(ends, return_inverse=True)
    labels = np.arange(graph.n)
    if len(nodes):
        one, other = np.split(place, 2)
        weights = np.concatenate([graph.weight, graph.weight])
        rows, columns = np.concatenate([one, other]), np.concatenate([other, one])
        matrix = coo_matrix((weights, (rows, columns)), shape=(len(nodes), len(nodes))).tocsr()
        method = Leiden(resolution=resolution, random_state=seed, shuffle_nodes=True)
        labels[nodes] = graph.n + method.fit_predict(matrix).astype(np.int64)
    return labels


def _numbered(labels: NDArray[np.int64]) -> NDArray[np.int32]:
    """Clusters of at least `LEAST_SIZE` nodes, the largest first; -1 for other nodes."""
    _, first, place, counts = np.unique(
        labels, return_index=True, return_inverse=True, return_counts=True
    )
    order = np.lexsort((first, -counts))
    order = order[counts[order] >= LEAST_SIZE]
    number = np.full(len(counts), -1, np.int32)
    number[order] = np.arange(len(order))
    return number[place]


def _jaccard(
    of: NDArray[np.int32], labels: NDArray[np.int64], kept: NDArray[np.bool_], n: int
) -> NDArray[np.float64]:
    """Jaccard index of each of `n` clusters with its best match among the labels of kept nodes."""
    here = kept & (of >= 0)
    _, matched = np.unique(labels, return_inverse=True)
    mine = np.bincount(of[here], minlength=n)
    theirs = np.bincount(matched[kept])
    width = len(theirs) if len(theirs) else 1
    pairs, common = np.unique(of[here].astype(np.int64) * width + matched[here], return_counts=True)
    cluster, match = pairs // width, pairs % width
    best = np.zeros(n)
    np.maximum.at(best, cluster, common / (mine[cluster] + theirs[match] - common))
    return np.where(mine > 1, best, np.nan)
