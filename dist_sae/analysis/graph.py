"""The graph of latents by decoder direction, and groups of near latents."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist_sae.errors import ConfigError
from dist_sae.index.query import Index

_STEP = 0.05  # step by which the least cosine rises, to split groups that are too large


class Edges(NamedTuple):
    """Undirected edges between latents, each listed once, sorted by `one`, then `other`."""

    one: NDArray[np.int64]
    """The lower latent."""
    other: NDArray[np.int64]
    """The higher latent."""
    weight: NDArray[np.float32]
    mutual: NDArray[np.bool_]
    """Whether both ends list each other among their nearest latents."""

    def where(self, kept: NDArray[np.bool_]) -> "Edges":
        """Return the edges where `kept` is true."""
        return Edges(self.one[kept], self.other[kept], self.weight[kept], self.mutual[kept])


class Groups(NamedTuple):
    """Groups of latents."""

    latents: NDArray[np.int64]
    """Members of the first group, ascending, then those of the second, and so on."""
    sizes: NDArray[np.int64]
    """Number of latents of each group."""
    n_left_out: int
    """Number of latents that were left out because their group is too large."""


def nearest_edges(index: Index, least_cosine: float) -> Edges:
    """Return the graph of nearest decoder directions, with cosines of at least `least_cosine`.

    Raises:
        ConfigError: The index has no nearest latents.
    """
    keys, cosines = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    for one, other, cosine in listed_nearest(index):
        key = np.minimum(one, other) * index.n_latents + np.maximum(one, other)
        kept = cosine >= least_cosine
        keys.append(key[kept])
        cosines.append(cosine[kept])
    return _joined(np.concatenate(keys), np.concatenate(cosines), index.n_latents)


def listed_nearest(
    index: Index,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]]:
    """Yield each bucket's latents, their nearest latents and the cosines, as the index lists them.

    Raises:
        ConfigError: The index has no nearest latents.
    """
    if not index.manifest.compared or not index.manifest.settings["neighbours"]:
        raise ConfigError(
            f"{index.place}: has no nearest latents; build an index with index.neighbours, under "
            f"another index.name"
        )
    for table in index.latents(["latent", "nearest", "nearest_cosine"]):
        nearest = table["nearest"].combine_chunks()
        counts = nearest.value_lengths().to_numpy()
        one = np.repeat(table["latent"].to_numpy().astype(np.int64), counts)
        cosine = table["nearest_cosine"].combine_chunks().flatten()
        yield one, _flat(nearest), cosine.to_numpy(zero_copy_only=False)


def _flat(lists: pa.ListArray) -> NDArray[np.int64]:
    flat: NDArray[np.int64] = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    return flat


def _joined(keys: NDArray[np.int64], weights: NDArray[np.float32], n: int) -> Edges:
    """Merge directed edges into undirected ones, by the key `lower * n + higher`."""
    order = np.argsort(keys, kind="stable")
    keys, weights = keys[order], weights[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    twice = np.diff(first, append=len(keys)) > 1
    return Edges(keys[first] // n, keys[first] % n, weights[first], twice)


def components(
    n: int, one: NDArray[np.int64], other: NDArray[np.int64]
) -> tuple[NDArray[np.int64], int]:
    """Find the connected components of an undirected graph, by hooking and pointer jumping.

    Args:
        n: Number of nodes.
        one: One end of each edge.
        other: The other end of each edge.

    Returns:
        Component of each node, [n], numbered by lowest node; number of components.
    """
    root = np.arange(n)
    while True:
        ends = root[one], root[other]
        apart = ends[0] != ends[1]
        if not apart.any():
            break
        one, other = one[apart], other[apart]
        low, high = (pick(ends[0][apart], ends[1][apart]) for pick in (np.minimum, np.maximum))
        np.minimum.at(root, high, low)
        while not np.array_equal(above := root[root], root):
            root = above
    roots, component_of = np.unique(root, return_inverse=True)
    return component_of, len(roots)


def find_groups(edges: Edges, n_latents: int, least: int, most: int) -> Groups:
    """Find connected components of the mutual edges, with at most `most` latents each.

    Larger components are split: their weakest edges are removed, with a rising least cosine, until
    all parts are small enough.

    Args:
        edges: Graph of the latents.
        n_latents: Number of nodes of the graph.
        least: Fewest latents of a group.
        most: Most latents of a group.
    """
    group_of = np.full(n_latents, -1, np.int32)
    sizes: list[NDArray[np.int64]] = []
    one, other, cosine, _ = edges.where(edges.mutual)
    cutoff, large, n_groups = float(cosine.min(initial=1.0)), np.zeros(n_latents, bool), 0
    while len(one):
        component, n = components(n_latents, one, other)
        counts = np.bincount(component, minlength=n)
        number = np.full(n, -1)
        found = np.flatnonzero((counts >= least) & (counts <= most))
        number[found] = np.arange(n_groups, n_groups + len(found))
        here = number[component] >= 0
        group_of[here] = number[component][here]
        sizes.append(counts[found])
        n_groups += len(found)
        large = (counts > most)[component]
        cutoff += _STEP
        if cutoff >= 1:
            break
        kept = large[one] & (cosine >= cutoff)
        one, other, cosine = one[kept], other[kept], cosine[kept]
        large[:] = False
    latents = np.argsort(group_of, kind="stable")[np.count_nonzero(group_of < 0) :]
    return Groups(latents, np.concatenate([np.zeros(0, np.int64), *sizes]), int(large.sum()))


def merge_groups(parts: Sequence[Groups]) -> Groups:
    """Merge the groups of several searches, without duplicates."""
    lists: dict[bytes, NDArray[np.int64]] = {}
    for part in parts:
        if len(part.sizes):
            for latents in np.split(part.latents, part.sizes.cumsum()[:-1]):
                lists.setdefault(latents.tobytes(), latents)
    sizes = np.array([len(latents) for latents in lists.values()], np.int64)
    latents = np.concatenate([np.zeros(0, np.int64), *lists.values()])
    return Groups(latents, sizes, sum(part.n_left_out for part in parts))
