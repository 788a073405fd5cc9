"""Queries of a complete latent index.

Reading a latent's page is cheap: of each table, only the row group with the latent is read.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist_sae.checkpoint.layout import Checkpoint
from dist_sae.errors import ConfigError, LatentNotFoundError, NoIndexError
from dist_sae.index.codes import POSTINGS_SAMPLING, hash_bound, row_hashes
from dist_sae.index.latent_table import LatentTable
from dist_sae.index.layout import (
    NORMS,
    PAIRS,
    POSTINGS,
    ROWS,
    TOP,
    BucketRecord,
    IndexFolder,
    IndexManifest,
    Stored,
    UnitRecord,
    list_indexes,
    read_manifest,
    read_table,
)
from dist_sae.storage import ObjectStore

_OPEN_TABLES = 64
"""Number of tables cached in memory, each with one row group and its footer (or, for a small table,
all of its bytes). Also the number of units whose row origins are cached."""


class Firing(NamedTuple):
    """One activation of a latent that the index stores as an example."""

    decile: int
    """Decile of the latent's activations, from 0 (smallest); -1 for the largest activations."""
    act: float
    unit: int
    row: int
    document: int
    position: int
    """Position of the token in its document."""
    token: int


class NearestLatent(NamedTuple):
    """A latent whose decoder direction is close to another latent's."""

    latent: int
    cosine: float


class CoactiveLatent(NamedTuple):
    """A latent that is often active together with another, counted on `Index.pair_rows` rows."""

    latent: int
    rows: int
    """Number of rows on which both are active."""
    product: float
    """Product of both activations, summed over these rows."""
    phi: float
    """Phi coefficient of the two latents' being active; see `coactive.py`."""


class TokenEffect(NamedTuple):
    """A token whose logit a latent changes."""

    token: int
    logit: float
    """Change of the logit per unit of activation, in the scale of the checkpoint."""


class LatentPage(NamedTuple):
    """Everything that an index stores about a latent, except its postings."""

    latent: int
    firings: int
    density: float
    """Firing frequency: the share of rows on which the latent fires."""
    mean: float
    """Mean activation over the firings. `mean`, `max`, `deciles` and `histogram` are 0 if the
    latent never fires."""
    max: float
    deciles: tuple[float, ...]
    """Smallest activation of each of the deciles 1 to 9."""
    histogram: tuple[int, ...]
    """Firings by activation, in equal bars from 0 to `max`."""
    decoder_norm: float
    encoder_norm: float
    encoder_bias: float
    nearest: tuple[NearestLatent, ...]
    """Latents with the closest decoder directions, nearest first; empty if the index has none."""
    top_tokens: tuple[TokenEffect, ...]
    """Tokens whose logits the latent raises most; empty if the index has no output tokens."""
    bottom_tokens: tuple[TokenEffect, ...]
    """Tokens whose logits the latent lowers most; empty if the index has no output tokens."""
    examples: tuple[Firing, ...]
    """Examples: the largest activations first, then some of each decile."""
    coactive: tuple[CoactiveLatent, ...]
    """Coactive latents by descending phi; empty if the index has no pairs."""
    norms: Mapping[str, float]
    """Length of the decoder row's part at each site, in the scale of the checkpoint; empty if only
    one site is written."""

    @property
    def profile(self) -> dict[str, float]:
        """Each written site's share of the sum of `norms`."""
        total = sum(self.norms.values()) or 1.0
        return {site: norm / total for site, norm in self.norms.items()}

    @property
    def largest(self) -> tuple[Firing, ...]:
        """The examples with the largest activations, in descending order."""
        return tuple(example for example in self.examples if example.decile == TOP)


class Index:
    """A complete latent index.

    Every object that is read whole is checked against its sha256. An object above 1 MiB is read in
    parts if only one latent is needed. Then its pages are checked against their CRC-32, but the
    footer, which contains their offsets, has no checksum.

    Args:
        runs: The store of runs.
        run: Name of the run.
        name: Name of the index; None takes the complete index of the latest step, and the newest if
            that step has several.
        step: Step to which the choice is limited if `name` is None.

    Raises:
        NoIndexError: The index does not exist, or is not complete.
        CorruptObjectError: The index is damaged, or its schema is of another version of dist-sae.
    """

    def __init__(
        self, runs: ObjectStore, run: str, name: str | None = None, *, step: int | None = None
    ) -> None:
        self._store = runs
        self.folder, self.manifest = _find(runs, run, name, step)
        self.place = f"{runs.url}/{self.folder.prefix.rstrip('/')}"
        """Path or URL of the index."""
        self._record = lru_cache(maxsize=None)(self._read_bucket)
        self.origins = lru_cache(_OPEN_TABLES)(self._read_origins)
        self._table = lru_cache(_OPEN_TABLES)(lambda stored: LatentTable(runs, stored))

    @property
    def store(self) -> ObjectStore:
        """The store of runs."""
        return self._store

    @property
    def n_latents(self) -> int:
        """Number of latents of the dictionary."""
        return self.manifest.n_latents

    def latent(self, latent: int) -> LatentPage:
        """Read a latent's page.

        Raises:
            LatentNotFoundError: The dictionary has no such latent.
            CorruptObjectError: A table is damaged.
        """
        record = self._bucket_of(latent)
        tables = [record.latents, record.examples, *([record.pairs] if record.pairs else [])]
        with ThreadPoolExecutor(len(tables)) as pool:
            found = list(pool.map(lambda stored: self._rows(stored, latent), tables))
        row = found[0].to_pylist()[0]
        nearest = zip(row.pop("nearest"), row.pop("nearest_cosine"), strict=True)
        top = zip(row.pop("top_tokens"), row.pop("top_logits"), strict=True)
        bottom = zip(row.pop("bottom_tokens"), row.pop("bottom_logits"), strict=True)
        return LatentPage(
            deciles=tuple(row.pop("deciles")),
            histogram=tuple(row.pop("histogram")),
            nearest=tuple(NearestLatent(*pair) for pair in nearest),
            top_tokens=tuple(TokenEffect(*pair) for pair in top),
            bottom_tokens=tuple(TokenEffect(*pair) for pair in bottom),
            examples=_firings(found[1]),
            coactive=_coactive(found[2] if record.pairs else PAIRS.empty_table()),
            norms=dict(zip(self.manifest.writes, row.pop(NORMS.name, ()), strict=True)),
            **row,
        )

    def examples(self, latent: int) -> tuple[Firing, ...]:
        """Read a latent's examples: the largest activations, then some of each decile.

        Raises the errors of `latent`.
        """
        return _firings(self._rows(self._bucket_of(latent).examples, latent))

    def neighbours(
        self, latent: int
    ) -> tuple[tuple[NearestLatent, ...], tuple[CoactiveLatent, ...]]:
        """Read a latent's nearest latents by decoder direction, and its most coactive latents.

        Raises the errors of `latent`.
        """
        page = self.latent(latent)
        return page.nearest, page.coactive

    def postings(self, latent: int) -> Iterator[pa.Table]:
        """Yield all activations of a latent, in tables of `POSTINGS`, by unit and row.

        The first table is empty, so that every latent has at least one table. If `index.postings`
        is a share, only the activations on a sample of the rows are stored
        (`manifest.postings_share`).

        Raises:
            LatentNotFoundError: The dictionary has no such latent.
            CorruptObjectError: A table is damaged.
            ConfigError: The index stores no postings.
        """
        record = self._bucket_of(latent)
        self.check_postings()
        yield POSTINGS.empty_table()  # a latent that never fires has no postings
        for piece in record.postings:
            if piece.first <= latent <= piece.last:
                yield from self._table(piece.stored).of(latent)

    def bucket_postings(self, bucket: int) -> Iterator[pa.Table]:
        """Yield all activations of a bucket's latents, piece by piece, by latent, unit and row.

        Raises:
            ConfigError: The index stores no postings.
            CorruptObjectError: A table is damaged.
        """
        self.check_postings()
        for piece in self._record(bucket).postings:
            yield read_table(self._store, piece.stored)

    def bucket_pairs(self, bucket: int) -> pa.Table:
        """Read the coactive pairs of a bucket's latents, as a `PAIRS` table.

        Raises:
            ConfigError: The index counts no pairs.
            CorruptObjectError: The table is damaged.
        """
        record = self._record(bucket)
        if record.pairs is None:
            raise ConfigError(
                f"{self.place}: has no coactive latents (index.pairs: 0); build an index with "
                f"index.pairs above 0 under another index.name"
            )
        return read_table(self._store, record.pairs)

    def has_postings(self, unit: int, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return whether the activations on each of these rows are stored; see `postings`."""
        share = self.manifest.postings_share
        if share == 1:
            return np.ones(len(rows), np.bool_)
        return row_hashes(self.manifest.seed, POSTINGS_SAMPLING, unit, rows) < hash_bound(share)

    def latents(self, columns: Iterable[str] | None = None) -> Iterator[pa.Table]:
        """Yield the table of all latents (`LATENTS`, or some of its columns), bucket by bucket."""
        for bucket in range(self.manifest.n_buckets):
            yield read_table(self._store, self._record(bucket).latents, columns)

    def all_examples(self, columns: Iterable[str] | None = None) -> Iterator[pa.Table]:
        """Yield the examples of all latents (`EXAMPLES`), bucket by bucket."""
        for bucket in range(self.manifest.n_buckets):
            yield read_table(self._store, self._record(bucket).examples, columns)

    def _read_origins(self, unit: int) -> pa.Table:
        """Read token, position and document of a unit's rows, as a `ROWS` table."""
        record = self.folder.read(self._store, UnitRecord, unit)
        return read_table(self._store, record.origin) if record.origin else ROWS.empty_table()

    @cached_property
    def firings(self) -> NDArray[np.int64]:
        """Number of firings of each latent, [n_latents]."""
        parts = [table["firings"].to_numpy() for table in self.latents(["firings"])]
        return np.concatenate(parts)

    @cached_property
    def rows(self) -> int:
        """Number of indexed rows; 0 if no latent fires."""
        densest = self.latent(int(self.firings.argmax()))
        return round(densest.firings / densest.density) if densest.firings else 0

    def denser_than(self, page: LatentPage) -> float:
        """Return the share of latents that fire on fewer rows than this one."""
        return float(np.mean(self.firings < page.firings))

    @property
    def pair_rows(self) -> int:
        """Number of rows on which coactive latents were counted."""
        return self._record(0).pair_rows

    def check_postings(self) -> None:
        """Check that the index stores postings.

        Raises:
            ConfigError: The index stores no postings.
        """
        if not self.manifest.postings_share:
            raise ConfigError(
                f"{self.place}: has no postings (index.postings: none); build an index with "
                f"postings under another index.name"
            )

    def check_all_postings(self, caller: str) -> None:
        """Check that the index stores all postings, not a share.

        Args:
            caller: Name of the caller for the error. The caller would mistake a missing posting for
                an activation of 0.

        Raises:
            ConfigError: The index stores no postings, or only a share.
        """
        self.check_postings()
        if self.manifest.postings_share < 1:
            raise ConfigError(
                f"{self.place}: has only a share of the postings (index.postings), and {caller} "
                f"would count missing postings as 0; build an index with all postings under "
                f"another index.name"
            )

    def _bucket_of(self, latent: int) -> BucketRecord:
        if not 0 <= latent < self.n_latents:
            raise LatentNotFoundError(
                f"latent {latent}: {self.place} has latents 0 to {self.n_latents - 1}"
            )
        return self._record(latent // self.manifest.bucket_latents)

    def _read_bucket(self, bucket: int) -> BucketRecord:
        return self.folder.read(self._store, BucketRecord, bucket)

    def _rows(self, stored: Stored, latent: int) -> pa.Table:
        return pa.concat_tables(self._table(stored).of(latent))


def index_of(runs: ObjectStore, run: str, checkpoint: Checkpoint) -> Index:
    """Open the index of a checkpoint.

    Raises:
        NoIndexError: The step has no complete index, or it is of another checkpoint of this step.
        CorruptObjectError: The index is damaged, or its schema is of another version of dist-sae.
    """
    index = Index(runs, run, step=checkpoint.step)
    if index.manifest.checkpoint != checkpoint.digest:
        raise NoIndexError(
            f"{index.place}: belongs to another checkpoint; set a different index.name"
        )
    return index


def _find(
    runs: ObjectStore, run: str, name: str | None, step: int | None
) -> tuple[IndexFolder, IndexManifest]:
    there = list_indexes(runs, run)
    place = f"{runs.url}/{run}"
    if not there:
        raise NoIndexError(f"{place}: has no latent index yet; run `dist-sae index`")
    if name is not None and name not in there:
        raise NoIndexError(f"{place}: has no index {name}; it has: {', '.join(there)}")
    found = []
    for one in there if name is None else [name]:
        folder = IndexFolder(run, one)
        manifest = read_manifest(runs, folder)
        if name is not None or step in (None, manifest.step):
            ages = {entry.key: entry.age_seconds for entry in runs.entries(folder.manifest)}
            found.append((-manifest.step, ages.get(folder.manifest, 0.0), folder, manifest))
    if not found:
        raise NoIndexError(f"{place}: has no latent index of step {step} yet; run `dist-sae index`")
    incomplete = []
    for _, _, folder, manifest in sorted(found, key=lambda each: each[:2]):
        missing = set(range(manifest.n_buckets)) - set(folder.buckets.numbers(runs))
        if not missing:
            return folder, manifest
        done = manifest.n_buckets - len(missing)
        incomplete.append(
            f"{runs.url}/{folder.prefix.rstrip('/')}: is not complete, {done} of "
            f"{manifest.n_buckets} buckets are done; run `dist-sae index` to continue"
        )
    raise NoIndexError(incomplete[0])


def _firings(table: pa.Table) -> tuple[Firing, ...]:
    columns = (table[name].to_pylist() for name in Firing._fields)
    return tuple(map(Firing, *columns))


def _coactive(table: pa.Table) -> tuple[CoactiveLatent, ...]:
    columns = (table[name].to_pylist() for name in ("other", "count", "product", "phi"))
    return tuple(map(CoactiveLatent, *columns))
