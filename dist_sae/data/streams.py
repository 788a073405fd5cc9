"""Canonical streams, which determine the rows of global batch b for any number of ranks.

Training unit u belongs to stream u mod V. In the first pass, a stream reads its units in plan
order, which is random and is also the order of production. Each later pass draws a new order.
`window_units` units at a time are merged row by row in a seeded random order. Each unit is read
front to back, because its rows were shuffled when it was written. Global batch b consists of rows
[b r, (b + 1) r) of every stream, r = batch_rows / V, one stream after the other. So the step alone
determines the position in the data, for any number of ranks: rank i of n takes the i-th of n equal
parts of the batch. It reads V / n neighboring streams, or shares a stream with other ranks.

The plan promises the same number of rows of each stream: its estimate for the shortest one. It does
not know which rows will be excluded by norm, so a stream may end a little early. The stream then
reads its last window again, merged in a new order, until the run has the promised rows. Rows read
again are counted, and limited to the possible error of the estimate: a twentieth of the rows, or
one document per pass if documents are few. The repetition follows from the stream's own manifests
alone, so it does not depend on the number of ranks and needs no unit that retention may have
deleted. Extra rows from longer streams would avoid it, but which streams are longer is known only
once every manifest exists.

Every site has the same rows in the same blocks, so a stream reads all of its sites together. Per
stream and site, memory holds `window_units` blocks, and as many again that are being fetched. The
next window is opened when half of the current one is taken, so it does not delay the first batch.
"""

import itertools
import logging
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.orders import permutation
from dist_sae.data.shard import UnitManifest, read_acts
from dist_sae.errors import DataExhaustedError

logger = logging.getLogger(__name__)

MOST_REPEATED_SHARE = 0.05
"""Largest error of a plan's estimate of a stream's rows, as a share of these rows."""


class StreamCursor(NamedTuple):
    """Position of a window in a stream. It depends only on the plan and the row."""

    data_pass: int
    first: int
    """Index of the window's first unit among the stream's units, in the order of the pass."""
    rows_before: int
    """Rows of the stream in all earlier windows."""


START = StreamCursor(0, 0, 0)


class _UnitReader:
    """Reads a unit's rows in order, at all sites together, and prefetches the next block."""

    def __init__(
        self, activations: ActivationSet, manifest: UnitManifest, row: int, pool: Executor
    ) -> None:
        self._store = activations.store
        self._shards = activations.shards(manifest)
        self.widths = {site: shard.d_in for site, shard in self._shards.items()}
        self._pool = pool
        self._block_rows = [block.rows for block in self._shards[activations.sites[0]].blocks]
        ends = np.cumsum(self._block_rows)
        self._number = int(np.searchsorted(ends, row, side="right"))
        before = int(ends[self._number - 1]) if self._number else 0
        self._next = self._fetch(self._number)
        self._acts: dict[str, Tensor] = {}
        self._row = row - before

    def put(self, rows: Mapping[str, NDArray[Any]], places: NDArray[np.int64]) -> None:
        """Write the next `len(places)` rows of each site to these places in its `rows`."""
        while len(places):
            if not self._acts:
                self._take_block()
            n = min(len(places), self._block_rows[self._number - 1] - self._row)
            for site, acts in self._acts.items():  # 7x faster than cat and index_select
                rows[site][places[:n]] = _whole_rows(acts[self._row : self._row + n])
            places = places[n:]
            self._row += n
            if self._row == self._block_rows[self._number - 1]:
                self._acts, self._row = {}, 0
                del acts  # or the block stays in memory while the next is fetched

    def _take_block(self) -> None:
        assert self._next, "read past the end of a unit"
        self._acts = {site: coming.result() for site, coming in self._next.items()}
        self._number += 1
        self._next = self._fetch(self._number)

    def _fetch(self, number: int) -> "dict[str, Future[Tensor]]":
        if number >= len(self._block_rows):
            return {}
        return {
            site: self._pool.submit(read_acts, self._store, shard, number)
            for site, shard in self._shards.items()
        }


def _whole_rows(acts: Float[Tensor, "rows d_site"]) -> NDArray[Any]:
    """View each row as one NumPy element of raw bytes, because NumPy has no bf16."""
    row_bytes = acts.shape[1] * acts.itemsize
    rows: NDArray[Any] = acts.view(torch.uint8).numpy().view(f"V{row_bytes}")[:, 0]
    return rows


_Window = tuple[StreamCursor, np.ndarray, list[_UnitReader]]


class Stream:
    """Reads a canonical stream, starting at any row.

    Args:
        number: Index of the stream, from 0 to V - 1.
        start: Index of the first row to read.
        max_passes: Maximum number of passes over the units.
        pool: Executor that fetches blocks.
        opener: Executor that opens the next window while the current one is read. It cannot be
            `pool`, because its threads may wait for units that do not exist yet.
        cursor: A window at or before `start`, which saves reading earlier manifests. Ignored if it
            may be the last window of a run with fewer passes, which that run read again: in this
            run, another window has that position.
    """

    cursor: StreamCursor
    """Window of the last row taken."""
    repeated_rows: int
    """Rows that were read again because the stream had ended."""

    def __init__(
        self,
        activations: ActivationSet,
        number: int,
        start: int,
        max_passes: int,
        pool: Executor,
        opener: Executor,
        cursor: StreamCursor = START,
    ) -> None:
        self._activations = activations
        self.repeated_rows = 0
        self._number = number
        self._max_passes = max_passes
        plan = activations.plan
        self._last = range(0, len(plan.stream_units(number)), plan.window_units)[-1]
        self._pool = pool
        self._opener = opener
        self._windows = self._open_windows(start, cursor)
        self._next: Future[_Window] | None = None
        self._order = np.empty(0, dtype=np.int64)
        self._next_when_left = 0
        self._readers: list[_UnitReader] = []
        self._open_next()

    def widths(self) -> dict[str, int]:
        """Return the width of the rows at each site."""
        self._ready()
        return self._readers[0].widths

    def put(self, acts: Mapping[str, Float[Tensor, "n d_site"]]) -> None:
        """Fill the tensors in `acts`, one per site, with the next rows.

        Raises:
            DataExhaustedError: The passes do not have that many rows.
        """
        rows = {site: _whole_rows(of_site) for site, of_site in acts.items()}
        left = len(next(iter(rows.values())))
        while left:
            self._ready()
            now, self._order = self._order[:left], self._order[left:]
            if self._next is None and len(self._order) <= self._next_when_left:
                self._open_next()
            for number, reader in enumerate(self._readers):
                reader.put(rows, np.flatnonzero(now == number))
            if self.cursor.data_pass >= self._max_passes:
                self.repeated_rows += len(now)
            rows = {site: of_site[len(now) :] for site, of_site in rows.items()}
            left -= len(now)

    def _ready(self) -> None:
        if not len(self._order):
            assert self._next is not None, "it is opened while rows are left"
            self.cursor, self._order, self._readers = self._next.result()
            self._next, self._next_when_left = None, len(self._order) // 2
            if self.cursor.data_pass == self._max_passes:
                logger.warning(
                    "stream %d ends after %d rows, fewer than planned, because more rows were "
                    "excluded; rereading its last window",
                    self._number,
                    self.cursor.rows_before,
                )

    def _open_next(self) -> None:
        self._next = self._opener.submit(next, self._windows)

    def _open_windows(self, start: int, cursor: StreamCursor) -> Iterator[_Window]:
        """Yield each window: its cursor, the index of each row's unit, and the units' readers.

        Rows before `start` and windows before `cursor` are skipped.
        """
        plan = self._activations.plan
        is_read_again = cursor.data_pass and cursor.first == self._last
        if is_read_again or cursor.data_pass >= self._max_passes:
            cursor = START
        rows_seen = cursor.rows_before
        for data_pass, first, units in self._in_order(cursor):
            window = [self._activations.manifest(unit) for unit in units]
            here = StreamCursor(data_pass, first, rows_seen)
            rows = sum(manifest.rows for manifest in window)
            over, most = data_pass - self._max_passes, rows
            if over >= 0:
                own = rows_seen - over * rows
                most = self._most_repeated(own) - over * rows
                if most <= 0 or not rows:
                    raise self._exhausted(own)
            rows_seen += rows
            if rows_seen <= start:
                continue
            skip = max(0, start - here.rows_before)
            ranks = np.repeat(np.arange(len(window)), [manifest.rows for manifest in window])
            merged = ranks[permutation(rows, plan.seed, 2, self._number, data_pass, first)][:most]
            starts = np.bincount(merged[:skip], minlength=len(window))
            readers = [
                _UnitReader(self._activations, manifest, int(begin), self._pool)
                for manifest, begin in zip(window, starts, strict=True)
            ]
            yield here, merged[skip:], readers

    def _most_repeated(self, own: int) -> int:
        """Return how many rows the stream may read again after its `own` rows."""
        plan = self._activations.plan
        if not plan.guarantees_rows:
            return 0
        document = math.ceil(plan.document_rows)  # the loss if the tokenizer refuses a document
        return max(int(MOST_REPEATED_SHARE * own), self._max_passes * document)

    def _exhausted(self, own: int) -> DataExhaustedError:
        plan, passes = self._activations.plan, f"{self._max_passes} passes"
        ends = (
            f"{self._activations.store.url}: stream {self._number} of {plan.streams} ends after "
            f"{own} rows ({'1 pass' if self._max_passes == 1 else passes}), so there are about "
            f"{own * plan.streams} rows in all"
        )
        remedy = "raise train.max_passes and start again"
        if again := self._most_repeated(own):
            ends += f"; {again} rows were reread, which is the limit: the plan promised too many"
            remedy = (
                "raise train.max_passes and start in a new run folder, because this one stores "
                "the number for train.rows: all; or create a set that excludes less "
                "(activations.exclude)"
            )
        return DataExhaustedError(f"{ends}; {remedy}")

    def _in_order(self, cursor: StreamCursor) -> Iterator[tuple[int, int, list[int]]]:
        """Yield (pass, first, units) of each window, starting at `cursor`.

        After all passes, the last window is repeated forever.
        """
        plan = self._activations.plan
        own = plan.stream_units(self._number)
        for data_pass in itertools.count(cursor.data_pass):
            at = cursor.first if data_pass == cursor.data_pass else 0
            over = data_pass >= self._max_passes
            seen = min(data_pass, self._max_passes - 1)
            order = (
                permutation(len(own), plan.seed, 1, self._number, seen) if seen else range(len(own))
            )
            for first in range(self._last if over else at, len(own), plan.window_units):
                yield data_pass, first, [own[i] for i in order[first : first + plan.window_units]]
