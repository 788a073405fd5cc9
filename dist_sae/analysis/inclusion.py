"""Parents and children among latents, by the rows on which they fire, and absorbed latents."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_sae.analysis.links import Links

INCLUDED = 0.9
"""Least share of a child's rows on which its parent fires."""
LEAST_ROWS = 10
"""Fewest common rows of a parent and a child."""
ABSORBED_COSINE = 0.5
"""Least cosine of an absorbed latent with the denser one."""
ABSORBED = 0.1
"""Largest share of an absorbed latent's rows on which the denser one fires."""
_DENSER = 2.0  # least ratio of a parent's density to its child's


class Parents(NamedTuple):
    """Latents that have a parent, ascending, with their parents."""

    child: NDArray[np.int64]
    parent: NDArray[np.int64]
    """The least dense latent that includes the child."""
    inclusion: NDArray[np.float64]
    """Share of the child's rows on which the parent fires."""


class Absorbed(NamedTuple):
    """Pairs in which a latent seems to have taken over a part of a denser one."""

    latent: NDArray[np.int64]
    by: NDArray[np.int64]
    """The denser latent, which hardly ever fires where `latent` does."""
    cosine: NDArray[np.float32]
    overlap: NDArray[np.float64]
    """Upper bound on the share of the rows of `latent` on which the denser one fires."""


def find_parents(links: Links, firings: NDArray[np.float64]) -> Parents:
    """Find the parents of latents: at least twice as dense, and active on 90 % of the child's rows.

    Args:
        links: All links of the latents whose parents are wanted.
        firings: Number of rows on which each latent fires, among the rows that links count.
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
    """Find latents near a denser one that hardly fires on their rows.

    This is the signature of feature absorption: the latent of a general feature is silent where the
    latent of a specific one fires, and the specific decoder row contains the general direction. Two
    similar features that exclude each other look the same, so the results are only candidates.

    Args:
        links: All links of the latents to search.
        firings: Number of rows on which each latent fires.
        n_rows: Number of rows in total.
        most_pairs: Most coactive latents that the index lists for a latent. The phi of an unlisted
            one is not above theirs, which bounds its common rows.
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
    # the index lists pairs with two or more common rows; if its list has room, others have 0 or 1
    bound = np.where(listed[latent - first] >= most_pairs, bound, 1.0)
    overlap = np.where(counts > 0, counts, np.maximum(bound, 1.0)) / own
    silent = overlap <= ABSORBED
    cosine = links.cosine[kept]
    return Absorbed(latent[silent], by[silent], cosine[silent], np.minimum(overlap[silent], 1.0))
