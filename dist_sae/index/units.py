"""Storing encoded units: codes by latent, the rows' origin, and a record of where both are."""

import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa
import torch
import xxhash
from numpy.typing import NDArray

from dist_sae.dictionaries.base import Dictionary
from dist_sae.distributed.mesh import Mesh
from dist_sae.index.codes import PAIRS_SAMPLING, Codes, hash_bound, row_hashes
from dist_sae.index.encode import Encoded
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
from dist_sae.storage import ObjectStore
from dist_sae.storage.records import seal


class UnitWriter:
    """Stores units in the background while the next ones are encoded. Its methods are collective.

    Each rank stores the codes of its own latents. Then the first rank stores the unit's record.

    Args:
        store: The store of runs.
        folder: The keys of the index.
        manifest: The manifest of the index.
        mesh: The ranks that share the dictionary.
        sealed: Called on the first rank, in a background thread, after a record is stored.
    """

    def __init__(
        self,
        store: ObjectStore,
        folder: IndexFolder,
        manifest: IndexManifest,
        mesh: Mesh,
        sealed: Callable[[UnitRecord], None],
    ) -> None:
        self._place = store, folder, manifest
        self._mesh = mesh
        self._sealed = sealed
        self._pool = ThreadPoolExecutor(2, "units")  # one for codes, one for the record
        self._writing: tuple[Encoded, Future[Written]] | None = None
        self._sealing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def put(self, unit: Encoded, sae: Dictionary) -> None:
        """Start to store a unit, once all ranks have stored the codes of the previous one.

        Args:
            unit: The unit.
            sae: The dictionary, or this rank's shard of it.
        """
        self._gather()
        self._writing = unit, self._pool.submit(write_unit, *self._place, sae, unit)

    def finish(self) -> None:
        """Wait until every unit is stored."""
        self._gather()
        self._wait()

    def _gather(self) -> None:
        """Wait until all ranks have stored their codes, then start to store the record."""
        if self._writing is None:
            return
        (unit, written), self._writing = self._writing, None
        parts = self._mesh.all_gather_objects(written.result(), Written)
        self._wait()
        if self._mesh.is_first:
            self._sealing = self._pool.submit(self._seal, unit, parts)

    def _wait(self) -> None:
        if self._sealing:
            self._sealing.result()

    def _seal(self, unit: Encoded, parts: "list[Written]") -> None:
        store, folder, manifest = self._place
        record = unit_record(manifest, unit, parts)
        store.put(folder.units.key(record.unit), seal(record), if_absent=True)
        self._sealed(record)


class Written(NamedTuple):
    """The objects of a unit that one rank has stored."""

    buckets: dict[int, CodesChunk]
    sample: CodesChunk | None
    origin: Stored | None
    """Table of the rows' origin, which only the first rank stores. None on the others."""


def write_unit(
    store: ObjectStore, folder: IndexFolder, manifest: IndexManifest, sae: Dictionary, unit: Encoded
) -> Written:
    """Store this rank's codes of a unit by bucket, and its codes of the sampled rows.

    The first rank also stores the origin of the rows.
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
    """Return the rows of a unit on which pairs are counted, in ascending order."""
    hashes = row_hashes(manifest.seed, PAIRS_SAMPLING, unit, np.arange(rows))
    return np.flatnonzero(hashes < hash_bound(manifest.pair_share))


def unit_record(manifest: IndexManifest, unit: Encoded, written: list[Written]) -> UnitRecord:
    """Build the record of a stored unit.

    Args:
        manifest: The manifest of the index.
        unit: The unit.
        written: The objects that each rank stored, in the order of the ranks.
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
