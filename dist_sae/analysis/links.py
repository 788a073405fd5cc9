"""Links between latents, by decoder direction and by common rows, in bounded memory.

The links that the index lists are sorted on disk by both of their ends. Then one part of the
latents at a time has all of its links in memory. Only the graph itself stays in memory: 8 bytes for
each direction of a link.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_sae.analysis.graph import Edges, listed_nearest
from dist_sae.analysis.spool import Spool
from dist_sae.index.query import Index

PART_LATENTS = 2**17
"""Number of latents whose links are joined at a time, with at most 168 MB."""

_RECORD = np.dtype(
    [("one", "<i4"), ("other", "<i4"), ("cosine", "<f4"), ("phi", "<f4"), ("rows", "<i4")]
)


class Graph(NamedTuple):
    """An undirected graph of the latents with links, as a symmetric sparse matrix in CSR form."""

    n: int
    """Number of all latents."""
    nodes: NDArray[np.int32]
    """Latents with links, ascending. A node's number is its position here."""
    starts: NDArray[np.int64]
    """First link of each node, followed by the number of links. Each link is counted twice."""
    others: NDArray[np.int32]
    """Node at the other end of each link."""
    weight: NDArray[np.float32]


class Links(NamedTuple):
    """The links of some latents, sorted by `one`, then `other`."""

    one: NDArray[np.int64]
    other: NDArray[np.int64]
    cosine: NDArray[np.float32]
    """Cosine of the decoder rows; 0 if they are not near."""
    phi: NDArray[np.float32]
    """Correlation of the two firing indicators; 0 unless they are coactive beyond chance."""
    rows: NDArray[np.int64]
    """Number of common rows, if the index lists `other` as coactive with `one`; else 0."""

    @property
    def weight(self) -> NDArray[np.float32]:
        """Weight of each link, cosine + phi."""
        return self.cosine + self.phi


def chance_cosine(n_latents: int, d: int) -> float:
    """Return the cosine that no two of n random directions should reach: sqrt(4 ln n / d)."""
    return math.sqrt(4 * math.log(max(2, n_latents)) / d)


def find_links(
    index: Index, least_cosine: float, firings: NDArray[np.float64], spooled: list[int]
) -> Iterator[Links]:
    """Yield the links of the latents, part by part.

    Latents are linked if their decoder directions are near and both fire, or if they fire on more
    common rows than any pair should by chance. The direction of a latent that never fires means
    nothing, because training no longer moves it.

    Args:
        index: Index with nearest latents and coactive pairs.
        least_cosine: Least cosine of near directions.
        firings: Number of rows on which each latent fires, among the index's `pair_rows`.
        spooled: List to which the number of bytes on disk is appended.

    Raises:
        ConfigError: The index has no nearest latents or no coactive pairs.
        StoreFullError: The folder of temporary files has no space.
    """
    n_parts = -(-index.n_latents // PART_LATENTS)
    with Spool(_RECORD, n_parts) as spool:
        for one, other, cosine in listed_nearest(index):
            near = (cosine >= least_cosine) & (firings[one] > 0) & (firings[other] > 0)
            _add(spool, one[near], other[near], cosine[near], "cosine", None)
        for one, other, count, phi in _coactive(index, firings):
            _add(spool, one, other, phi, "phi", count)
        spooled.append(spool.bytes)
        for part in range(n_parts):
            yield _joined(spool.read(part), index.n_latents)


class Pairs(NamedTuple):
    """Pairs of latents that fire together beyond chance, most of them in both orders."""

    latent: NDArray[np.int64]
    other: NDArray[np.int64]
    """A latent that the index lists as coactive with `latent`."""

    def among(self, edges: Edges, n: int) -> NDArray[np.bool_]:
        """Return a mask of the edges between n latents that join one of these pairs."""
        keys = np.minimum(self.latent, self.other) * n + np.maximum(self.latent, self.other)
        return np.isin(edges.one * n + edges.other, keys)


def coactive_pairs(index: Index, firings: NDArray[np.float64]) -> Pairs:
    """Find the pairs that fire on more common rows than any pair should by chance.

    Args:
        index: Index with coactive pairs.
        firings: Number of rows on which each latent fires, among the index's `pair_rows`.

    Raises:
        ConfigError: The index has no coactive pairs.
    """
    columns = zip(*_coactive(index, firings), strict=True)
    one, other, *_ = (np.concatenate(column) for column in columns)
    return Pairs(one.astype(np.int64), other.astype(np.int64))


def _coactive(index: Index, firings: NDArray[np.float64]) -> Iterator[tuple[NDArray[Any], ...]]:
    """Yield latent, other, common rows and phi of pairs that fire together beyond chance.

    Each item has the pairs of one bucket. By the Chernoff bound of a Poisson tail, in nats, no pair
    of independent latents is expected to have as many common rows.
    """
    for bucket in range(index.manifest.n_buckets):
        table = index.bucket_pairs(bucket)
        names = ("latent", "other", "count", "phi")
        one, other, count, phi = (table[name].to_numpy() for name in names)
        expected = firings[one] * firings[other] / max(1, index.pair_rows)
        ratio = np.maximum(count / np.maximum(expected, 1e-300), 1e-300)
        surprise = count * np.log(ratio) - (count - expected)
        kept = (count > expected) & (surprise > 2 * math.log(index.n_latents))
        yield one[kept], other[kept], count[kept], phi[kept]


def _add(
    spool: Spool,
    one: NDArray[np.int64],
    other: NDArray[np.int64],
    value: NDArray[np.float32],
    name: str,
    rows: NDArray[np.int64] | None,
) -> None:
    """Add links to the parts of both ends, and `rows` only to the part of `one`."""
    for here, there, listed in ((one, other, rows), (other, one, None)):
        records = np.zeros(len(one), _RECORD)
        records["one"], records["other"], records[name] = here, there, value
        if listed is not None:
            records["rows"] = listed
        spool.add(here // PART_LATENTS, records)


def _joined(records: NDArray[np.void], n: int) -> Links:
    """Merge records with the same ends into one link."""
    keys = records["one"].astype(np.int64) * n + records["other"]
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    if not len(first):
        empty = np.zeros(0)
        return Links(*(empty.astype(t) for t in (np.int64, np.int64, "f4", "f4", np.int64)))
    cosine, phi, rows = (
        np.maximum.reduceat(records[name][order], first) for name in ("cosine", "phi", "rows")
    )
    return Links(keys[first] // n, keys[first] % n, cosine, phi, rows.astype(np.int64))


class GraphBuilder:
    """Builds a graph from links that are added part by part.

    Args:
        n: Number of all latents.
    """

    def __init__(self, n: int) -> None:
        self._degrees = np.zeros(n, np.int32)
        self._others: list[NDArray[np.int32]] = []
        self._weights: list[NDArray[np.float32]] = []

    def add(self, links: Links) -> None:
        """Add the links of the next latents."""
        latents, degrees = np.unique(links.one, return_counts=True)
        self._degrees[latents] = degrees
        self._others.append(links.other.astype(np.int32))
        self._weights.append(links.weight)

    def graph(self) -> Graph:
        """Build the graph. Nothing can be added afterwards."""
        nodes = np.flatnonzero(self._degrees).astype(np.int32)
        starts = np.concatenate([[0], self._degrees[nodes].cumsum(dtype=np.int64)])
        number = np.full(len(self._degrees), -1, np.int32)
        number[nodes] = np.arange(len(nodes), dtype=np.int32)
        others, weight = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.float32)
        self._others.reverse()
        self._weights.reverse()
        at = 0
        while self._others:  # frees each part after its copy, so memory does not double
            part, weights = self._others.pop(), self._weights.pop()
            others[at : at + len(part)], weight[at : at + len(part)] = number[part], weights
            at += len(part)
        return Graph(len(self._degrees), nodes, starts, others, weight)
