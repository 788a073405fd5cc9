"""Parents and children among latents by the rows on which they fire, and absorbed latents."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_sae.analysis.links import Links

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


def find_parents(links: Links, firings: NDArray[np.float64]) -> Parents:
    """Children on at least nine tenths of whose rows a latent twice as dense fires.

    Args:
        links: Of some latents; their parents are found.
        firings: Rows on which each fires, of the same rows.
    """
    share = np.minimum(1.0, links.rows / np.maximum(firings[links.one], 1))
    kept = (share >= INCLUDED) & (links.rows >= LEAST_ROWS)
    kept &= firings[links.other] >= _DENSER * firings[links.one]
    child, parent, share = links.one[kept], links.other[kept], share[kept]
    order = np.lexsort((parent, firings[parent], child))
    first = order[np.flatnonzero(np.diff(child[order], prepend=-1))]
    return Parents(child[first], parent[first], share[first])


def find_absorbed(
    links: Links, firings: NDArray[np.float64], n_rows: int, most_pairs: int
) -> Absorbed:
    """Latents near a denser one that does not fire on their rows.

    A latent for a general feature that is silent where a special one fires, whose decoder row
    contains the general direction, is what feature absorption leaves. Two features that exclude
    each other and look alike leave the same, so these are candidates.

    Args:
        links: Of some latents, among which are those that are found.
        firings: Rows on which each fires.
        n_rows: All rows.
        most_pairs: Coactive latents that are kept for a latent. One that is not listed has no
            larger phi than those that are; this bounds its common rows.
    """
    kept = links.cosine >= ABSORBED_COSINE
    kept &= firings[links.one] >= LEAST_ROWS
    kept &= firings[links.other] >= _DENSER * firings[links.one]
    latent, by = links.one[kept], links.other[kept]
    own, counts = firings[latent], links.rows[kept]
    first, last = (int(links.one[at]) for at in (0, -1)) if len(links.one) else (0, 0)
    of = links.one[links.rows > 0] - first
    listed = np.bincount(of, minlength=last - first + 1)
    least = np.full(len(listed), np.inf)
    np.minimum.at(least, of, links.phi[links.rows > 0])
    bound = least[latent - first] * np.sqrt(own * firings[by]) + own * firings[by] / n_rows
    bound = np.where(listed[latent - first] >= most_pairs, bound, 1.0)  # a pair has two rows
    overlap = np.where(counts > 0, counts, np.maximum(bound, 1.0)) / own
    silent = overlap <= ABSORBED
    cosine = links.cosine[kept]
    return Absorbed(latent[silent], by[silent], cosine[silent], np.minimum(overlap[silent], 1.0))
