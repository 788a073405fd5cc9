"""Examples of a latent, with their documents and the latent's other activations in them."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from dist_sae.index.query import Firing, Index
from dist_sae.index.texts import CONTEXT_TOKENS, Texts


def drop_overlapping(firings: Iterable[Firing], reach: int = CONTEXT_TOKENS) -> Iterator[Firing]:
    """Yield the firings whose texts do not overlap the text of an earlier one.

    Args:
        firings: The firings.
        reach: Tokens of text on either side of a firing.
    """
    seen: dict[int, list[int]] = {}
    for firing in firings:
        others = seen.setdefault(firing.document, [])
        if all(abs(firing.position - other) > 2 * reach for other in others):
            others.append(firing.position)
            yield firing


def read_documents(texts: Texts, firings: Iterable[Firing]) -> None:
    """Read the documents of firings into `texts`, each unit once."""
    documents = defaultdict[int, set[int]](set)
    for firing in firings:
        documents[firing.unit].add(firing.document)
    for unit in sorted(documents):
        texts.read(unit, documents[unit])


def activations_near(
    index: Index, latent: int, firings: Sequence[Firing]
) -> dict[tuple[int, int], float]:
    """Return a latent's activations in the documents of some firings, by (document, position).

    An index without postings gives only the activations of the firings themselves.
    """
    known = {(firing.document, firing.position): firing.act for firing in firings}
    if not firings or not index.manifest.postings_share:
        return known
    units = np.unique([firing.unit for firing in firings])
    documents = np.unique([firing.document for firing in firings])
    for table in index.postings(latent):
        unit_of, rows, acts = (table[name].to_numpy() for name in ("unit", "row", "act"))
        for unit in units:
            here = np.flatnonzero(unit_of == unit)
            if not len(here):
                continue
            origins = index.origins(int(unit)).take(rows[here])
            found = [origins[name].to_numpy() for name in ("document", "position")]
            near = np.flatnonzero(np.isin(found[0], documents))
            places = zip(*(column[near].tolist() for column in found), strict=True)
            known |= dict(zip(places, acts[here][near].tolist(), strict=True))
    return known
