"""Queue of numbered items that any number of workers share through an object store.

A worker claims an item so that no other worker does it too. Correctness does not depend on claims,
because the object that marks an item as done is created only once, by whichever worker is first. If
the store cannot create objects exclusively, there are no claims: worker i of n does the items i,
i + n, ...
"""

import json
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_sae.errors import ObjectNotFoundError, StoreError
from dist_sae.storage import UNMETERED, Meter, ObjectStore
from dist_sae.storage.keys import PAGE, NumberedKeys

logger = logging.getLogger(__name__)

LEASE_SECONDS = 180.0
POLL_SECONDS = 1.0
"""First pause while no item is free. Later pauses are longer if there are many workers."""
_LOG_EVERY_SECONDS = 30.0
_LOOK_TTL_SECONDS = 0.03
"""Time for which a worker relies on one look at the store, divided by the number of workers. So all
workers together look about 30 times a second. A worker leaves an item alone for this time after it
has seen another worker's claim on it. The time also limits the pauses of a wait, and the work that
is claimed at once."""
_MOST_AT_ONCE = 8
_MOST_REFUSED = 3  # refused claims after which the last look is out of date
_MOST_LEFTOVERS = 64


class Worker(NamedTuple):
    """Identity of a worker."""

    name: str
    """Unique name among live workers. Claims under this name are from an earlier life."""
    number: int = 0
    """Unique index of the worker, from 0. It matters only if the store has no claims."""
    of: int = 1
    """Number of workers. It decides how often each looks at the store, and, if the store has no
    claims, which share of the items each does."""


class QueueMetrics(NamedTuple):
    """Names of the metrics that a queue reports."""

    claimed: str
    """Gauge: items that this worker has claimed."""
    done: str
    """Gauge: items that are done, by any worker."""
    takeovers: str
    """Counter: expired claims of other workers that this worker took over."""
    waited_seconds: str
    """Counter: seconds waited, with the label `waited_for`."""
    others: str
    """Value of `waited_for` while other workers have claimed all remaining items."""
    limiters: str = ""
    """Value of `waited_for` while the limit holds the worker back; empty without a limit."""
    wait_seconds: str = ""
    """Gauge: seconds waited so far; empty for no gauge."""


class Work(NamedTuple):
    """Items of a queue, and where their claims and results are stored."""

    item: str
    """Word for an item in messages."""
    items: Sequence[int]
    """Numbers of the items, ascending."""
    claims: NumberedKeys
    """Keys of the claims."""
    done: NumberedKeys
    """Keys of the objects that mark items as done."""
    limit: Callable[[], tuple[int, str]] | None = None
    """Function that returns the first item that may not be started yet, and whom it waits for."""
    metrics: QueueMetrics | None = None


class WorkQueue:
    """Gives a worker items that are neither done nor claimed by a live worker, low numbers first.

    A claim expires `LEASE_SECONDS` after it was last renewed, by the store's clock.

    If many workers all tried to claim the lowest free item, all but one would be refused. So a
    worker draws from the lowest `spread` free items. Success shrinks `spread`, so with few workers
    it is soon the lowest item; every collision doubles it. A look at the store reads one page of
    claims and results, and only where the worker is about to claim. If items take little time, the
    worker claims several after one look.

    Args:
        store: Object store of claims and results.
        stopping: Event that ends every wait.
        meter: Receiver of the metrics of `work`.
        clock: Function that returns seconds, for pauses and for the age of a look.
    """

    def __init__(
        self,
        store: ObjectStore,
        work: Work,
        worker: Worker,
        stopping: threading.Event,
        meter: Meter = UNMETERED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._work = work
        self._worker = worker
        self._stopping = stopping
        self._meter = meter
        self._clock = clock
        self._items = np.asarray(work.items)
        self._share = None if store.exclusive else self._items % worker.of == worker.number
        # `_done` and `_held` are shared by the worker's threads, so use only atomic operations
        self._done = np.zeros(len(self._items), dtype=bool)
        self._held: set[int] = set()
        self.reserved: list[int] = []
        """Items that are claimed but that `take` has not returned yet."""
        self._claimed_until = np.zeros(len(self._items))  # another worker is assumed to do the item
        self._look_ttl_seconds = max(
            POLL_SECONDS, min(_LOOK_TTL_SECONDS * worker.of, LEASE_SECONDS / 6)
        )
        self._random = random.Random(worker.name)
        self._spread = 4 * (worker.of - 1) if store.exclusive else 0  # each soon has 4 claims
        self._limit = (-math.inf, "") if work.limit else (math.inf, "")
        self._item_seconds = math.inf
        self._longest = POLL_SECONDS  # upper limit of the next pause
        self._began = self._clock()
        self._renewing = threading.Lock()  # or a renewal could write a claim again after a release
        if store.exclusive:
            self._drop_leftover_claims()
        self._report_claimed()
        self.waited_seconds = 0.0
        """Time spent waiting for the limit and for other workers."""

    def take(self, *, wait: bool = True) -> int | None:
        """Claim an item and return it; return None if all are done or the worker should stop.

        Waits while the limit holds the worker back. Also waits while other workers do the remaining
        items, in case they die.

        Args:
            wait: If False, also return None while no item is free. A worker with unfinished items
                must not wait for others, because they may be waiting for it.
        """
        last_logged = self._clock()
        while not self._stopping.is_set():
            if self.reserved or self._reserve():
                self._longest = POLL_SECONDS
                return self.reserved.pop(0)
            if not wait or not self._open().any():
                return None
            free = self._free()
            held_back = len(free) > 0
            if held_back and self._clock() - last_logged > _LOG_EVERY_SECONDS:
                last_logged = self._clock()
                what = self._work.item, self._items[free[0]], self._limit[1]
                logger.warning("%s %d waits for %s", *what)
            pause = self._random.uniform(max(POLL_SECONDS, self._longest / 2), self._longest)
            self._longest = min(2 * self._longest, self._look_ttl_seconds)
            self._stopping.wait(pause)
            self._report_waited(pause, held_back=held_back)
        return None

    def wait_for_all(self) -> None:
        """Wait until all items are done or the worker should stop.

        Needed if the store has no claims: `take` then returns None once this worker's share is
        done.
        """
        last_logged = self._clock()
        while self.pending() and not self._stopping.is_set():
            for page in np.unique(self._items[~self._done] // PAGE):
                self._look(int(page))
            if self.pending() and self._clock() - last_logged > _LOG_EVERY_SECONDS:
                last_logged = self._clock()
                logger.warning(
                    "%s %d waits for another worker: %s has no conditional writes, so each of %d "
                    "workers does a fixed share",
                    *(self._work.item, min(self.left()), self._store.url, self._worker.of),
                )
            if self.pending():
                self._stopping.wait(self._look_ttl_seconds)
                self._report_waited(self._look_ttl_seconds, held_back=False)

    @contextmanager
    def renewed(self, is_alive: Callable[[], bool]) -> Iterator[None]:
        """Renew this worker's claims every third of a lease, in a separate thread.

        The thread is needed because fetching text or loading a model may outlast a lease.

        Args:
            is_alive: Function that returns whether the worker makes progress. A worker that hangs
                does not renew, so its claims expire.
        """
        over = threading.Event()

        def work() -> None:
            while not over.wait(LEASE_SECONDS / 3):
                try:
                    if is_alive():
                        self.renew()
                except StoreError as exc:  # the worker also gets this error, and ends
                    logger.warning("claims could not be renewed: %s", exc)

        thread = threading.Thread(target=work, name="claims", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(LEASE_SECONDS)  # limited, because the store may retry for longer

    def renew(self) -> None:
        """Renew all of this worker's claims."""
        with self._renewing:
            for item in sorted(self._held):
                self._write(item)

    def release(self, item: int, *, done: bool) -> None:
        """Release the claim on an item; `done` is False if the item is unfinished."""
        if done:
            seconds, self._began = self._clock() - self._began, self._clock()
            known = seconds if self._item_seconds == math.inf else self._item_seconds
            self._item_seconds = (known + seconds) / 2
        self._give_back(item, done=done)

    def release_all(self) -> None:
        """Release unfinished items, so that other workers need not wait for the lease to expire."""
        self.reserved.clear()
        for item in sorted(self._held):
            self._give_back(item, done=False)

    def pending(self) -> bool:
        """Return whether any items were unfinished at the last look."""
        return not self._done.all()

    def left(self) -> set[int]:
        """Return the items that were unfinished at the last look."""
        return set(self._items[~self._done].tolist())

    def done(self) -> int:
        """Return the number of items done, as far as this worker has seen."""
        return int(self._done.sum())

    def _open(self) -> NDArray[np.bool_]:
        """Mark unfinished items that this worker has not claimed; without claims, in its share."""
        is_open = ~self._done if self._share is None else self._share & ~self._done
        is_open[self._places(sorted(self._held))] = False
        return is_open

    def _free(self) -> NDArray[np.intp]:
        """Return the places of the open items that, as far as is known, nobody has claimed."""
        return np.flatnonzero(self._open() & (self._claimed_until <= self._clock()))

    def _reserve(self) -> bool:
        """Claim items to be handed out; return False if none is free within the limit."""
        if self._claim_some() or self._work.limit is None or not len(self._free()):
            return bool(self.reserved)
        # read the limit once per pause, since all waiting workers compete for the items it frees
        self._limit = self._work.limit()
        return self._claim_some()

    def _claim_some(self) -> bool:
        """Claim items within the last known limit; return False if none is free."""
        while len(free := self._within_limit(self._free())):
            page = int(self._items[free[self._draw(len(free))]]) // PAGE
            expired = self._look(page)
            free = self._within_limit(self._free())
            here = free[self._items[free] // PAGE == page].tolist()
            if not here:
                self._spread = min(2 * self._spread + 1, len(free))
            wanted, refused = self._at_once(len(free)), 0
            while here and len(self.reserved) < wanted and refused < _MOST_REFUSED:
                place = here.pop(self._draw(len(here)))
                item = int(self._items[place])
                if self._claim(item, may_be_expired=item in expired):
                    self._held.add(item)
                    self.reserved.append(item)
                    self._spread = 7 * self._spread // 8
                else:
                    refused += 1
                    self._claimed_until[place] = self._clock() + self._look_ttl_seconds
                    self._spread = min(2 * self._spread + 1, len(free))
            self._drop_done(page)
            if self.reserved:
                self.reserved.sort()
                self._report_claimed()
                return True
        return False

    def _drop_done(self, page: int) -> None:
        """Release items that another worker finished between the look and the claim."""
        key = self._work.done.key
        if len(self.reserved) > 1:
            done = set(self._work.done.numbers(self._store, page))
        else:
            done = {item for item in self.reserved if self._store.size(key(item)) is not None}
        for item in done.intersection(self.reserved):
            self.reserved.remove(item)
            self._give_back(item, done=True)

    def _within_limit(self, free: NDArray[np.intp]) -> NDArray[np.intp]:
        return free[self._items[free] < self._limit[0]]

    def _draw(self, n: int) -> int:
        """Draw one of n indices, among the first `spread` + 1."""
        return int(self._random.random() * min(self._spread + 1, n))

    def _at_once(self, n_free: int) -> int:
        """Return how many items to claim per look: work until the next one, up to a fair share."""
        work = math.ceil(self._look_ttl_seconds / max(self._item_seconds, 1e-9))
        busy = np.count_nonzero(self._claimed_until > self._clock())
        return max(1, min(work, _MOST_AT_ONCE, n_free // (int(busy) + 1)))

    def _claim(self, item: int, *, may_be_expired: bool) -> bool:
        """Claim an item, or take it over if its claim has expired; return whether that worked."""
        key = self._work.claims.key(item)
        if not self._store.exclusive or self._store.put(key, self._lease, if_absent=True):
            return True
        if not may_be_expired or item in self._claims(item // PAGE)[0]:  # another was faster
            return False
        self._write(item)  # two may take over at once; the item is done twice, which is harmless
        if self._work.metrics:
            self._meter.add(self._work.metrics.takeovers, 1)
        logger.warning(
            "took over %s %d, because its worker has not renewed its claim", self._work.item, item
        )
        return True

    def _look(self, page: int) -> set[int]:
        """Record which items of a page are claimed or done; return those with expired claims.

        Claims are read first. Otherwise an item that is finished in between would look free.
        """
        expired = set[int]()
        if self._store.exclusive:
            live, expired = self._claims(page)
            others = self._places(live - self._held)
            self._claimed_until[others] = self._clock() + self._look_ttl_seconds
        self._done[self._places(self._work.done.numbers(self._store, page))] = True
        if self._work.metrics:
            self._meter.set(self._work.metrics.done, self.done())
        return expired

    def _claims(self, page: int) -> tuple[set[int], set[int]]:
        """Return the items of a page with valid claims, and those with expired claims."""
        ages = self._work.claims.ages(self._store, page)
        live = {item for item, seconds in ages.items() if seconds < LEASE_SECONDS}
        return live, ages.keys() - live

    def _places(self, items: Iterable[int]) -> NDArray[np.intp]:
        """Return the places of these items in `Work.items`; unknown items are skipped."""
        wanted = np.fromiter(items, dtype=np.int64)
        places = np.searchsorted(self._items, wanted)
        known = places < len(self._items)
        known[known] = self._items[places[known]] == wanted[known]
        return places[known]

    def _give_back(self, item: int, *, done: bool) -> None:
        with self._renewing:
            if self._store.exclusive:
                self._store.delete(self._work.claims.key(item))
            if done:
                self._done[self._places([item])] = True
            self._held.discard(item)
        self._report_claimed()

    def _drop_leftover_claims(self) -> None:
        """Delete the claims of an earlier life of this worker.

        If there are many claims, they are left to expire, because every worker would read them all.
        """
        found = list(islice(self._work.claims.keys(self._store), _MOST_LEFTOVERS + 1))
        for key in found if len(found) <= _MOST_LEFTOVERS else ():
            try:
                is_leftover = self._store.get(key[0]) == self._lease
            except ObjectNotFoundError:
                continue
            if is_leftover:
                self._store.delete(key[0])

    def _write(self, item: int) -> None:
        if self._store.exclusive:
            self._store.put(self._work.claims.key(item), self._lease)

    @property
    def _lease(self) -> bytes:
        return json.dumps({"worker": self._worker.name}).encode()

    def _report_claimed(self) -> None:
        if self._work.metrics:
            self._meter.set(self._work.metrics.claimed, len(self._held))

    def _report_waited(self, seconds: float, *, held_back: bool) -> None:
        self.waited_seconds += seconds
        if names := self._work.metrics:
            if names.wait_seconds:
                self._meter.set(names.wait_seconds, self.waited_seconds)
            waited_for = names.limiters if held_back else names.others
            self._meter.add(names.waited_seconds, seconds, waited_for=waited_for)
