"""A queue of numbered work that any number of workers share through a store.

Workers claim items, so that none does what another does. Correctness does not rest on claims: the
object that marks an item as done is created once, whoever comes first. A store that cannot create
exclusively has no claims: worker i of n does the items i, i + n, ...
"""

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from dist_sae.errors import ObjectNotFoundError, StoreError
from dist_sae.storage import UNMETERED, Meter, ObjectStore
from dist_sae.storage.own import PAGE, NumberedKeys

logger = logging.getLogger(__name__)

LEASE_SECONDS = 180.0
POLL_SECONDS = 1.0
"""Pause before looking again while no item is free."""
_SAY_EVERY_SECONDS = 30.0


class Worker(NamedTuple):
    """A worker among the others."""

    name: str
    """Unique among live workers. Claims under it are from an earlier life of this one."""
    number: int = 0
    """From 0, unique."""
    of: int = 1
    """Number of workers. This and `number` matter where a store has no claims."""


class QueueMetrics(NamedTuple):
    """Names of the metrics that a queue keeps."""

    claimed: str
    """Gauge: items in hand."""
    done: str
    """Gauge: items done, whoever did them."""
    takeovers: str
    """Counter."""
    waited_seconds: str
    """Counter, with the label `waited_for`."""
    others: str
    """`waited_for` while other workers have all that is left in hand."""
    limiters: str = ""
    """`waited_for` while the limit holds the worker back; empty without a limit."""
    wait_seconds: str = ""
    """Gauge: seconds waited so far; empty for none."""


class Work(NamedTuple):
    """Numbered work."""

    item: str
    """Word for an item, for messages."""
    items: Sequence[int]
    """Numbers of the items."""
    claims: NumberedKeys
    """Keys of the claims."""
    done: NumberedKeys
    """Keys of the objects that mark items as done."""
    limit: Callable[[], tuple[int, str]] | None = None
    """Gives the first item that may not be begun yet, and for whom it waits."""
    metrics: QueueMetrics | None = None


class WorkQueue:
    """Hands a worker the lowest item that is neither done nor claimed by a live worker.

    A claim lives as long as it is renewed; the store's clock tells its age.

    Args:
        store: Where claims and results lie.
        stopping: Ends every wait.
        meter: Takes the metrics of `work`.
    """

    def __init__(
        self,
        store: ObjectStore,
        work: Work,
        worker: Worker,
        stopping: threading.Event,
        meter: Meter = UNMETERED,
    ) -> None:
        self._store = store
        self._work = work
        self._worker = worker
        self._stopping = stopping
        self._meter = meter
        # both are shared by the worker's threads: single set operations only
        self._pending = set(work.items)
        self._held: set[int] = set()
        self._renewing = threading.Lock()  # a claim that is given back must not be written again
        if store.exclusive:
            self._drop_left_overs()
        self._say_held()
        self.waited_seconds = 0.0
        """For the limit and for other workers."""

    def take(self, *, wait: bool = True) -> int | None:
        """Claim an item; None when all are done or the worker is to stop.

        While other workers have all that is left in hand, it waits, to take over should they die.
        It waits for the limit as well.

        Args:
            wait: Else None while nothing is free, too. A worker that still has something in hand
                must not wait for others, which might wait for it.
        """
        said = time.monotonic()
        while not self._stopping.is_set():
            limit, limiter = self._work.limit() if self._work.limit else (math.inf, "")
            claimed = self.claimed()
            for page in sorted({item // PAGE for item in self._mine() if item < limit}):
                self._look(page)
                for item in sorted(self._mine() - claimed):
                    if item // PAGE == page and item < limit and self._claim(item):
                        self._held.add(item)
                        self._say_held()
                        if self._store.size(self._work.done.key(item)) is None:
                            return item
                        self.release(item, done=True)  # finished since it was looked for
            mine = self._mine()
            if not mine or not wait:
                return None
            held_back = min(mine) >= limit
            if held_back and time.monotonic() - said > _SAY_EVERY_SECONDS:
                said = time.monotonic()
                logger.warning("%s %d waits for %s", self._work.item, min(mine), limiter)
            self._stopping.wait(POLL_SECONDS)
            self._say_waited(POLL_SECONDS, held_back=held_back)
        return None

    def wait_for_all(self) -> None:
        """Wait for the shares of other workers, where a store has no claims, or until it stops."""
        said = time.monotonic()
        while self._pending and not self._stopping.is_set():
            for page in sorted({item // PAGE for item in self._pending}):
                self._look(page)
            if self._pending and time.monotonic() - said > _SAY_EVERY_SECONDS:
                said = time.monotonic()
                logger.warning(
                    "%s %d waits for another worker: %s cannot create exclusively, so each of %d "
                    "workers has a share",
                    self._work.item,
                    min(self._pending),
                    self._store.url,
                    self._worker.of,
                )
            if self._pending:
                self._stopping.wait(POLL_SECONDS)
                self._say_waited(POLL_SECONDS, held_back=False)

    @contextmanager
    def renewed(self, lives: Callable[[], bool]) -> Iterator[None]:
        """Renew the claims in hand every third of their lease, in a thread of its own.

        Fetching text, loading a model or a batch may take longer than a lease.

        Args:
            lives: Whether the worker makes progress; the claims of one that hangs run out.
        """
        over = threading.Event()

        def work() -> None:
            while not over.wait(LEASE_SECONDS / 3):
                try:
                    if lives():
                        self.renew()
                except StoreError as exc:  # the worker meets it, too, and ends by it
                    logger.warning("claims are not renewed: %s", exc)

        thread = threading.Thread(target=work, name="claims", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(LEASE_SECONDS)  # the store may be patient for longer

    def renew(self) -> None:
        """Renew the claims in hand."""
        with self._renewing:
            for item in sorted(self._held):
                self._write(item)

    def release(self, item: int, *, done: bool) -> None:
        """Give an item back."""
        with self._renewing:
            if self._store.exclusive:
                self._store.delete(self._work.claims.key(item))
            if done:
                self._pending.discard(item)
            self._held.discard(item)
        self._say_held()

    def release_all(self) -> None:
        """Give back what was claimed and not done, so that others need not wait for the lease."""
        for item in sorted(self._held):
            self.release(item, done=False)

    def pending(self) -> bool:
        """Tell whether items were missing at the last look."""
        return bool(self._pending)

    def left(self) -> set[int]:
        """Items that were missing at the last look."""
        return set(self._pending)

    def done(self) -> int:
        """Number of items done, as far as this worker has seen."""
        return len(self._work.items) - len(self._pending)

    def claimed(self) -> set[int]:
        """Items that live workers have in hand."""
        if not self._store.exclusive:
            return set()
        return {
            int(key["number"])
            for key, entry in self._work.claims.entries(self._store)
            if entry.age_seconds < LEASE_SECONDS
        }

    def _mine(self) -> set[int]:
        """Items to do that are not in hand; without claims, of this worker's share."""
        left = self._pending - self._held
        if self._store.exclusive:
            return left
        return {item for item in left if item % self._worker.of == self._worker.number}

    def _claim(self, item: int) -> bool:
        """Claim an item whose claim is missing or has run out."""
        key = self._work.claims.key(item)
        if not self._store.exclusive or self._store.put(key, self._lease, if_absent=True):
            return True
        if item in self.claimed():  # another was faster
            return False
        self._write(item)  # two may take over at once: work done twice, and nothing worse
        if self._work.metrics:
            self._meter.add(self._work.metrics.takeovers, 1)
        logger.warning(
            "%s %d: taken over; its worker has not renewed its claim", self._work.item, item
        )
        return True

    def _look(self, page: int) -> None:
        """Note which items of a page are done."""
        for item in self._work.done.numbers(self._store, page):
            self._pending.discard(item)
        if self._work.metrics:
            self._meter.set(self._work.metrics.done, self.done())

    def _drop_left_overs(self) -> None:
        """Delete the claims of an earlier life of this worker."""
        for key in list(self._work.claims.keys(self._store)):
            try:
                left_over = self._store.get(key[0]) == self._lease
            except ObjectNotFoundError:
                continue
            if left_over:
                self._store.delete(key[0])

    def _write(self, item: int) -> None:
        if self._store.exclusive:
            self._store.put(self._work.claims.key(item), self._lease)

    @property
    def _lease(self) -> bytes:
        return json.dumps({"worker": self._worker.name}).encode()

    def _say_held(self) -> None:
        if self._work.metrics:
            self._meter.set(self._work.metrics.claimed, len(self._held))

    def _say_waited(self, seconds: float, *, held_back: bool) -> None:
        self.waited_seconds += seconds
        if names := self._work.metrics:
            if names.wait_seconds:
                self._meter.set(names.wait_seconds, self.waited_seconds)
            waited_for = names.limiters if held_back else names.others
            self._meter.add(names.waited_seconds, seconds, waited_for=waited_for)
