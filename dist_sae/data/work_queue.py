"""A queue of numbered work that any number of workers share through a store.

Workers claim items, so that none does what another does. Correctness does not rest on claims: the
object that marks an item as done is created once, whoever comes first. A store that cannot create
exclusively has no claims: worker i of n does the items i, i + n, ...
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
from dist_sae.storage.own import PAGE, NumberedKeys

logger = logging.getLogger(__name__)

LEASE_SECONDS = 180.0
POLL_SECONDS = 1.0
"""First pause while no item is free; it grows with the number of workers."""
_SAY_EVERY_SECONDS = 30.0
_MEMORY_SECONDS = 0.03
"""Time for which a worker goes by one look, for each worker that there is: so all of them together
look about 30 times a second. For as long an item seen in hand is left alone, and a wait pauses; and
as much work is claimed at once."""
_MOST_AT_ONCE = 8
_MOST_REFUSED = 3  # then the look is too old
_MOST_LEFT_OVERS = 64


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
    """Numbers of the items, ascending."""
    claims: NumberedKeys
    """Keys of the claims."""
    done: NumberedKeys
    """Keys of the objects that mark items as done."""
    limit: Callable[[], tuple[int, str]] | None = None
    """Gives the first item that may not be begun yet, and for whom it waits."""
    metrics: QueueMetrics | None = None


class WorkQueue:
    """Hands a worker items that are neither done nor claimed by a live worker, low ones first.

    A claim lives as long as it is renewed; the store's clock tells its age.

    Many workers that all try the lowest free item would refuse each other. So a worker draws from
    the lowest `spread` free items: with few workers that is soon the lowest, and every collision
    doubles it. What is done and what is claimed is looked up by pages of items, and only where the
    worker is going to claim. Where items are short, it claims several after one look.

    Args:
        store: Where claims and results lie.
        stopping: Ends every wait.
        meter: Takes the metrics of `work`.
        clock: Seconds, for pauses and for how old a look is.
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
        # `_done` and `_held` are shared by the worker's threads: single operations only
        self._done = np.zeros(len(self._items), dtype=bool)
        self._held: set[int] = set()
        self.reserved: list[int] = []
        """Items that are claimed and not handed out yet."""
        self._busy_until = np.zeros(len(self._items))  # others have it in hand, as far as is known
        self._memory_seconds = max(
            POLL_SECONDS, min(_MEMORY_SECONDS * worker.of, LEASE_SECONDS / 6)
        )
        self._random = random.Random(worker.name)
        self._spread = 4 * (worker.of - 1) if store.exclusive else 0  # each soon has 4 in hand
        self._limit = (-math.inf, "") if work.limit else (math.inf, "")
        self._item_seconds = math.inf
        self._longest = POLL_SECONDS  # pause that may come next
        self._began = self._clock()
        self._renewing = threading.Lock()  # a claim that is given back must not be written again
        if store.exclusive:
            self._drop_left_overs()
        self._say_held()
        self.waited_seconds = 0.0
        """For the limit and for other workers."""

    def take(self, *, wait: bool = True) -> int | None:
        """Claim an item; None when all are done or the worker is to stop.

        It waits for the limit, and while others have the rest in hand, in case they die.

        Args:
            wait: Else None while nothing is free, too. A worker that still has something in hand
                must not wait for others, which might wait for it.
        """
        said = self._clock()
        while not self._stopping.is_set():
            if self.reserved or self._reserve():
                self._longest = POLL_SECONDS
                return self.reserved.pop(0)
            if not wait or not self._open().any():
                return None
            free = self._free()
            held_back = len(free) > 0
            if held_back and self._clock() - said > _SAY_EVERY_SECONDS:
                said = self._clock()
                what = self._work.item, self._items[free[0]], self._limit[1]
                logger.warning("%s %d waits for %s", *what)
            pause = self._random.uniform(max(POLL_SECONDS, self._longest / 2), self._longest)
            self._longest = min(2 * self._longest, self._memory_seconds)
            self._stopping.wait(pause)
            self._say_waited(pause, held_back=held_back)
        return None

    def wait_for_all(self) -> None:
        """Wait for the shares of other workers, where a store has no claims, or until it stops."""
        said = self._clock()
        while self.pending() and not self._stopping.is_set():
            for page in np.unique(self._items[~self._done] // PAGE):
                self._look(int(page))
            if self.pending() and self._clock() - said > _SAY_EVERY_SECONDS:
                said = self._clock()
                logger.warning(
                    "%s %d waits for another worker: %s cannot create exclusively, so each of %d "
                    "workers has a share",
                    *(self._work.item, min(self.left()), self._store.url, self._worker.of),
                )
            if self.pending():
                self._stopping.wait(self._memory_seconds)
                self._say_waited(self._memory_seconds, held_back=False)

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
        if done:
            seconds, self._began = self._clock() - self._began, self._clock()
            known = seconds if self._item_seconds == math.inf else self._item_seconds
            self._item_seconds = (known + seconds) / 2
        self._give_back(item, done=done)

    def release_all(self) -> None:
        """Give back what was claimed and not done, so that others need not wait for the lease."""
        self.reserved.clear()
        for item in sorted(self._held):
            self._give_back(item, done=False)

    def pending(self) -> bool:
        """Tell whether items were missing at the last look."""
        return not self._done.all()

    def left(self) -> set[int]:
        """Items that were missing at the last look."""
        return set(self._items[~self._done].tolist())

    def done(self) -> int:
        """Number of items done, as far as this worker has seen."""
        return int(self._done.sum())

    def _open(self) -> NDArray[np.bool_]:
        """Mark the items to do that are not in hand; without claims, of this worker's share."""
        is_open = ~self._done if self._share is None else self._share & ~self._done
        is_open[self._places(sorted(self._held))] = False
        return is_open

    def _free(self) -> NDArray[np.intp]:
        """Places of the open items that nobody has in hand, as far as is known."""
        return np.flatnonzero(self._open() & (self._busy_until <= self._clock()))

    def _reserve(self) -> bool:
        """Claim items to be handed out; False where none is free within the limit."""
        if self._claim_some() or self._work.limit is None or not len(self._free()):
            return bool(self.reserved)
        # once for a wait: workers that are held back all want what the limit lets go
        self._limit = self._work.limit()
        return self._claim_some()

    def _claim_some(self) -> bool:
        """Claim items within the limit as it is known; False where none is free."""
        while len(free := self._within_limit(self._free())):
            page = int(self._items[free[self._draw(len(free))]]) // PAGE
            run_out = self._look(page)
            free = self._within_limit(self._free())
            here = free[self._items[free] // PAGE == page].tolist()
            if not here:
                self._spread = min(2 * self._spread + 1, len(free))
            wanted, refused = self._at_once(len(free)), 0
            while here and len(self.reserved) < wanted and refused < _MOST_REFUSED:
                place = here.pop(self._draw(len(here)))
                item = int(self._items[place])
                if self._claim(item, may_have_run_out=item in run_out):
                    self._held.add(item)
                    self.reserved.append(item)
                    self._spread = 7 * self._spread // 8
                else:
                    refused += 1
                    self._busy_until[place] = self._clock() + self._memory_seconds
                    self._spread = min(2 * self._spread + 1, len(free))
            self._drop_done(page)
            if self.reserved:
                self.reserved.sort()
                self._say_held()
                return True
        return False

    def _drop_done(self, page: int) -> None:
        """Give back what was finished between the look and the claim."""
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
        """Draw one of the first `spread` of n places."""
        return int(self._random.random() * min(self._spread + 1, n))

    def _at_once(self, n_free: int) -> int:
        """Number of items to claim after a look: work for a while, at most a fair share."""
        work = math.ceil(self._memory_seconds / max(self._item_seconds, 1e-9))
        busy = np.count_nonzero(self._busy_until > self._clock())
        return max(1, min(work, _MOST_AT_ONCE, n_free // (int(busy) + 1)))

    def _claim(self, item: int, *, may_have_run_out: bool) -> bool:
        """Claim an item; one whose claim has run out is taken over."""
        key = self._work.claims.key(item)
        if not self._store.exclusive or self._store.put(key, self._lease, if_absent=True):
            return True
        if not may_have_run_out or item in self._claims(item // PAGE)[0]:  # another was faster
            return False
        self._write(item)  # two may take over at once: work done twice, and nothing worse
        if self._work.metrics:
            self._meter.add(self._work.metrics.takeovers, 1)
        logger.warning(
            "%s %d: taken over; its worker has not renewed its claim", self._work.item, item
        )
        return True

    def _look(self, page: int) -> set[int]:
        """Note which items of a page are in hand or done; returns those whose claims have run out.

        Claims come first: an item that is done by then need not be listed as claimed.
        """
        run_out = set[int]()
        if self._store.exclusive:
            live, run_out = self._claims(page)
            others = self._places(live - self._held)
            self._busy_until[others] = self._clock() + self._memory_seconds
        self._done[self._places(self._work.done.numbers(self._store, page))] = True
        if self._work.metrics:
            self._meter.set(self._work.metrics.done, self.done())
        return run_out

    def _claims(self, page: int) -> tuple[set[int], set[int]]:
        """The items of a page whose claims live, and those whose claims have run out."""
        ages = self._work.claims.ages(self._store, page)
        live = {item for item, seconds in ages.items() if seconds < LEASE_SECONDS}
        return live, ages.keys() - live

    def _places(self, items: Iterable[int]) -> NDArray[np.intp]:
        """Places of these items in the work; others are left out."""
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
        self._say_held()

    def _drop_left_overs(self) -> None:
        """Delete the claims of an earlier life of this worker.

        Where many workers are, that would be many reads by each of them, so claims run out there.
        """
        there = list(islice(self._work.claims.keys(self._store), _MOST_LEFT_OVERS + 1))
        for key in there if len(there) <= _MOST_LEFT_OVERS else ():
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
