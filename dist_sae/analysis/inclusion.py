"""Parents and children among latents by the rows on which they fire, and absorbed latents."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_sae.analysis.graph import Edges, Pairs

INCLUDED = 0.9
"""Least share of a child's rows on which its parent fires."""
LEAST_ROWS = 10
"""Least common rows of a parent and a child."""
ABSORBED_COSINE = 0.5
"""Least cosine of an absorbed latent with the denser one."""
ABSORBED = 0.1
"""Most share of its rows on which the denser one fires."""
_DENSER = 2.0  # how much denser a parent is, at least


class Parents(NamedTuple):
    """Children with a parent, ascending."""

    child: NDArray[np.int64]
    parent: NDArray[np.int64]
    """The least dense latent that includes the child."""
    inclusion: NDArray[np.float64]
    """Share of the child's rows on which the parent fires."""


class Absorbed(NamedTuple):
    """Latents that seem to have taken over a part of a denser one."""

    latent: NDArray[np.int64]
    by: NDArray[np.int64]
    """The denser latent, which is silent where the other fires."""
    cosine: NDArray[np.float32]
    overlap: NDArray[np.float64]
    """At most this share of its rows has the denser one active."""


def find_parents(pairs: Pairs, firings: NDArray[np.float64]) -> Parents:
    """Children on at least nine tenths of whose rows a latent twice as dense fires.

    Args:
        pairs: Latents that fire together.
        firings: Rows on which each fires, of the same rows.
    """
    share = np.minimum(1.0, pairs.rows / np.maximum(firings[pairs.latent], 1))
    kept = (share >= INCLUDED) & (pairs.rows >= LEAST_ROWS)
    kept &= firings[pairs.other] >= _DENSER * firings[pairs.latent]
    child, parent, share = pairs.latent[kept], pairs.other[kept], share[kept]
    order = np.lexsort((parent, firings[parent], child))
    first = order[np.flatnonzero(np.diff(child[order], prepend=-1))]
    return Parents(child[first], parent[first], share[first])


def find_absorbed(
    near: Edges, pairs: Pairs, firings: NDArray[np.float64], n_rows: int, most_pairs: int
) -> Absorbed:
    """Latents near a denser one that does not fire on their rows.

    A latent for a general feature that is silent where a special one fires, whose decoder row
    contains the general direction, is what feature absorption leaves. Two features that exclude
    each other and look alike leave the same, so these are candidates.

    Args:
        near: Near decoder rows.
        pairs: Latents that fire together.
        firings: Rows on which each fires.
        n_rows: All rows.
        most_pairs: Pairs that are kept for a latent. One that is not listed has no larger phi than
            those that are; this bounds its common rows.
    """
    n = len(firings)
    kept = near.weight >= ABSORBED_COSINE
    ends, cosine = np.stack([near.one[kept], near.other[kept]]), near.weight[kept]
    order = np.argsort(firings[ends], axis=0, kind="stable")
    latent, by = np.take_along_axis(ends, order, 0)
    wanted = (firings[latent] >= LEAST_ROWS) & (firings[by] >= _DENSER * firings[latent])
    latent, by, cosine = latent[wanted], by[wanted], cosine[wanted]
    listed = np.bincount(pairs.latent, minlength=n)
    least = np.full(n, np.inf)
    np.minimum.at(least, pairs.latent, pairs.phi)
    counts = _counts(pairs, latent * n + by, n)
    own = firings[latent]
    bound = least[latent] * np.sqrt(own * firings[by]) + own * firings[by] / n_rows
    bound = np.where(listed[latent] >= most_pairs, bound, 1.0)  # a pair has at least two rows
    overlap = np.where(counts >= 0, counts, np.maximum(bound, 1.0)) / own
    silent = overlap <= ABSORBED
    return Absorbed(latent[silent], by[silent], cosine[silent], np.minimum(overlap[silent], 1.0))


def _counts(pairs: Pairs, wanted: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Common rows of the wanted pairs, each `latent * n + other`; -1 where it is not listed."""
    keys = pairs.latent * n + pairs.other
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], pairs.rows[order]
    if not len(keys):
        return np.full(len(wanted), -1)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, counts[at], -1)
