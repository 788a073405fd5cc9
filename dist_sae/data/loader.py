"""Loader that assembles a rank's share of the global batches ahead of training."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.streams import START, Stream, StreamCursor
from dist_sae.errors import DataExhaustedError, Stopped

_BATCHES_AHEAD = 2
_FETCHERS = 8  # threads per site
_MOST_FETCHERS = 32  # size of the S3 client's connection pool
LOOK_UP_SECONDS = 2.0
"""Time between calls to `waiting` while no batch is ready."""


class Batch(NamedTuple):
    """This rank's part of a global batch: consecutive rows, stream by stream."""

    step: int
    acts: Mapping[str, Float[Tensor, "batch d_site"]]
    """Activations of the rows at each site; row i is the same token at all sites."""
    cursors: Mapping[int, StreamCursor]
    """Window of the last row taken, by stream."""
    repeated_rows: int
    """Rows that were read again because their stream had ended."""
    waited_seconds: float
    """Time that the trainer waited for this batch."""


class Loader:
    """Assembles this rank's share of the global batches in a thread, ahead of their use.

    Args:
        rank: Rank on the data axis.
        world: Size of the data axis; divides `batch_rows`. Ranks that share a stream each read all
            of it and use only their own rows.
        batch_rows: Rows of a global batch.
        steps: Steps to assemble batches for.
        max_passes: Maximum number of passes over the units.
        cursors: Windows at or before the first batch, by stream, from an earlier loader's
            `Batch.cursors`. Without them, a resumed run reads the manifest of every earlier unit.
        stream_rows: Rows of each stream that were taken before batch 0.
        pinned: Whether to use pinned memory, from which a GPU copies asynchronously.
    """

    def __init__(
        self,
        activations: ActivationSet,
        *,
        rank: int,
        world: int,
        batch_rows: int,
        steps: range,
        max_passes: int,
        cursors: Mapping[int, StreamCursor] | None = None,
        stream_rows: int = 0,
        pinned: bool = False,
    ) -> None:
        streams = activations.plan.streams
        assert batch_rows % world == 0, (batch_rows, world)
        assert batch_rows % streams == 0, (batch_rows, streams)
        self._steps = steps
        self._dtype, self._pinned = activations.plan.acts_dtype, pinned
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=_BATCHES_AHEAD)
        self._again: deque[Batch] = deque()
        self._end: BaseException | None = None
        self._closed = threading.Event()
        rows = batch_rows // streams
        own = _parts(rank, batch_rows // world, rows)
        # each unit of a stream's window has one block per site in flight
        fetchers = min(_FETCHERS * len(activations.sites), _MOST_FETCHERS)
        self._pool = ThreadPoolExecutor(max_workers=fetchers, thread_name_prefix="fetch")
        self._opener = ThreadPoolExecutor(max_workers=len(own), thread_name_prefix="open")
        self._stopping = activations.stopping
        activations = activations.with_closed_event(self._closed)
        at = {v: (cursors or {}).get(v, START) for v in own}

        def streams_from(step: int) -> list[Stream]:
            start = stream_rows + step * rows
            return [
                Stream(activations, v, start, max_passes, self._pool, self._opener, at[v])
                for v in own
            ]

        # not a daemon: a daemon thread inside torch when Python exits would abort the process
        self._thread = threading.Thread(
            target=self._assemble, args=(streams_from, own, rows), name="loader"
        )

    def __enter__(self) -> "Loader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        for threads in (self._opener, self._pool):
            threads.shutdown(wait=False, cancel_futures=True)

    def next(self, on_wait: Callable[[float], None] = lambda _: None) -> Batch | None:
        """Return the next batch; None after a stop or at the end of the data.

        The end of the data raises no error yet, so that a rank can notify the others first; see
        `raise_if_failed`.

        Args:
            on_wait: Callback for the seconds waited so far, called every `LOOK_UP_SECONDS`.
        """
        if self._again:
            return self._again.popleft()._replace(waited_seconds=0.0)
        since = time.monotonic()
        while True:
            try:
                item = self._queue.get(timeout=LOOK_UP_SECONDS)
            except queue.Empty:
                # after a stop, do not wait for the thread, whose store may retry for long
                if not self._stopping.is_set():
                    on_wait(time.monotonic() - since)
                    continue
                item = Stopped("stopped while waiting for data")
            break
        if isinstance(item, Batch):
            return item._replace(waited_seconds=time.monotonic() - since)
        if not isinstance(item, Stopped | DataExhaustedError):
            raise item
        self._end = item
        return None

    def put_back(self, batches: Iterable[Batch]) -> None:
        """Make `next` return these batches again; they must be the last ones taken."""
        self._again.extend(batches)

    @property
    def is_ready(self) -> bool:
        """True if `next` would return a batch without waiting."""
        ready = self._again or self._queue.queue  # only the caller's thread removes items
        return bool(ready) and isinstance(ready[0], Batch)

    @property
    def loaded(self) -> int:
        """Number of batches that are ready."""
        return len(self._again) + self._queue.qsize()

    def raise_if_failed(self) -> None:
        """Raise `DataExhaustedError` if the data has ended; after a stop, do nothing."""
        if isinstance(self._end, DataExhaustedError):
            raise self._end

    def __iter__(self) -> Iterator[Batch]:
        for _ in self._steps:
            batch = self.next()
            if batch is None:
                assert self._end is not None
                raise self._end
            yield batch

    def _assemble(
        self, streams_from: Callable[[int], list[Stream]], own: Mapping[int, range], rows: int
    ) -> None:
        try:
            streams, before = streams_from(self._steps.start), 0
            share = sum(map(len, own.values()))
            for step in self._steps:
                widths = streams[0].widths()
                acts = _empty(share, widths, self._dtype, pinned=self._pinned)
                first = 0
                for part, stream in zip(own.values(), streams, strict=True):
                    here = {site: of_site[first:][: len(part)] for site, of_site in acts.items()}
                    first += len(part)
                    if len(part) == rows:
                        stream.put(here)
                        continue
                    whole = _empty(rows, widths, self._dtype)
                    stream.put(whole)
                    for site, of_site in here.items():
                        of_site.copy_(whole[site][part.start : part.stop])
                cursors = {v: stream.cursor for v, stream in zip(own, streams, strict=True)}
                # of the ranks that share a stream, only the one with its first row counts
                counted = zip(own.values(), streams, strict=True)
                repeated = sum(s.repeated_rows for part, s in counted if not part.start) - before
                before += repeated
                if not self._put(Batch(step, acts, cursors, repeated, 0.0)):
                    return
        except BaseException as exc:  # handed to the trainer's thread, which raises it
            self._put(exc)

    def _put(self, item: Batch | BaseException) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False


def _parts(rank: int, share: int, rows: int) -> dict[int, range]:
    """Return the rows that a rank takes from each stream's part of a global batch, by stream.

    Args:
        share: Rows of the batch per rank.
        rows: Rows of the batch per stream.
    """
    begin, end = rank * share, (rank + 1) * share
    return {
        v: range(max(begin - v * rows, 0), min(end - v * rows, rows))
        for v in range(begin // rows, -(-end // rows))
    }


def _empty(
    rows: int, widths: Mapping[str, int], dtype: torch.dtype, *, pinned: bool = False
) -> dict[str, Tensor]:
    return {
        site: torch.empty(rows, width, dtype=dtype, pin_memory=pinned)
        for site, width in widths.items()
    }
