"""Reconstructions by groups of latents on an index's rows, group by group in bounded memory."""

from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_sae.analysis.graph import Groups
from dist_sae.analysis.spool import Spool
from dist_sae.index.codes import hash_bound, row_hashes
from dist_sae.index.decoder import Decoder
from dist_sae.index.query import Index

_PART_BYTES = 2**28  # bytes of records in memory at a time
_MOST_PARTS = 4096
_PURPOSE = 3  # purpose number of the seeded choice of rows; the index uses 0 to 2
_SPARE = 3  # expected entries per row that is used, because several latents fire on a row

_ENTRY = np.dtype([("slot", "<i4"), ("row", "<u8"), ("act", "<f4")])


class Reconstructed(NamedTuple):
    """A group's activations on a random sample of the rows on which any of its latents fires."""

    group: int
    latents: NDArray[np.int64]
    codes: NDArray[np.float64]
    """Activations, [rows, latents]."""
    gram: NDArray[np.float64]
    """Dot products of the latents' decoder rows, [latents, latents]."""

    def points(self) -> NDArray[np.float64]:
        """Return activations times decoder rows, [rows, d], in a basis of the latents' span."""
        squares, axes = np.linalg.eigh(self.gram)
        kept = squares > 1e-9 * squares[-1]
        points: NDArray[np.float64] = self.codes @ (axes[:, kept] * np.sqrt(squares[kept]))
        return points


def reconstruct(
    index: Index, decoder: Decoder, groups: Groups, most_rows: int, spooled: list[int]
) -> Iterator[Reconstructed]:
    """Yield the groups with their activations on at most `most_rows` rows each.

    Postings and decoder are read once, and their parts are sorted by group on disk.

    Args:
        index: Index with postings.
        decoder: Decoder of the same checkpoint.
        groups: Groups of the latents.
        most_rows: Most rows of a group.
        spooled: List to which the number of bytes on disk is appended.
    """
    n_groups = len(groups.sizes)
    if not n_groups:
        spooled.append(0)
        return
    latents, group_of = groups.latents, np.repeat(np.arange(n_groups), groups.sizes)
    slots_of = _Slots(latents, index.n_latents)
    firings = np.bincount(group_of, index.firings[latents], n_groups)
    limit = _SPARE * most_rows / np.maximum(firings * index.manifest.postings_share, 1)
    bytes_of = 4 * decoder.d_out * groups.sizes
    bytes_of = bytes_of + _ENTRY.itemsize * firings * np.minimum(limit, 1)
    part_of_group = (bytes_of.cumsum() - bytes_of) // _PART_BYTES
    part_of_group = np.minimum(part_of_group, _MOST_PARTS - 1).astype(np.int64)
    part_of = part_of_group[group_of]
    n_parts = int(part_of_group.max(initial=0)) + 1
    row_type = np.dtype([("slot", "<i4"), ("row", "<f4", (decoder.d_out,))])
    with Spool(row_type, n_parts) as rows, Spool(_ENTRY, n_parts) as entries:
        bounds = np.array([hash_bound(min(share, 1.0)) for share in limit.tolist()], np.uint64)
        buckets = range(index.manifest.n_buckets)
        for table in chain.from_iterable(map(index.bucket_postings, buckets)):
            here, slots = slots_of(table["latent"].to_numpy())
            unit, row = (table[c].to_numpy()[here] for c in ("unit", "row"))
            # hashes are unique, so each names a row
            hashes = row_hashes(index.manifest.seed, _PURPOSE, unit, row)
            kept = hashes <= bounds[group_of[slots]]
            records = np.empty(int(kept.sum()), _ENTRY)
            records["slot"], records["row"] = slots[kept], hashes[kept]
            records["act"] = table["act"].to_numpy()[here[kept]]
            entries.add(part_of[slots[kept]], records)
        for first, part in decoder.parts():
            here, slots = slots_of(np.arange(first, first + len(part)))
            records = np.empty(len(here), row_type)
            records["slot"], records["row"] = slots, part.numpy()[here]
            rows.add(part_of[slots], records)
        spooled.append(rows.bytes + entries.bytes)
        for number in range(n_parts):
            both = rows.read(number), entries.read(number)
            yield from _of_part(*both, latents, group_of, most_rows)


class _Slots:
    """The slots of a latent: its positions in the list of all groups' latents, if any."""

    def __init__(self, latents: NDArray[np.int64], n_latents: int) -> None:
        self._slots = np.argsort(latents, kind="stable")
        self._starts = np.searchsorted(latents[self._slots], np.arange(n_latents + 1))

    def __call__(self, latents: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return an index into `latents` and a slot, for every slot of every latent."""
        starts = self._starts[latents]
        counts = self._starts[latents + 1] - starts
        here = np.repeat(np.arange(len(latents)), counts)
        within = np.arange(len(here)) - np.repeat(counts.cumsum() - counts, counts)
        return here, self._slots[starts[here] + within]


def _of_part(
    rows: NDArray[np.void],
    entries: NDArray[np.void],
    latents: NDArray[np.int64],
    group_of: NDArray[np.int64],
    most_rows: int,
) -> Iterator[Reconstructed]:
    rows = rows[np.argsort(rows["slot"], kind="stable")]
    entries = entries[np.argsort(entries["slot"], kind="stable")]
    present, starts = np.unique(group_of[rows["slot"]], return_index=True)
    cuts = rows["slot"][starts]
    for group, mine, found in zip(
        present.tolist(),
        np.split(rows, starts[1:]),
        np.split(entries, np.searchsorted(entries["slot"], cuts[1:])),
        strict=True,
    ):
        slots = mine["slot"]
        hashes, place = np.unique(found["row"], return_inverse=True)
        n = min(len(hashes), most_rows)
        codes = np.zeros((len(hashes), len(slots)))
        codes[place, found["slot"] - slots[0]] = found["act"]
        directions = mine["row"].astype(np.float64)
        gram = directions @ directions.T
        yield Reconstructed(group, latents[slots], codes[:n], gram)
