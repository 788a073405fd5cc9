"""The layout of a latent index in the store of runs.

    <run>/index/<name>/
      index.json                        written first: what is indexed, and how; a worker with
                                        other settings refuses to join
      rows/<unit>-<digest>.parquet      stage 1: token, position and document of a unit's rows
      codes/<unit>-<attempt>-<n>.bin    stage 1: codes of a unit by latent; deleted at the end
      units/<unit>.json                 written last for a unit: sums, and the places of its codes
      latents/<bucket>-...parquet       stage 2: one line per latent of a bucket
      examples/<bucket>-...parquet      stage 2: largest activations, and some of each decile
      postings/<bucket>-<piece>-...     stage 2: all activations, by latent, unit and row
      pairs/<bucket>-...parquet         stage 2: latents that are active together
      buckets/<bucket>.json             written last for a bucket: its tables

All JSON records are sealed. The name of a table contains the first digits of its checksum. A bucket
is a range of consecutive latents. A row is identified by its unit and its number within the unit,
as in the activation set. Activations are in the scale of the checkpoint (multiplied by the
normaliser's factor) and rounded to 11 significant bits.
"""

import hashlib
import io
import logging
from collections.abc import Iterable
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import field_validator

from dist_sae.config import Run
from dist_sae.config.index import IndexConfig
from dist_sae.errors import CorruptObjectError, ObjectNotFoundError
from dist_sae.storage import ObjectStore
from dist_sae.storage.keys import NumberedKeys
from dist_sae.storage.records import READS, Key, Record, Some, read_record

logger = logging.getLogger(__name__)

HISTOGRAM_BARS = 16
"""Number of equal bars in a latent's histogram, from 0 to its largest activation."""
DECILES = 10
TOP = -1
"""Value of `decile` for an example that is one of the largest activations."""
_BUCKETS = 64  # most buckets, hence most workers of stage 2; memory does not depend on it
LEAST_LATENTS = 512
"""Fewest latents in a bucket, unless the dictionary has fewer or it is the last bucket."""


class IndexManifest(Record):
    """The content of `index.json`: what is indexed, and how."""

    schema_version: Literal[1] = 1
    name: str
    run: str
    created_by: str
    step: int
    checkpoint: str
    """Digest of the checkpoint."""
    plan: str
    """Hash of the plan."""
    site: str
    """The first site that the dictionary reads."""
    scale: float
    """Factor by which the site's activations are multiplied before they are encoded."""
    writes: tuple[str, ...] = ()
    """Sites that the dictionary writes; empty if there is only one."""
    compared: bool = True
    """Whether row i of W_dec is all that latent i writes. If not, latents have no nearest latents,
    since rows cannot be compared."""
    n_latents: int
    bucket_latents: int
    """Number of latents in a bucket. The last bucket may have fewer."""
    units: tuple[int, ...]
    """Units to index, ascending."""
    deleted: tuple[int, ...] = ()
    """Units of the plan that were deleted before the index began (`store.retention`)."""
    planned_rows: int
    """Estimated number of rows in the units."""
    settings: dict[str, Any]
    """The `index` section of the run file, except the settings of the workers."""
    seed: int
    head: str | None = None
    """Digest of the head that output tokens are computed with; empty if there are no output tokens.
    None in an index of an earlier version, where each worker uses the head of its own model."""

    @field_validator("settings")
    @classmethod
    def _filled(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Fill settings that are newer than the index with their defaults."""
        return IndexConfig().deciding() | settings

    @property
    def n_buckets(self) -> int:
        """Number of buckets."""
        return -(-self.n_latents // self.bucket_latents)

    def bucket(self, number: int) -> range:
        """Return the latents of a bucket."""
        first = number * self.bucket_latents
        return range(first, min(first + self.bucket_latents, self.n_latents))

    @property
    def postings_share(self) -> float:
        """Share of the rows whose activations are stored as postings."""
        kept = self.settings["postings"]
        return float({"all": 1.0, "none": 0.0}.get(kept, kept))

    @property
    def pair_share(self) -> float:
        """Share of the rows on which pairs are counted."""
        return min(1.0, int(self.settings["pairs"]) / max(1, self.planned_rows))


def bucket_latents(n_latents: int) -> int:
    """Return the number of latents per bucket for a dictionary of `n_latents`."""
    return min(n_latents, max(LEAST_LATENTS, -(-n_latents // _BUCKETS)))


class Stored(Record):
    """A stored object, with its size and checksum."""

    key: Key
    bytes: int
    sha256: str


class CodesChunk(Record):
    """A chunk of a unit's codes: bytes `[offset, offset + bytes)` of an object. See `Codes`."""

    key: Key
    first: int
    """First latent of the chunk."""
    groups: int
    offset: int
    bytes: int
    entries: int
    xxh3: str


class UnitRecord(Record):
    """The content of `units/<unit>.json`: stage 1's sums over a unit, and where its codes are."""

    schema_version: Literal[1] = 1
    unit: int
    rows: int
    deleted: bool = False
    """Whether retention deleted the unit before it was encoded. A deleted unit has no rows."""
    squared_error: float = 0.0
    """Sum of |y - y_hat|^2 over the rows, in the scale of the checkpoint."""
    squared_total: float = 0.0
    """Sum of |y - mean|^2 over the rows, with the mean of the normaliser."""
    active: int = 0
    """Number of active latents, summed over the rows."""
    origin: Stored | None = None
    """Table of the rows' origin, with the schema `ROWS`."""
    buckets: tuple[tuple[CodesChunk, ...], ...] = ()
    """Codes of each bucket, with a chunk from each rank that has latents of the bucket."""
    sample: tuple[CodesChunk, ...] = ()
    """Codes of the rows on which pairs are counted, with a chunk from each rank."""
    sampled_rows: int = 0


class Piece(Record):
    """One of the postings tables of a bucket."""

    stored: Stored
    first: int
    """First latent of the piece."""
    last: int
    """Last latent of the piece. The next piece may start with the same latent."""
    entries: int


class BucketRecord(Record):
    """The content of `buckets/<bucket>.json`: the tables of a bucket."""

    schema_version: Literal[1] = 1
    bucket: int
    entries: int
    never_fired: int
    """Number of latents without an entry."""
    latents: Stored
    examples: Stored
    postings: tuple[Piece, ...]
    pairs: Stored | None
    pair_rows: int = 0
    """Number of rows on which pairs were counted."""


class IndexFolder:
    """The keys of an index.

    Args:
        run: Name of the run.
        name: Name of the index.
    """

    def __init__(self, run: str, name: str) -> None:
        self.prefix = f"{run}/index/{name}/"
        self.manifest = f"{self.prefix}index.json"
        self.units = NumberedKeys(f"{self.prefix}units/")
        self.buckets = NumberedKeys(f"{self.prefix}buckets/")
        self.unit_claims = NumberedKeys(f"{self.prefix}claims/units/")
        self.bucket_claims = NumberedKeys(f"{self.prefix}claims/buckets/")
        self.codes = f"{self.prefix}codes/"

    def read(self, store: ObjectStore, kind: type[Some], number: int) -> Some:
        """Read the record of a unit or bucket. Raises the errors of `read_record`."""
        keys = self.units if issubclass(kind, UnitRecord) else self.buckets
        return read_record(kind, store, keys.key(number), within=self.prefix)

    def rows(self, unit: int) -> str:
        """Return the key of the origins of a unit's rows, without digest and extension."""
        return f"{self.prefix}rows/{unit:08d}"

    def table(self, name: str, bucket: int) -> str:
        """Return the key of a bucket's table, without digest and extension."""
        return f"{self.prefix}{name}/{bucket:08d}"

    def piece(self, bucket: int, number: int) -> str:
        """Return the key of a piece of a bucket's postings, without digest and extension."""
        return f"{self.prefix}postings/{bucket:08d}-{number:06d}"


def index_name(run: Run, step: int) -> str:
    """Return the name of the index of a step."""
    return run.index.name or f"step-{step:08d}"


def list_indexes(runs: ObjectStore, run: str) -> list[str]:
    """List the indexes of a run, sorted by name. Default names sort by step."""
    there = runs.folders(f"{run}/index/")
    return [name for name in there if runs.size(IndexFolder(run, name).manifest) is not None]


def read_manifest(runs: ObjectStore, folder: IndexFolder) -> IndexManifest:
    """Read the manifest of an index.

    Raises:
        ObjectNotFoundError: No worker has begun the index.
        CorruptObjectError: The manifest is damaged, or its schema is of another version of
            dist-sae.
    """
    remedy = f"delete {runs.url}/{folder.prefix} and index again, or use another index.name"
    return read_record(IndexManifest, runs, folder.manifest, remedy)


ROWS = pa.schema([("token", pa.int32()), ("position", pa.int32()), ("document", pa.int64())])
"""Schema of `rows/`, in the order of the unit's rows."""
LATENTS = pa.schema(
    [
        ("latent", pa.int32()),
        ("firings", pa.int64()),
        ("density", pa.float64()),
        ("mean", pa.float32()),  # mean activation on the rows where it fires
        ("max", pa.float32()),
        ("deciles", pa.list_(pa.float32(), DECILES - 1)),  # smallest activation of deciles 1 to 9
        ("histogram", pa.list_(pa.int64(), HISTOGRAM_BARS)),
        ("decoder_norm", pa.float32()),
        ("encoder_norm", pa.float32()),
        ("encoder_bias", pa.float32()),
        ("nearest", pa.list_(pa.int32())),  # latents with the closest decoder directions
        ("nearest_cosine", pa.list_(pa.float32())),
        ("top_tokens", pa.list_(pa.int32())),  # tokens whose logits the latent raises most
        ("top_logits", pa.list_(pa.float32())),
        ("bottom_tokens", pa.list_(pa.int32())),
        ("bottom_logits", pa.list_(pa.float32())),
    ]
)
"""Schema of `latents/`, with all latents of the bucket in ascending order. `mean`, `max`, `deciles`
and `histogram` are 0 for a latent that never fires."""
NORMS = pa.field("norms", pa.list_(pa.float32()))
"""Additional column of `latents/` if several sites are written: the length of each site's part of
the decoder row, in the order of `IndexManifest.writes` and in the scale of the checkpoint."""
EXAMPLES = pa.schema(
    [
        ("latent", pa.int32()),
        ("decile", pa.int8()),  # from 0, the smallest tenth; -1: one of the largest activations
        ("act", pa.float32()),
        ("unit", pa.int32()),
        ("row", pa.int32()),
        ("document", pa.int64()),
        ("position", pa.int32()),
        ("token", pa.int32()),
    ]
)
"""Schema of `examples/`, sorted by latent. A latent's largest activations come first, in descending
order (ties by unit and row). Then come some of each decile, in ascending order."""
POSTINGS = pa.schema(
    [("latent", pa.int32()), ("unit", pa.int32()), ("row", pa.int32()), ("act", pa.float32())]
)
"""Schema of `postings/`, sorted by latent, unit and row."""
PAIRS = pa.schema(
    [
        ("latent", pa.int32()),
        ("other", pa.int32()),
        ("count", pa.int32()),  # rows on which both are active
        ("product", pa.float32()),  # product of both activations, summed over the rows
        ("phi", pa.float32()),  # phi coefficient of being active, see `coactive.py`
    ]
)
"""Schema of `pairs/`, sorted by latent, phi (descending), count (descending) and other."""


def to_parquet(table: pa.Table, group_rows: int = 131_072, **encodings: str) -> bytes:
    """Encode a table as Parquet with zstd. The same table always gives the same bytes.

    Args:
        table: The table.
        group_rows: Rows per row group, which is the smallest part that is read.
        encodings: Encodings of the columns that do not use dictionary encoding.
    """
    stream = io.BytesIO()
    plain = [name for name in table.column_names if name not in encodings]
    pq.write_table(
        table,
        stream,
        row_group_size=group_rows,
        compression="zstd",
        compression_level=1,
        use_dictionary=[
            name for name in plain if not pa.types.is_list(table.schema.field(name).type)
        ],
        column_encoding=encodings or None,
        store_schema=False,
        write_page_checksum=True,  # a table that is read in parts cannot be checked by its sha256
    )
    return stream.getvalue()


def store_table(store: ObjectStore, stem: str, data: bytes) -> Stored:
    """Store a table under a key that contains its digest, unless it exists already.

    Two attempts with the same content share one object, and two with different content never
    overwrite each other.

    Args:
        store: The store of runs.
        stem: The key, without digest and extension.
        data: The table as Parquet.
    """
    sha256 = hashlib.sha256(data).hexdigest()
    stored = Stored(key=f"{stem}-{sha256[:8]}.parquet", bytes=len(data), sha256=sha256)
    is_new = store.put(stored.key, data, if_absent=True)
    if not is_new and hashlib.sha256(store.get(stored.key)).hexdigest() != sha256:
        store.put(stored.key, data)  # the existing object is damaged
    return stored


def read_stored(store: ObjectStore, stored: Stored) -> bytes:
    """Read an object and verify its checksum.

    Raises:
        CorruptObjectError: The object does not match its checksum, or is gone.
    """
    for _ in range(READS):
        try:
            data = store.get(stored.key)
        except ObjectNotFoundError as exc:
            raise CorruptObjectError(
                "is gone; run `dist-sae index --repair`", url=store.url, key=stored.key
            ) from exc
        if hashlib.sha256(data).hexdigest() == stored.sha256:
            return data
    raise CorruptObjectError(
        "does not match its checksum; run `dist-sae index --repair`", url=store.url, key=stored.key
    )


def read_table(
    store: ObjectStore, stored: Stored, columns: Iterable[str] | None = None
) -> pa.Table:
    """Read a whole table, or some of its columns, and verify its checksum."""
    data = pa.BufferReader(read_stored(store, stored))
    return pq.ParquetFile(data).read(None if columns is None else list(columns), use_threads=False)


TABLES = ("rows", "latents", "examples", "postings", "pairs")
"""The folders of tables."""
