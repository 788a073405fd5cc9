"""Stage 1 of an index: encodes a unit, and stores its codes by latent.

With a dictionary sharded over ranks, each rank reads its share of a block's rows, all rows meet all
latents as in training, and each rank stores the codes of its own latents.
"""

import math
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa
import torch
import xxhash
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dist_sae.checkpoint.state import load_weights
from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.shard import SiteRows, SiteShard, read_block
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.axis import LatentAxis
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.normaliser import SiteNormalisers
from dist_sae.index.codes import (
    PAIRS_CHANCE,
    Codes,
    below,
    chances,
    rounded,
)
from dist_sae.index.layout import (
    ROWS,
    CodesChunk,
    IndexFolder,
    IndexManifest,
    Stored,
    UnitRecord,
    store_table,
    to_parquet,
)
from dist_sae.index.opened import Opened
from dist_sae.kernels import Entries
from dist_sae.kernels.choice import choose_kernels
from dist_sae.storage import ObjectStore

ENCODE_ROWS = 4096
"""Rows that are encoded at a time."""
_PADDED_TO = 64  # rows, so that the product rounds alike on 1, 2, 4 ... shards
_BLOCKS_AHEAD = 2
_MOST_READERS = 8


class Encoded(NamedTuple):
    """A unit after its encoding, with the codes of this rank's latents."""

    unit: int
    origin: tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]
    """Token, position and document of each row."""
    sums: tuple[float, float, int]
    """Squared error, squared distance from the mean and active latents, over all ranks."""
    latents: NDArray[np.int32]
    """This rank's latent of each entry, from 0; entries are sorted by row."""
    rows: NDArray[np.int32]
    acts: NDArray[np.float32]


_Block = dict[str, Future[SiteRows]]
"""A block of rows that is being read, by site."""


class _Begun(NamedTuple):
    """A unit whose first blocks are being read."""

    shards: dict[str, SiteShard]
    blocks: deque[_Block]


class Encoder:
    """Encodes units with a trained dictionary. Its `with` block ends the reading ahead.

    Args:
        sae: The dictionary, or this rank's shard of it.
        activations: The set, at the dictionary's sites.
        normalisers: The normalisers of these sites.
    """

    def __init__(
        self, sae: Dictionary, activations: ActivationSet, normalisers: SiteNormalisers
    ) -> None:
        self.sae = sae
        self._closed = threading.Event()
        self._activations = activations.until(self._closed)
        self._normalisers = normalisers
        self._height = math.lcm(_PADDED_TO, sae.axis.shards)
        readers = min(len(normalisers.of), _MOST_READERS)
        self._pool = ThreadPoolExecutor(1 + readers, "blocks")  # one thread may wait for a unit
        self._begun: dict[int, Future[_Begun]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)

    @torch.no_grad()
    def encode(
        self,
        unit: int,
        alive: Callable[[], None] = lambda: None,
        following: Callable[[], int | None] = lambda: None,
    ) -> Encoded:
        """Encode a unit. Collective.

        Args:
            unit: Number of the unit.
            alive: Called before each block.
            following: Called before the last block is encoded; returns the next unit, if it is
                known. That unit's first blocks are read meanwhile.

        Raises:
            ObjectNotFoundError: The unit does not exist.
            CorruptObjectError: A block is damaged, or was deleted.
        """
        begun = self._begun.pop(unit, None)
        shards, blocks = begun.result() if begun else self._begin(unit)
        device = self.sae.b_dec.device
        none = torch.empty(0, dtype=torch.int32)  # a unit may have no rows
        origins = [(none, none, none.long())]
        found, n_rows = [(none.to(device), none.to(device), none.to(device).float())], 0
        error = torch.zeros((), dtype=torch.float64, device=device)
        for sites in self._read(shards, blocks, following):
            alive()
            origins.append(next(iter(sites.values()))[1:])
            pieces = {site: torch.split(rows.acts, ENCODE_ROWS) for site, rows in sites.items()}
            for piece in zip(*pieces.values(), strict=True):
                acts = dict(zip(pieces, piece, strict=True))
                entries, more = self._encode(acts)
                error += more
                found.append((entries[0], entries[1] + n_rows, entries[2]))
                n_rows += len(piece[0])
        latents, rows, values = (
            torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True)
        )
        tokens, positions, documents = (
            torch.cat(parts).numpy() for parts in zip(*origins, strict=True)
        )
        sums = torch.stack([error, error.new_tensor(float(len(values)))])
        squared_error, active = self.sae.axis.total(sums).tolist()
        return Encoded(
            unit,
            (tokens, positions, documents),
            (squared_error, self._squared_total(shards, n_rows), int(active)),
            latents,
            rows,
            rounded(values),
        )

    def _encode(
        self, acts: Mapping[str, Tensor]
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Float[Tensor, ""]]:
        """Encode rows: this rank's entries, and the squared error of this rank's part of them."""
        sae, axis = self.sae, self.sae.axis
        scaled = self._normalisers.rows(acts, sae.b_dec.device)
        n = len(scaled.inputs)
        height = n + -n % self._height
        each = height // axis.shards
        own = slice(axis.shard * each, (axis.shard + 1) * each)
        x = functional.pad(scaled.inputs, (0, 0, 0, height - n))[own]
        codes = sae.encode(x)
        n_own = max(0, min(n - own.start, each))  # later rows are padding
        error = sae.decode(codes, x)[:n_own].sub_(scaled.targets[own])
        rows = Entries(codes.latents, codes.starts, len(sae.W_enc)).rows
        on = (codes.acts > 0) & (rows < n)
        latents, rows = codes.latents[on], rows[on]
        squares = torch.linalg.vector_norm(error, dim=1).double().square().sum()
        return (latents.int(), rows.int(), codes.acts[on].float()), squares

    def _squared_total(self, shards: Mapping[str, SiteShard], rows: int) -> float:
        """Sum of |y - mean|^2 over a unit's targets, from the sums in its manifest."""
        total = 0.0
        for site in self._normalisers.writes:
            scale, mean = self._normalisers.of[site].scale, self._normalisers.of[site].mean
            along = float(torch.tensor(shards[site].sum, dtype=torch.float64) @ mean)
            squares = scale**2 * shards[site].sum_squares
            total += squares - 2 * scale * along + rows * float(mean.square().sum())
        return total

    def _begin(self, unit: int) -> _Begun:
        """Find a unit's shards, and begin to read their first blocks."""
        shards = self._activations.shards(self._activations.manifest(unit))
        numbers = range(_n_blocks(shards))[:_BLOCKS_AHEAD]
        return _Begun(shards, deque(self._submit(shards, number) for number in numbers))

    def _submit(self, shards: Mapping[str, SiteShard], number: int) -> _Block:
        pool, store = self._pool, self._activations.store
        return {s: pool.submit(read_block, store, shard, number) for s, shard in shards.items()}

    def _read(
        self,
        shards: Mapping[str, SiteShard],
        ahead: deque[_Block],
        following: Callable[[], int | None],
    ) -> Iterator[dict[str, SiteRows]]:
        """Yield the blocks of all sites; reads ahead, at the end into the next unit."""
        n_blocks = _n_blocks(shards)
        for number in range(n_blocks):
            if number + _BLOCKS_AHEAD < n_blocks:
                ahead.append(self._submit(shards, number + _BLOCKS_AHEAD))
            block = {site: rows.result() for site, rows in ahead.popleft().items()}
            if number == n_blocks - 1 and (unit := following()) is not None:
                self._begun = {unit: self._pool.submit(self._begin, unit)}
            yield block


def _n_blocks(shards: Mapping[str, SiteShard]) -> int:
    return len(next(iter(shards.values())).blocks)


def open_encoder(
    opened: Opened, axis: LatentAxis, device: torch.device, stopping: threading.Event
) -> Encoder:
    """Load the dictionary of an index, or this rank's shard of it.

    Args:
        opened: The index.
        axis: This rank's place among those that share the dictionary.
        device: Device of the dictionary.
        stopping: Ends waits for units that are not produced yet.
    """
    run, normalisers = opened.run, opened.normalisers
    kernels = choose_kernels("auto", device)
    sae = build_sae(run.sae, normalisers.widths, axis, kernels).to(device)
    load_weights(sae, opened.checkpoint)
    activations = ActivationSet(
        opened.activations,
        opened.plan,
        run.sites,
        stopping,
        patience_seconds=float(run.timeouts.missing_seconds),
    )
    return Encoder(sae.eval(), activations, normalisers)


class Written(NamedTuple):
    """Places of a unit's objects that one rank has stored."""

    buckets: dict[int, CodesChunk]
    sample: CodesChunk | None
    origin: Stored | None
    """Table of the rows' origin; None on all ranks but the first, which stores it."""


def write_unit(
    store: ObjectStore, folder: IndexFolder, manifest: IndexManifest, sae: Dictionary, unit: Encoded
) -> Written:
    """Store this rank's codes of a unit, bucket after bucket, and those of its sampled rows.

    The first rank stores the origin of the rows as well.
    """
    first, n_local = sae.first_latent, len(sae.W_enc)
    order = torch.from_numpy(unit.latents).argsort(stable=True).numpy()
    rows, acts = unit.rows[order], unit.acts[order]
    counts = np.bincount(unit.latents, minlength=n_local).astype(np.int32)
    ends = np.concatenate([[0], counts.cumsum(dtype=np.int64)])
    codes = {}
    for bucket in range(manifest.n_buckets):
        latents = manifest.bucket(bucket)
        start, stop = (min(max(n - first, 0), n_local) for n in (latents.start, latents.stop))
        if start < stop:
            here = slice(ends[start], ends[stop])
            codes[bucket] = first + start, Codes(counts[start:stop], rows[here], acts[here])
    sampled = sampled_rows(manifest, unit.unit, len(unit.origin[0]))
    if manifest.pair_share:
        place = np.full(len(unit.origin[0]), -1)
        place[sampled] = np.arange(len(sampled))
        chosen = place[unit.rows] >= 0
        counts = np.bincount(place[unit.rows[chosen]], minlength=len(sampled)).astype(np.int32)
        codes[-1] = first, Codes(counts, unit.latents[chosen] + first, unit.acts[chosen])
    key = f"{folder.codes}{unit.unit:08d}-{uuid.uuid4().hex[:8]}-{first}.bin"
    chunks, data, offset = {}, [], 0
    for bucket, (start, part) in codes.items():
        data.append(part.to_bytes())
        chunks[bucket] = CodesChunk(
            key=key,
            first=start,
            groups=len(part.counts),
            offset=offset,
            bytes=len(data[-1]),
            entries=len(part.acts),
            xxh3=xxhash.xxh3_128_hexdigest(data[-1]),
        )
        offset += len(data[-1])
    store.put(key, b"".join(data))
    sample, origin = chunks.pop(-1, None), None
    if first == 0:
        table = pa.Table.from_arrays([pa.array(column) for column in unit.origin], schema=ROWS)
        origin = store_table(store, folder.rows(unit.unit), to_parquet(table))
    return Written(chunks, sample, origin)


def sampled_rows(manifest: IndexManifest, unit: int, rows: int) -> NDArray[np.int64]:
    """Rows of a unit on which pairs are counted, ascending."""
    chance = chances(manifest.seed, PAIRS_CHANCE, unit, np.arange(rows))
    return np.flatnonzero(chance < below(manifest.pair_share))


def unit_record(manifest: IndexManifest, unit: Encoded, written: list[Written]) -> UnitRecord:
    """Describe a unit that is stored.

    Args:
        written: Objects of all ranks, in the order of the ranks.
    """
    error, total, active = unit.sums
    rows = len(unit.origin[0])
    return UnitRecord(
        unit=unit.unit,
        rows=rows,
        squared_error=error,
        squared_total=total,
        active=active,
        origin=written[0].origin,
        buckets=tuple(
            tuple(part.buckets[bucket] for part in written if bucket in part.buckets)
            for bucket in range(manifest.n_buckets)
        ),
        sample=tuple(part.sample for part in written if part.sample),
        sampled_rows=len(sampled_rows(manifest, unit.unit, rows)) if manifest.pair_share else 0,
    )
