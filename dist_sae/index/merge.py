"""Stage 2 of an index: merging the codes of a bucket's latents on all units.

The codes of a unit are sorted by latent, so they are merged by counting, without another sort. To
bound memory, a bucket's latents are merged in ranges of at most `MOST_ENTRIES` entries, and a
single latent with more entries is merged in parts.
"""

import tempfile
from collections.abc import Iterator, Sequence
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_sae.errors import StoreFullError
from dist_sae.index.codes import (
    DECILE_SAMPLING,
    Codes,
    read_codes,
    row_hashes,
)
from dist_sae.index.layout import (
    DECILES,
    HISTOGRAM_BARS,
    TOP,
    CodesChunk,
)
from dist_sae.storage import ObjectStore

MOST_ENTRIES = 2**24
"""Most entries in memory. Sort keys number them with `_NUMBER_BITS` bits."""
_NUMBER_BITS = 24
_ACT_BITS = 18  # 8 of the exponent and 10 of the mantissa of a rounded, positive fp32
_CUT_BITS = 13  # lower bits of the mantissa, which are 0 after rounding

Int = NDArray[np.int64]


class Tile(NamedTuple):
    """Entries of consecutive latents, sorted by latent, unit and row."""

    first: int
    """First latent of the tile."""
    counts: Int
    """Number of entries of each latent."""
    units: NDArray[np.int32]
    rows: NDArray[np.int32]
    acts: NDArray[np.float32]

    @property
    def latents(self) -> Int:
        """Latent of each entry, counted from `first`."""
        return np.repeat(np.arange(len(self.counts)), self.counts)


class BucketCodes:
    """The codes of a bucket on all units, in memory or in a temporary file.

    Args:
        store: The store of the codes.
        latents: The latents of the bucket.
        chunks: The chunks of each unit as (unit, chunks), in the order of the units.

    Raises:
        CorruptObjectError: A chunk of codes is damaged or gone.
        StoreFullError: The folder of temporary files has no space.
    """

    def __init__(
        self,
        store: ObjectStore,
        latents: range,
        chunks: Sequence[tuple[int, Sequence[CodesChunk]]],
    ) -> None:
        self.first = latents.start
        self.entries = sum(chunk.entries for _, parts in chunks for chunk in parts)
        self._chunks: list[tuple[int, int, Codes]] = []
        self.counts = np.zeros(len(latents), np.int64)
        try:
            self._read(store, latents.start, chunks)
        except OSError as exc:
            size = 8 * self.entries
            raise StoreFullError.of_temporary(f"{size:,} bytes of a bucket", exc) from exc

    def _read(
        self, store: ObjectStore, start: int, chunks: Sequence[tuple[int, Sequence[CodesChunk]]]
    ) -> None:
        is_large = self.entries > MOST_ENTRIES
        with tempfile.TemporaryFile() as spool:
            for unit, parts in chunks:
                for chunk in parts:
                    codes = read_codes(store, chunk)
                    first = chunk.first - start
                    self.counts[first : first + chunk.groups] += codes.counts
                    if is_large:
                        spool.write(codes.to_bytes())
                    else:
                        self._chunks.append((unit, first, codes))
            if is_large:
                self._chunks = list(_memory_mapped(spool, start, chunks))

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield ranges of the bucket's latents: one latent, or at most `MOST_ENTRIES` entries."""
        start = entries = 0
        for latent, count in enumerate(self.counts.tolist()):
            if latent > start and entries + count > MOST_ENTRIES:
                yield start, latent
                start, entries = latent, 0
            entries += count
        yield start, len(self.counts)

    def tiles(self, start: int, stop: int) -> Iterator[Tile]:
        """Yield the entries of a range in tiles of at most `MOST_ENTRIES`.

        Only a range of a single large latent has more than one tile.
        """
        waiting: list[tuple[int, int, Codes]] = []
        entries = 0
        for unit, first, codes in self._chunks:
            low, high = (min(max(n - first, 0), len(codes.counts)) for n in (start, stop))
            if low == high:
                continue
            skipped = int(codes.counts[:low].sum())
            counts = codes.counts[low:high]
            n = int(counts.sum())
            here = slice(skipped, skipped + n)
            for part in _parts(Codes(counts, codes.places[here], codes.acts[here])):
                if entries + len(part.acts) > MOST_ENTRIES:
                    yield self._merge(start, stop, waiting)
                    waiting, entries = [], 0
                waiting.append((unit, first + low - start, part))
                entries += len(part.acts)
        yield self._merge(start, stop, waiting)

    def _merge(self, start: int, stop: int, parts: list[tuple[int, int, Codes]]) -> Tile:
        """Merge parts by counting: the counts give the place of each entry."""
        counts = np.zeros(stop - start, np.int64)
        for _, first, codes in parts:
            counts[first : first + len(codes.counts)] += codes.counts
        n = int(counts.sum())
        units, rows, acts = np.empty(n, np.int32), np.empty(n, np.int32), np.empty(n, np.float32)
        free = counts.cumsum() - counts
        for unit, first, codes in parts:
            there = free[first : first + len(codes.counts)]
            here = codes.counts.cumsum(dtype=np.int64) - codes.counts
            places = np.repeat(there - here, codes.counts)
            places += np.arange(len(codes.acts))
            units[places], rows[places], acts[places] = unit, codes.places, codes.acts
            there += codes.counts
        return Tile(self.first + start, counts, units, rows, acts)


def _parts(codes: Codes) -> Iterator[Codes]:
    """Split codes that do not fit into a tile. They always belong to a single latent."""
    if len(codes.acts) <= MOST_ENTRIES:
        yield codes
        return
    assert len(codes.counts) == 1
    for start in range(0, len(codes.acts), MOST_ENTRIES):
        here = slice(start, start + MOST_ENTRIES)
        acts = codes.acts[here]
        yield Codes(np.array([len(acts)], np.int32), codes.places[here], acts)


def _memory_mapped(
    spool: IO[bytes], first: int, chunks: Sequence[tuple[int, Sequence[CodesChunk]]]
) -> Iterator[tuple[int, int, Codes]]:
    """Yield codes that were spooled to a file, as views of its memory map.

    The views stay valid after the file is closed. The file is mapped once, because one map per unit
    would take a file descriptor each.
    """
    spool.flush()
    numbers = np.asarray(np.memmap(spool, "<i4", "r"))
    at = 0
    for unit, parts in chunks:
        for chunk in parts:
            end = at + chunk.groups + 2 * chunk.entries
            yield unit, chunk.first - first, Codes.of(numbers[at:end], chunk)
            at = end


class Statistics(NamedTuple):
    """Statistics of each latent of a range."""

    firings: Int
    mean: NDArray[np.float64]
    largest: NDArray[np.float32]
    deciles: NDArray[np.float32]
    """Smallest activation of each decile except the lowest, [latents, 9]."""
    histogram: Int
    """Firings in each bar of the histogram, [latents, bars]."""


class ExampleColumns(NamedTuple):
    """Examples by latent: the largest activations first, then some of each decile, ascending."""

    latents: Int
    """Latent of each example, counted from the first of the range."""
    deciles: NDArray[np.int8]
    units: NDArray[np.int32]
    rows: NDArray[np.int32]
    acts: NDArray[np.float32]


class _Ranks(NamedTuple):
    """The ranks of examples among their latent's activations, in the order of `ExampleColumns`.

    Rank 0 is a latent's smallest activation. Among equal activations, later rows rank lower.
    """

    latents: Int
    deciles: NDArray[np.int8]
    ranks: Int


def summarise(
    codes: BucketCodes, start: int, stop: int, *, top: int, per_decile: int, seed: int
) -> tuple[Statistics, ExampleColumns]:
    """Compute the statistics of a range of latents, and choose their examples.

    Args:
        codes: The codes of the bucket.
        start: First latent of a range of `BucketCodes.ranges`, counted from the bucket's first.
        stop: Latent after the last.
        top: Number of largest activations that become examples.
        per_decile: Examples of each decile, for latents with more than `top` firings.
        seed: Seed of the choice within a decile.
    """
    counts = codes.counts[start:stop]
    first = codes.first + start
    wanted = _ranks(counts, first, top, per_decile, seed)
    if counts.sum() > MOST_ENTRIES:
        return _summarise_large(codes, start, counts, wanted)
    (tile,) = codes.tiles(start, stop)
    return _summarise_tile(tile, wanted)


def _ranks(counts: Int, first: int, top: int, per_decile: int, seed: int) -> _Ranks:
    """Choose examples by rank: the largest, and one from each of a decile's `per_decile` parts."""
    largest = np.minimum(counts, top)
    latents = np.repeat(np.arange(len(counts)), largest)
    nth = np.arange(len(latents)) - np.repeat(largest.cumsum() - largest, largest)
    found = [(latents, np.full(len(latents), TOP), counts[latents] - 1 - nth)]
    many = np.flatnonzero(counts > top)
    parts = DECILES * per_decile
    for part in range(parts):
        # rounded up as in `_decile_ranks`
        low, high = (-(-counts[many] * n // parts) for n in (part, part + 1))
        hashes = row_hashes(seed, DECILE_SAMPLING, first + many, np.full(len(many), part))
        hashes = (hashes >> np.uint64(40)).astype(np.int64)  # 24 bits, so the product fits into 63
        rank = low + (hashes * (high - low) >> 24)
        kept = high > low
        found.append((many[kept], np.full(kept.sum(), part // per_decile), rank[kept]))
    latents, deciles, ranks = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(latents, kind="stable")
    return _Ranks(latents[order], deciles[order].astype(np.int8), ranks[order])


def _summarise_tile(tile: Tile, wanted: _Ranks) -> tuple[Statistics, ExampleColumns]:
    counts, n = tile.counts, len(tile.acts)
    starts = counts.cumsum() - counts
    keys = tile.latents.astype(np.uint64) << np.uint64(_ACT_BITS)
    keys |= (tile.acts.view(np.uint32) >> np.uint32(_CUT_BITS)).astype(np.uint64)
    keys <<= np.uint64(_NUMBER_BITS)
    # numbers descend, so that of equal activations the first row sorts last and counts as larger
    keys |= np.arange(n - 1, -1, -1, dtype=np.uint64)
    keys.sort()
    order = (n - 1 - (keys & np.uint64(2**_NUMBER_BITS - 1)).astype(np.int64)) if n else starts
    keys >>= np.uint64(_NUMBER_BITS)

    def at(ranks: Int) -> NDArray[np.float32]:
        """Return the activations at `ranks` [latents, n]; 0 for latents that never fire."""
        places = np.minimum(starts[:, None] + ranks, max(0, n - 1))
        values = (
            _act(keys[places] & np.uint64(2**_ACT_BITS - 1))
            if n
            else np.zeros(ranks.shape, np.float32)
        )
        return np.where(counts[:, None] > 0, values, np.float32(0))

    largest = at((counts - 1).clip(0)[:, None])[:, 0]
    base = np.arange(len(counts), dtype=np.uint64)[:, None] << np.uint64(_ACT_BITS)
    edges = np.searchsorted(keys, base | _edge_bits(largest)) - starts[:, None]
    sums = np.zeros(len(counts))
    if n:
        alive = np.flatnonzero(counts)
        sums[alive] = np.add.reduceat(tile.acts.astype(np.float64), starts[alive])
    chosen = order[starts[wanted.latents] + wanted.ranks]
    columns = (column[chosen] for column in (tile.units, tile.rows, tile.acts))
    statistics = Statistics(
        counts,
        sums / counts.clip(1),
        largest,
        at(_decile_ranks(counts)),
        np.diff(edges, axis=1, prepend=0, append=counts[:, None]),
    )
    return statistics, ExampleColumns(wanted.latents, wanted.deciles, *columns)


def _summarise_large(
    codes: BucketCodes, latent: int, counts: Int, wanted: _Ranks
) -> tuple[Statistics, ExampleColumns]:
    """Summarize one large latent in two passes: count its values, then find the wanted ranks."""
    values = np.zeros(2**_ACT_BITS, np.int64)
    total = 0.0
    for tile in codes.tiles(latent, latent + 1):
        values += np.bincount(_bits(tile.acts), minlength=len(values))
        total += float(tile.acts.sum(dtype=np.float64))
    ends = values.cumsum()

    def bits_at(ranks: Int) -> Int:
        places: Int = np.searchsorted(ends, ranks, side="right")
        return places

    largest = _act(bits_at(counts - 1).astype(np.uint64))
    edges = (ends - values)[_edge_bits(largest).astype(np.int64)]
    bits = bits_at(wanted.ranks)
    # number of entries with the same value that come before the wanted one
    nth = ends[bits] - 1 - wanted.ranks
    units, rows = np.empty(len(bits), np.int32), np.empty(len(bits), np.int32)
    seen = np.zeros(len(values), np.int64)
    searched = np.zeros(len(values), np.bool_)
    searched[bits] = True
    for tile in codes.tiles(latent, latent + 1):
        of = _bits(tile.acts)
        places = np.flatnonzero(searched[of])
        order = places[np.argsort(of[places], kind="stable")]
        here = np.bincount(of[places], minlength=len(values))
        starts = here.cumsum() - here
        number = nth - seen[bits]
        there = np.flatnonzero((number >= 0) & (number < here[bits]))
        found = order[starts[bits[there]] + number[there]]
        units[there], rows[there] = tile.units[found], tile.rows[found]
        seen += here
    statistics = Statistics(
        counts,
        total / counts,
        largest,
        _act(bits_at(_decile_ranks(counts)).astype(np.uint64)),
        np.diff(edges, axis=1, prepend=0, append=counts[:, None]),
    )
    acts = _act(bits.astype(np.uint64))
    return statistics, ExampleColumns(wanted.latents, wanted.deciles, units, rows, acts)


def _decile_ranks(counts: Int) -> Int:
    """Return the rank at which each decile except the lowest starts, [latents, 9]."""
    last = (counts - 1).clip(0)[:, None]
    ranks: Int = np.minimum(-(-counts[:, None] * np.arange(1, DECILES) // DECILES), last)
    return ranks


def _edge_bits(largest: NDArray[np.float32]) -> NDArray[np.uint64]:
    """Return the bits of the lower edge of each bar except the first, [latents, 15]."""
    inner = np.arange(1, HISTOGRAM_BARS) / HISTOGRAM_BARS
    bits = (largest[:, None].astype(np.float64) * inner).astype(np.float32).view(np.uint32)
    bits >>= np.uint32(_CUT_BITS)
    exact = largest[:, None].astype(np.float64) * inner
    bits += _act(bits.astype(np.uint64)).astype(np.float64) < exact  # round up
    return bits.astype(np.uint64)


def _bits(acts: NDArray[np.float32]) -> Int:
    return (acts.view(np.uint32) >> np.uint32(_CUT_BITS)).astype(np.int64)


def _act(bits: NDArray[np.uint64]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << np.uint32(_CUT_BITS)).view(np.float32)
