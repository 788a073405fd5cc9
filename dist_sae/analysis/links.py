"""Links between latents, by decoder direction and by common rows, in bounded memory.

What the index lists of a latent is sorted on disk by both of its ends, so a part of the latents has
all of its links in memory at a time. Only the graph itself stays there: 8 bytes for each direction
of a link.
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
"""Latents whose links are joined at a time, of at most 168 MB."""

_RECORD = np.dtype(
    [("one", "<i4"), ("other", "<i4"), ("cosine", "<f4"), ("phi", "<f4"), ("rows", "<i4")]
)


class Graph(NamedTuple):
    """An undirected graph of the latents that have links: the rows of a symmetric sparse matrix."""

    n: int
    """All latents."""
    nodes: NDArray[np.int32]
    """Latents with links, ascending. The others are numbered by their place here."""
    starts: NDArray[np.int64]
    """First link of each node, and last of all the number of links; each is counted twice."""
    others: NDArray[np.int32]
    """Node at the other end of each link."""
    weight: NDArray[np.float32]


class Links(NamedTuple):
    """The links of some latents, by both ends."""

    one: NDArray[np.int64]
    other: NDArray[np.int64]
    cosine: NDArray[np.float32]
    """Cosine of the decoder rows; 0 if they are not near."""
    phi: NDArray[np.float32]
    """Correlation of the two activities; 0 unless they fire together more often than by chance."""
    rows: NDArray[np.int64]
    """Common rows, if `one` lists the other as coactive; else 0."""

    @property
    def weight(self) -> NDArray[np.float32]:
        """Cosine + phi."""
        return self.cosine + self.phi


def by_chance(n_latents: int, d: int) -> float:
    """Cosine that no two of n random directions are expected to reach: sqrt(4 ln n / d)."""
    return math.sqrt(4 * math.log(max(2, n_latents)) / d)


def find_links(
    index: Index, least_cosine: float, firings: NDArray[np.float64], spooled: list[int]
) -> Iterator[Links]:
    """Yield the links of the latents, part by part.

    Latents are linked if their decoder directions are near and both fire (the direction of one that
    never fires is where it was left), or if they fire on more common rows than chance gives to any
    pair.

    Args:
        index: Has nearest latents, and counts pairs.
        least_cosine: Of near directions.
        firings: Rows on which each latent fires, among the index's `pair_rows`.
        spooled: Gets the number of bytes on disk.

    Raises:
        ConfigError: The index has no nearest latents, or counts no pairs.
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
    """Pairs of latents that fire together more often than by chance, mostly in both orders."""

    latent: NDArray[np.int64]
    other: NDArray[np.int64]
    """A latent that is listed as coactive with it."""

    def among(self, edges: Edges, n: int) -> NDArray[np.bool_]:
        """Mask of the edges between n latents that join one of these pairs."""
        keys = np.minimum(self.latent, self.other) * n + np.maximum(self.latent, self.other)
        return np.isin(edges.one * n + edges.other, keys)


def coactive_pairs(index: Index, firings: NDArray[np.float64]) -> Pairs:
    """Find the pairs that fire on more common rows than chance gives to any pair.

    Args:
        index: Counts pairs.
        firings: Rows on which each latent fires, among the index's `pair_rows`.

    Raises:
        ConfigError: The index counts no pairs.
    """
    columns = zip(*_coactive(index, firings), strict=True)
    one, other, *_ = (np.concatenate(column) for column in columns)
    return Pairs(one.astype(np.int64), other.astype(np.int64))


def _coactive(index: Index, firings: NDArray[np.float64]) -> Iterator[tuple[NDArray[Any], ...]]:
    """Yield latent, other, common rows and phi of the pairs that fire together beyond chance.

    One bucket at a time. By the Chernoff bound of a Poisson tail, in nats, no pair of independent
    latents is expected to have so many common rows.
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
    """Add links to the parts of both ends; rows to that of the end that lists them."""
    for here, there, listed in ((one, other, rows), (other, one, None)):
        records = np.zeros(len(one), _RECORD)
        records["one"], records["other"], records[name] = here, there, value
        if listed is not None:
            records["rows"] = listed
        spool.add(here // PART_LATENTS, records)


def _joined(records: NDArray[np.void], n: int) -> Links:
    """One link of all records with the same ends."""
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
    """Builds a graph of links that come part by part.

    Args:
        n: All latents.
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
        """The graph; nothing can be added afterwards."""
        nodes = np.flatnonzero(self._degrees).astype(np.int32)
        starts = np.concatenate([[0], self._degrees[nodes].cumsum(dtype=np.int64)])
        number = np.full(len(self._degrees), -1, np.int32)
        number[nodes] = np.arange(len(nodes), dtype=np.int32)
        others, weight = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.float32)
        self._others.reverse()
        self._weights.reverse()
        at = 0
        while self._others:  # part by part, so that all is not there twice
            part, weights = self._others.pop(), self._weights.pop()
            others[at : at + len(part)], weight[at : at + len(part)] = number[part], weights
            at += len(part)
        return Graph(len(self._degrees), nodes, starts, others, weight)
