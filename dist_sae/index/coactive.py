"""Latents that are active together, counted on a seeded sample of the rows.

With n rows, n_a of them with latent a active, n_b with b and n_ab with both:

    phi = (n n_ab - n_a n_b) / sqrt(n_a (n - n_a) n_b (n - n_b))
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist_sae.index.codes import (
    PAIRS_SAMPLING,
    hash_bound,
    read_codes,
    row_hashes,
)
from dist_sae.index.layout import (
    PAIRS,
    IndexManifest,
    UnitRecord,
)
from dist_sae.index.units import sampled_rows
from dist_sae.storage import ObjectStore

MOST_PAIRS = 16
"""Most coactive latents that are stored per latent."""
LEAST_ROWS = 2
"""Fewest rows on which both latents of a pair are active. Two rare latents can share one row by
chance."""
MOST_ENTRIES = 2**25
"""Most entries of the sample in memory. If latents are dense, the sample has fewer rows."""
_MOST_AT_ONCE = 2**22  # entries that are counted at a time for one latent
_DENSE_FROM = 1 / 16  # entries / n_latents from which an array over all latents is faster


class _Together(NamedTuple):
    """The latents that are active on the same rows as one latent."""

    others: NDArray[np.int64]
    counts: NDArray[np.int64]
    """Number of rows shared with each of `others`."""
    products: NDArray[np.float64]
    """Product of both activations, summed over the shared rows."""


class Sample:
    """All codes of the sampled rows, on which pairs are counted.

    Args:
        store: The store of runs.
        manifest: The manifest of the index.
        records: Records of the index's units.
    """

    def __init__(
        self, store: ObjectStore, manifest: IndexManifest, records: Iterable[UnitRecord]
    ) -> None:
        entries = sum(chunk.entries for record in records for chunk in record.sample)
        share = manifest.pair_share * min(1.0, MOST_ENTRIES / max(1, entries))
        units = [_unit_codes(store, manifest, record, share) for record in records]
        counts, self._latents, self._acts = (
            np.concatenate(column) for column in zip(*units, strict=True)
        )
        self.rows = len(counts)
        """Number of rows in the sample."""
        self._n_latents = manifest.n_latents
        self._ends = np.concatenate([[0], counts.cumsum(dtype=np.int64)])
        self._firings = np.bincount(self._latents, minlength=self._n_latents)

    def pairs(self, latents: range) -> pa.Table:
        """Find the latents with the largest phi for each latent of a range, as a `PAIRS` table."""
        found: list[list[NDArray[Any]]] = [
            [np.zeros(0, field.type.to_pandas_dtype()) for field in PAIRS]
        ]
        here = np.flatnonzero((self._latents >= latents.start) & (self._latents < latents.stop))
        here = here[np.argsort(self._latents[here], kind="stable")]
        ends = self._firings[latents.start : latents.stop].cumsum()
        for latent, entries in zip(latents, np.split(here, ends[:-1]), strict=True):
            if len(entries) >= LEAST_ROWS:
                found.append(self._best(latent, self._together(entries)))
        columns = (np.concatenate(column) for column in zip(*found, strict=True))
        return pa.Table.from_arrays(
            [
                pa.array(column.astype(field.type.to_pandas_dtype()))
                for column, field in zip(columns, PAIRS, strict=True)
            ],
            schema=PAIRS,
        )

    def _together(self, entries: NDArray[np.int64]) -> _Together:
        rows = np.searchsorted(self._ends, entries, side="right") - 1
        total = int((self._ends[rows + 1] - self._ends[rows]).sum())
        if total < _DENSE_FROM * self._n_latents:
            places, factors = self._places(rows, self._acts[entries])
            others, inverse = np.unique(self._latents[places], return_inverse=True)
            sums: NDArray[Any] = np.bincount(inverse, factors * self._acts[places])
            found: NDArray[np.int64] = np.bincount(inverse)
            return _Together(others.astype(np.int64), found, sums)
        counts: NDArray[np.int64] = np.zeros(self._n_latents, np.int64)
        products: NDArray[np.float64] = np.zeros(self._n_latents)
        for part in _parts(len(rows), -(-total // _MOST_AT_ONCE)):
            places, factors = self._places(rows[part], self._acts[entries[part]])
            numbers = self._latents[places]
            counts += np.bincount(numbers, minlength=self._n_latents)
            products += np.bincount(numbers, factors * self._acts[places], self._n_latents)
        here = np.flatnonzero(counts)
        return _Together(here, counts[here], products[here])

    def _places(
        self, rows: NDArray[np.int64], acts: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the indices of all entries of some rows, and each row's `acts` for each entry."""
        starts = self._ends[rows]
        counts = self._ends[rows + 1] - starts
        ends = counts.cumsum()
        places = np.repeat(starts - ends + counts, counts)
        places += np.arange(len(places))
        return places, np.repeat(acts.astype(np.float64), counts)

    def _best(self, latent: int, found: _Together) -> list[NDArray[Any]]:
        kept = (found.counts >= LEAST_ROWS) & (found.others != latent)
        others, counts, products = (column[kept] for column in found)
        n, n_a, n_b = self.rows, int(self._firings[latent]), self._firings[others]
        spread = np.sqrt(float(n_a) * (n - n_a) * n_b * (n - n_b))
        above = (n * counts - n_a * n_b).astype(np.float64)
        phi = np.divide(above, spread, out=np.zeros(len(counts)), where=spread > 0)
        phi = phi.astype(np.float32)
        if len(phi) > MOST_PAIRS:
            near = np.flatnonzero(phi >= np.partition(phi, -MOST_PAIRS)[-MOST_PAIRS])
        else:
            near = np.arange(len(phi))
        order = near[np.lexsort((others[near], -counts[near], -phi[near]))][:MOST_PAIRS]
        columns = [others[order], counts[order], products[order], phi[order]]
        return [np.full(len(order), latent, np.int32), *columns]


def _parts(n: int, parts: int) -> Iterator[slice]:
    return (slice(n * i // parts, n * (i + 1) // parts) for i in range(parts))


def _unit_codes(
    store: ObjectStore, manifest: IndexManifest, record: UnitRecord, share: float
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
    """Read the codes of a unit's sampled rows: entries per row, then latents and acts by row.

    Args:
        store: The store of runs.
        manifest: The manifest of the index.
        record: The record of the unit.
        share: Share of all rows to keep, at most `manifest.pair_share`.
    """
    chunks = [read_codes(store, chunk) for chunk in record.sample]
    if not chunks:
        return np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32)
    row = np.concatenate([np.repeat(np.arange(len(c.counts)), c.counts) for c in chunks])
    latents = np.concatenate([codes.places for codes in chunks])
    acts = np.concatenate([codes.acts for codes in chunks])
    counts = np.stack([codes.counts for codes in chunks]).sum(0, dtype=np.int64)
    order = np.argsort(row, kind="stable")  # groups the latents of all shards by row
    numbers = sampled_rows(manifest, record.unit, record.rows)
    kept = row_hashes(manifest.seed, PAIRS_SAMPLING, record.unit, numbers) < hash_bound(share)
    order = order[kept[row[order]]]
    return counts[kept], latents[order], acts[order]
