"""Building and storing the tables of a bucket."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist_sae.index.coactive import Sample
from dist_sae.index.codes import (
    POSTINGS_SAMPLING,
    hash_bound,
    row_hashes,
)
from dist_sae.index.layout import (
    EXAMPLES,
    LATENTS,
    NORMS,
    POSTINGS,
    BucketRecord,
    IndexFolder,
    IndexManifest,
    Piece,
    Stored,
    UnitRecord,
    read_table,
    store_table,
    to_parquet,
)
from dist_sae.index.merge import BucketCodes, ExampleColumns, Statistics, Tile, summarise
from dist_sae.storage import ObjectStore

GROUP_ROWS = {"latents": 2048, "examples": 32_768, "pairs": 32_768}
"""Rows per row group of each table. A latent's page reads one row group per table, about half a
megabyte in all."""
_KEPT_ROWS = 2**24  # most rows whose origin is cached, 16 bytes each
_ORIGIN = ("document", "position", "token")


class Origins:
    """Token, position and document of rows. Recently read units are cached.

    Args:
        store: The store of runs.
        records: Records of the index's units.
    """

    def __init__(self, store: ObjectStore, records: Iterable[UnitRecord]) -> None:
        self._store = store
        self._tables: dict[int, Stored] = {}
        largest = 1
        for record in records:
            if record.origin:
                self._tables[record.unit] = record.origin
                largest = max(largest, record.rows)
        self._read = lru_cache(_KEPT_ROWS // largest)(self._read_unit)

    def find(self, units: NDArray[np.int32], rows: NDArray[np.int32]) -> list[NDArray[Any]]:
        """Return the document, position and token of each of some rows."""
        columns: list[NDArray[Any]] = [
            np.empty(len(units), EXAMPLES.field(name).type.to_pandas_dtype()) for name in _ORIGIN
        ]
        order = np.argsort(units, kind="stable")
        numbers, starts = np.unique(units[order], return_index=True)
        for unit, here in zip(numbers.tolist(), np.split(order, starts[1:]), strict=False):
            for column, values in zip(columns, self._read(unit), strict=True):
                column[here] = values[rows[here]]
        return columns

    def _read_unit(self, unit: int) -> list[NDArray[Any]]:
        table = read_table(self._store, self._tables[unit])
        return [table[name].to_numpy() for name in _ORIGIN]


def build_bucket(
    store: ObjectStore,
    folder: IndexFolder,
    manifest: IndexManifest,
    records: Iterable[UnitRecord],
    bucket: int,
    weights: Mapping[str, pa.Array],
    origins: Origins,
    sample: Sample | None,
    alive: Callable[[], None] = lambda: None,
) -> BucketRecord:
    """Build and store the tables of a bucket.

    Args:
        store: The store of runs.
        folder: The keys of the index.
        manifest: The manifest of the index.
        records: The records of the index's units.
        bucket: Number of the bucket.
        weights: Columns of `LATENTS` that depend on the dictionary alone.
        origins: Origins of the index's rows.
        sample: The rows on which pairs are counted; None omits the table of pairs.
        alive: Called before each piece of work.

    Raises:
        CorruptObjectError: A chunk of codes or a table of rows is damaged or gone.
    """
    latents = manifest.bucket(bucket)
    rows, chunks = 0, []
    for record in records:
        rows += record.rows
        if record.buckets:
            chunks.append((record.unit, record.buckets[bucket]))
    codes = BucketCodes(store, latents, chunks)
    statistics: list[Statistics] = []
    examples: list[tuple[int, ExampleColumns]] = []
    pieces: list[Piece] = []
    numbers = itertools.count()
    for start, stop in codes.ranges():
        alive()
        found, chosen = summarise(
            codes,
            start,
            stop,
            top=manifest.settings["examples"],
            per_decile=manifest.settings["decile_examples"],
            seed=manifest.seed,
        )
        statistics.append(found)
        examples.append((latents.start + start, chosen))
        if manifest.postings_share:
            for tile in codes.tiles(start, stop):
                alive()
                pieces += _postings(store, folder, manifest, bucket, tile, numbers)
    firings = Statistics(*map(np.concatenate, zip(*statistics, strict=True)))
    tables = {
        "latents": _latents(latents, firings, rows, weights),
        "examples": _examples(origins, examples),
    }
    if sample is not None:
        tables["pairs"] = sample.pairs(latents)
    stored = {
        name: store_table(store, folder.table(name, bucket), to_parquet(table, GROUP_ROWS[name]))
        for name, table in tables.items()
    }
    return BucketRecord(
        bucket=bucket,
        entries=codes.entries,
        never_fired=int((codes.counts == 0).sum()),
        latents=stored["latents"],
        examples=stored["examples"],
        postings=tuple(pieces),
        pairs=stored.get("pairs"),
        pair_rows=sample.rows if sample else 0,
    )


def _postings(
    store: ObjectStore,
    folder: IndexFolder,
    manifest: IndexManifest,
    bucket: int,
    tile: Tile,
    numbers: "Iterator[int]",
) -> list[Piece]:
    """Store a tile's entries, on the sampled rows if postings are a share, as a piece."""
    columns = [(tile.latents + tile.first).astype(np.int32), tile.units, tile.rows, tile.acts]
    if manifest.postings_share < 1:
        hashes = row_hashes(manifest.seed, POSTINGS_SAMPLING, tile.units, tile.rows)
        kept = hashes < hash_bound(manifest.postings_share)
        columns = [column[kept] for column in columns]
    if not len(columns[0]):
        return []
    table = pa.Table.from_arrays(list(map(pa.array, columns)), schema=POSTINGS)
    data = to_parquet(table, row="DELTA_BINARY_PACKED", act="BYTE_STREAM_SPLIT")
    stored = store_table(store, folder.piece(bucket, next(numbers)), data)
    first, last = int(columns[0][0]), int(columns[0][-1])
    return [Piece(stored=stored, first=first, last=last, entries=len(columns[0]))]


def _latents(
    latents: range, found: Statistics, rows: int, weights: Mapping[str, pa.Array]
) -> pa.Table:
    numbers: dict[str, NDArray[Any]] = {
        "latent": np.arange(latents.start, latents.stop),
        "firings": found.firings,
        "density": found.firings / max(1, rows),
        "mean": found.mean,
        "max": found.largest,
        "deciles": found.deciles,
        "histogram": found.histogram,
    }
    schema = LATENTS.append(NORMS) if NORMS.name in weights else LATENTS
    columns = [
        _column(numbers[field.name], field.type) if field.name in numbers else weights[field.name]
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _column(values: NDArray[np.generic], type_: pa.DataType) -> pa.Array:
    if not pa.types.is_fixed_size_list(type_):
        return pa.array(values.astype(type_.to_pandas_dtype()), type_)
    flat = pa.array(values.ravel(), type_.value_type)
    return pa.FixedSizeListArray.from_arrays(flat, type=type_)


def _examples(origins: Origins, examples: Sequence[tuple[int, ExampleColumns]]) -> pa.Table:
    found = ExampleColumns(
        *map(np.concatenate, zip(*(chosen for _, chosen in examples), strict=True))
    )
    firsts = np.repeat([first for first, _ in examples], [len(c.acts) for _, c in examples])
    columns = [
        (found.latents + firsts).astype(np.int32),
        found.deciles,
        found.acts,
        found.units,
        found.rows,
        *origins.find(found.units, found.rows),
    ]
    return pa.Table.from_arrays(list(map(pa.array, columns)), schema=EXAMPLES)
