"""`dist-sae bench store`: writing and reading activations, against raw transfers.

Writing is `write_shard` (encode, put, checksums), one unit after the other. It is compared with
uploads of the same bytes, on S3 with the same part size and concurrency. Reading is the trainer's
`Loader` over the whole set. It is compared with reads of the same ranges by as many threads,
without decoding. Raw transfers use boto3 on S3, and plain system calls in a folder. Both are timed
alternately and compared by the ratio of each pair.
"""

import io
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from dist_sae.bench.measuring import compare, medians, scratch
from dist_sae.config import Run, validate_run
from dist_sae.config.data import SYNTHETIC_SITE
from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.corpus import Corpus
from dist_sae.data.loader import Loader
from dist_sae.data.make_plan import make_plan
from dist_sae.data.plan import PLAN_KEY, Plan, publish_plan
from dist_sae.data.shard import (
    DTYPES,
    ORIGIN_BYTES,
    SiteRows,
    SiteShard,
    UnitManifest,
    manifest_key,
    write_shard,
)
from dist_sae.errors import ConfigError
from dist_sae.storage import ObjectStore
from dist_sae.storage.local import LocalStore
from dist_sae.storage.records import seal

if TYPE_CHECKING:
    from dist_sae.storage.s3 import S3Store

_FETCHERS = 8  # threads, as many as in the Loader's pool
WRITE_BYTES = 16 * 2**20
"""Part size of raw writes to a folder. On S3 the store's own part size is used."""
_SITE = SYNTHETIC_SITE


class StoreShape(NamedTuple):
    """Sizes of the set: `units` units of `unit_rows` random rows, read in batches of `batch`."""

    d_in: int
    units: int
    unit_rows: int
    block_rows: int
    dtype: str
    batch: int
    streams: int
    window_units: int
    seed: int = 0


def bench_store(run: Run, shape: StoreShape, *, rounds: int, cached: bool) -> dict[str, Any]:
    """Time writing and reading a temporary set under `run.store.activations`, then delete it.

    Args:
        run: The run that `bench_run` returns.
        shape: Sizes of the set.
        rounds: Number of timed pairs, for writing and for reading.
        cached: Keep a folder's files in the page cache; otherwise they are read from disk.

    Returns:
        With the prefixes `write_` and `read_`: `seconds` of dist_sae and `raw_seconds`, medians
        over `rounds`; `ratio`, raw / dist_sae, with `ratio_low` and `ratio_high` (quartiles of the
        pairs); `rows_per_second` and `bytes_per_second` of dist_sae. `payload_bytes` counts
        activations, tokens, positions and documents; `overhead` is everything else that is stored,
        relative to the payload.
    """
    with scratch(run.store.activations, run.store.s3) as store:
        raw = RawFolder(store) if isinstance(store, LocalStore) else _RawS3(store)  # type: ignore[arg-type]
        index = Corpus(run.corpus, run.store.s3).index()
        plan = make_plan(run, index, np.full(len(index.spans), _document_rows(shape)))
        publish_plan(store, plan)
        shards = [_write_unit(store, plan, shape, unit) for unit in plan.train_units]
        sizes = {entry.key: entry.bytes for entry in store.entries()}
        writes = [_time_writing(number, store, raw, shape, shards) for number in range(rounds)]
        raw.drop_page_cache()
        _read_raw(raw, shards)  # warm-up: opens connections
        read, read_raw = partial(_read, store, plan, shape), partial(_read_raw, raw, shards)
        before = (lambda: None) if cached else raw.drop_page_cache
        reads = [_time_pair(number, read, read_raw, before) for number in range(rounds)]
    n_rows = shape.units * shape.unit_rows
    payload = n_rows * (shape.d_in * DTYPES[shape.dtype].itemsize + ORIGIN_BYTES)
    tars = sum(sizes[shard.key] for shard in shards)
    metadata = sizes[PLAN_KEY] + sum(sizes[manifest_key(unit)] for unit in plan.train_units)
    return {
        "url": run.store.activations,
        **shape._asdict(),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "payload_bytes": payload,
        "tar_bytes": tars,
        "metadata_bytes": metadata,
        "overhead": (tars + metadata) / payload - 1,
        **_summary("write", writes, n_rows, tars),
        **_summary("read", reads, n_rows, sum(b.bytes for s in shards for b in s.blocks)),
    }


def bench_run(shape: StoreShape, url: str, endpoint_url: str | None) -> Run:
    """Build a run over an activation set of this shape. It is never trained.

    Raises:
        ConfigError: The sizes are invalid.
    """
    run = validate_run(
        {
            "name": "bench",
            "store": {"activations": url, "runs": url, "s3": {"endpoint_url": endpoint_url}},
            "model": {"kind": "synthetic", "d_in": shape.d_in},
            "corpus": {
                "kind": "synthetic",
                "documents": shape.units * shape.unit_rows // _document_rows(shape) or 1,
                "document_rows": _document_rows(shape),
            },
            "activations": {
                "sites": [_SITE],
                "dtype": shape.dtype,
                "unit_rows": shape.unit_rows,
                "block_rows": shape.block_rows,
                "streams": shape.streams,
                "window_units": shape.window_units,
                "heldout_share": 0.0,
                "seed": shape.seed,
            },
            "sae": {"kind": "topk", "n_latents": 2, "k": 1, "auxk": 1},
            "train": {"rows": shape.batch, "batch_rows": shape.batch},
        },
        "bench store",
    )
    if shape.units < 1 or shape.units % shape.streams:
        raise ConfigError(
            f"bench store: --units {shape.units} is not a multiple of --streams {shape.streams}"
        )
    if shape.units * shape.unit_rows % shape.batch:
        raise ConfigError(
            f"bench store: --batch {shape.batch} does not divide the rows of all units, "
            f"{shape.units * shape.unit_rows}"
        )
    return run


class _RawS3:
    """Raw boto3 transfers, with the store's connections and settings."""

    def __init__(self, store: "S3Store") -> None:
        # imported here because boto3 takes 0.7 s to import; its own uploads are the baseline
        from boto3.s3.transfer import TransferConfig  # noqa: TID251

        from dist_sae.storage.s3 import CONCURRENT_PARTS, PART_BYTES

        self._client = store.client  # the same connections and settings
        self._bucket, self._prefix = store._bucket, store._prefix  # noqa: SLF001
        self._transfer = TransferConfig(
            multipart_threshold=PART_BYTES,
            multipart_chunksize=PART_BYTES,
            max_concurrency=CONCURRENT_PARTS,
        )

    def put(self, key: str, data: bytes) -> None:
        """Write durably, in concurrent parts."""
        self._client.upload_fileobj(
            io.BytesIO(data), self._bucket, self._prefix + key, Config=self._transfer
        )

    def get(self, key: str, start: int, stop: int) -> bytes:
        """Read the bytes [start, stop)."""
        answer = self._client.get_object(
            Bucket=self._bucket, Key=self._prefix + key, Range=f"bytes={start}-{stop - 1}"
        )
        data: bytes = answer["Body"].read()
        return data

    def drop_page_cache(self) -> None:
        """Do nothing, because a client cannot drop the server's caches."""


class RawFolder:
    """Raw file reads and writes, with the interface of `_RawS3`."""

    def __init__(self, store: LocalStore) -> None:
        self._root = store.root

    def put(self, key: str, data: bytes) -> None:
        path = self._root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        view = memoryview(data)
        with path.open("xb") as file, ThreadPoolExecutor(_FETCHERS) as pool:
            for _ in pool.map(
                lambda at: os.pwrite(file.fileno(), view[at : at + WRITE_BYTES], at),
                range(0, len(data), WRITE_BYTES),
            ):
                pass
            os.fsync(file.fileno())

    def get(self, key: str, start: int, stop: int) -> bytes:
        with (self._root / key).open("rb") as file:
            return os.pread(file.fileno(), stop - start, start)

    def drop_page_cache(self) -> None:
        """Drop the files from the page cache."""
        for path in self._root.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


_Raw = _RawS3 | RawFolder
"""Raw transfers to the same store, by the fastest plain method."""


def _document_rows(shape: StoreShape) -> int:
    return math.gcd(128, shape.unit_rows)


def _random_rows(shape: StoreShape, unit: int) -> SiteRows:
    """Draw a unit's rows in the dtype of a producer: the stored dtype, or fp32 for int8."""
    generator = torch.Generator().manual_seed(shape.seed + unit)
    acts = torch.randn(shape.unit_rows, shape.d_in, generator=generator)
    if shape.dtype != "int8":
        acts = acts.to(DTYPES[shape.dtype])
    number = torch.arange(shape.unit_rows, dtype=torch.int32)
    documents = unit * shape.unit_rows + number.long()
    return SiteRows(acts, number * 7 % 50_000, number % 256, documents)


def _write_unit(store: ObjectStore, plan: Plan, shape: StoreShape, unit: int) -> SiteShard:
    """Write a unit as a producer does: the shard, then the manifest."""
    rows = _random_rows(shape, unit)
    shard = write_shard(store, unit, _SITE, rows, shape.block_rows, shape.dtype)
    manifest = UnitManifest(
        plan=plan.hash,
        unit=unit,
        producer="bench",
        documents=sum(span.count for span in plan.units[unit]),
        rows=shape.unit_rows,
        excluded={},
        seconds={},
        sites={_SITE: shard},
    )
    store.put(manifest_key(unit), seal(manifest), if_absent=True)
    return shard


def _time_writing(
    number: int, store: ObjectStore, raw: _Raw, shape: StoreShape, shards: list[SiteShard]
) -> tuple[float, float]:
    """Time writing all units again, alternately. Returns (raw, dist_sae) seconds."""
    theirs = ours = 0.0
    for unit, shard in enumerate(shards):
        rows, tar = _random_rows(shape, unit), store.get(shard.key)
        again: list[SiteShard] = []

        def write(unit: int = unit, rows: SiteRows = rows, again: list[SiteShard] = again) -> None:
            again.append(write_shard(store, unit, _SITE, rows, shape.block_rows, shape.dtype))

        copy = f"raw/{unit:08d}.tar"
        other, one = _time_pair(number + unit, write, partial(raw.put, copy, tar))
        theirs, ours = theirs + other, ours + one
        assert again[0].sha256 == shard.sha256, "the same rows gave different bytes"
        store.delete(again[0].key)
        store.delete(copy)
    return theirs, ours


def _read(store: ObjectStore, plan: Plan, shape: StoreShape) -> None:
    """Read every batch, like a trainer whose steps take no time."""
    activation_set = ActivationSet(store, plan, (_SITE,))
    steps = range(shape.units * shape.unit_rows // shape.batch)
    with Loader(
        activation_set, rank=0, world=1, batch_rows=shape.batch, steps=steps, max_passes=1
    ) as loader:
        for batch in loader:
            assert batch.acts[_SITE].shape == (shape.batch, shape.d_in)


def _read_raw(raw: _Raw, shards: list[SiteShard]) -> None:
    places = [(shard.key, block) for shard in shards for block in shard.blocks]

    def get(place: int) -> int:
        key, block = places[place]
        return len(raw.get(key, block.offset, block.offset + block.bytes))

    with ThreadPoolExecutor(_FETCHERS) as pool:
        read = sum(pool.map(get, range(len(places))))
    assert read == sum(block.bytes for _, block in places), "short read"


def _time_pair(
    number: int,
    ours: Callable[[], None],
    theirs: Callable[[], None],
    before: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Time both, in an order that alternates with `number`. Returns (theirs, ours) seconds."""
    seconds = {}
    for work in (ours, theirs) if number % 2 == 0 else (theirs, ours):
        before()
        since = time.perf_counter()
        work()
        seconds[work] = time.perf_counter() - since
    return seconds[theirs], seconds[ours]


def _summary(
    way: str, pairs: list[tuple[float, float]], n_rows: int, n_bytes: int
) -> dict[str, float]:
    raw_seconds, seconds = medians(pairs)
    summary = {
        "seconds": seconds,
        "raw_seconds": raw_seconds,
        **compare(pairs),
        "rows_per_second": n_rows / seconds,
        "bytes_per_second": n_bytes / seconds,
    }
    return {f"{way}_{name}": value for name, value in summary.items()}
