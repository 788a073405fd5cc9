"""Latents that are active together, counted on a seeded sample of the rows.

With n rows, n_a of them with latent a active, n_b with b and n_ab with both:

    phi = (n n_ab - n_a n_b) / sqrt(n_a (n - n_a) n_b (n - n_b))
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import sparse

from dist_sae.index.encode import sampled_rows
from dist_sae.index.layout import (
    PAIRS,
    PAIRS_CHANCE,
    IndexManifest,
    UnitRecord,
    chances,
    read_codes,
)
from dist_sae.storage import ObjectStore

MOST_PAIRS = 16
"""Others that are kept for a latent."""
LEAST_ROWS = 2
"""Rows on which two latents must be active together: by chance alone two rare ones meet once."""
MOST_ENTRIES = 2**25
"""Entries of the sample that are held: where latents are dense, fewer rows are."""
_MOST_PRODUCTS = 2**25  # at a time


class Sample:
    """All codes of the rows on which pairs are counted.

    Args:
        store: The store of runs.
        manifest: The index.
        records: Its units.
    """

    def __init__(
        self, store: ObjectStore, manifest: IndexManifest, records: Sequence[UnitRecord]
    ) -> None:
        entries = sum(chunk.entries for record in records for chunk in record.sample)
        share = min(1.0, MOST_ENTRIES / max(1, entries))
        blocks = [_unit_codes(store, manifest, record, share) for record in records]
        empty = sparse.csr_array((0, manifest.n_latents), dtype=np.float32)
        self.codes = sparse.vstack([empty, *blocks], format="csr")
        self.active = self.codes.astype(bool).astype(np.float32)
        self.firings = np.bincount(self.codes.indices, minlength=manifest.n_latents)

    @property
    def rows(self) -> int:
        """Rows of the sample."""
        return int(self.codes.shape[0])

    def pairs(self, latents: range) -> pa.Table:
        """Find the others with the largest phi for a range of latents: a table of `PAIRS`."""
        tables = [PAIRS.empty_table()]
        columns = self.active[:, latents.start : latents.stop].tocsc()
        values = self.codes[:, latents.start : latents.stop].tocsc()
        work = columns.T @ self.active.sum(1)  # products that each latent takes
        start = 0
        while start < len(latents):
            within = int(np.searchsorted(work[start:].cumsum(), _MOST_PRODUCTS))
            stop = min(start + max(1, within), len(latents))
            together = (columns[:, start:stop].T @ self.active).tocoo()
            products = (values[:, start:stop].T @ self.codes).tocsr()
            tables.append(self._table(latents.start + start, together, products))
            start = stop
        return pa.concat_tables(tables)

    def _table(
        self, first: int, together: sparse.coo_array, products: sparse.csr_array
    ) -> pa.Table:
        rows, others, count = together.row, together.col, np.rint(together.data).astype(np.int64)
        kept = (count >= LEAST_ROWS) & (rows + first != others)
        rows, others, count = rows[kept], others[kept], count[kept]
        n, n_a, n_b = self.rows, self.firings[rows + first], self.firings[others]
        spread = np.sqrt((n_a * (n - n_a)).astype(np.float64) * (n_b * (n - n_b)))
        above = n * count - n_a * n_b
        phi = np.divide(above, spread, out=np.zeros(len(count)), where=spread > 0)
        phi = phi.astype(np.float32)
        order = np.lexsort((others, -count, -phi, rows))
        starts = np.searchsorted(rows[order], rows[order])
        order = order[np.arange(len(order)) - starts < MOST_PAIRS]
        rows, others, count, phi = rows[order], others[order], count[order], phi[order]
        product = np.asarray(products[rows, others]).ravel() if len(rows) else np.zeros(0)
        columns = (rows + first, others, count, product, phi)
        return pa.Table.from_arrays(
            [pa.array(c, f.type) for c, f in zip(map(_plain, columns, PAIRS), PAIRS, strict=True)],
            schema=PAIRS,
        )


def _plain(column: NDArray[np.generic], field: pa.Field) -> NDArray[np.generic]:
    return column.astype(field.type.to_pandas_dtype())


def _unit_codes(
    store: ObjectStore, manifest: IndexManifest, record: UnitRecord, share: float
) -> sparse.csr_array:
    """Codes of a unit's sampled rows, [rows, n_latents]; of a share of them."""
    shape = (record.sampled_rows, manifest.n_latents)
    codes = sparse.csr_array(shape, dtype=np.float32)
    for chunk in record.sample:
        counts, latents, acts = read_codes(store, chunk)
        ends = np.concatenate([[0], counts.cumsum(dtype=np.int64)])
        codes = codes + sparse.csr_array((acts.astype(np.float32), latents, ends), shape=shape)
    if share < 1:
        rows = sampled_rows(manifest, record.unit, record.rows)
        chance = chances(manifest.seed, PAIRS_CHANCE, record.unit, rows)
        codes = codes[np.flatnonzero(chance < np.uint64(share * manifest.pair_share * 2**64))]
    return codes
