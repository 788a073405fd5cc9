"""Who is working on which unit: an optimisation, so that producers do not do work twice.

Correctness does not rest on it: a manifest is created once, whoever comes first. On a store that
cannot create exclusively there are no claims: producer i of n does the units i, i + n, ...
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

from dist_sae.data.consumers import Consumers
from dist_sae.data.plan import Plan
from dist_sae.data.shard import MANIFESTS, PAGE_UNITS, manifest_key, units_of_page
from dist_sae.errors import ObjectNotFoundError, StoreError
from dist_sae.storage import UNMETERED, Meter, ObjectStore
from dist_sae.storage.own import OwnKeys

logger = logging.getLogger(__name__)

_LEASE_SECONDS = 180.0
_POLL_SECONDS = 1.0
_SAY_EVERY_SECONDS = 30.0
CLAIMS = OwnKeys("claims/", r"(?P<unit>\d{8})\.json")


class Worker(NamedTuple):
    """A producer among the others."""

    name: str
    """No two that live at the same time share it; claims under it are from an earlier life."""
    number: int = 0
    """From 0; no two share it."""
    of: int = 1
    """How many producers there are; this and the number matter where a store has no claims."""


class WorkQueue:
    """Hands this producer the lowest unit that is neither done nor claimed by a live producer.

    A claim lives as long as it is renewed: its age is told by the store's clock.

    Args:
        store: The activation set.
        plan: Its plan.
        worker: This producer.
        stopping: Ends every wait.
        consumers: Those to keep step with.
        max_ahead_units: No unit so far ahead of the slowest consumer is begun; None: no limit.
        meter: Takes the metrics.
    """

    def __init__(
        self,
        store: ObjectStore,
        plan: Plan,
        worker: Worker,
        stopping: threading.Event,
        consumers: Consumers,
        max_ahead_units: int | None = None,
        meter: Meter = UNMETERED,
    ) -> None:
        self._store = store
        self._worker = worker
        self._stopping = stopping
        self._consumers = consumers
        self._max_ahead = max_ahead_units
        self._meter = meter
        self._units = len(plan.units)
        self._exclusive = store.exclusive
        # both are shared by the producer's threads: single set operations only
        self._pending = set(range(self._units))
        self._held: set[int] = set()
        self._renewing = threading.Lock()  # a claim that is given back must not be written again
        if self._exclusive:
            self._drop_left_overs()
        self.waited_seconds = 0.0
        """For consumers and other producers."""

    def take(self) -> int | None:
        """Claim a unit; None when all are done or the producer is to stop.

        While all that is left is claimed by others it waits, to take over should they die; and it
        waits for consumers that are far behind.
        """
        said = time.monotonic()
        while not self._stopping.is_set():
            limit, slowest = self._limit()
            claimed = self._claimed()
            for page in sorted({unit // PAGE_UNITS for unit in self._mine() if unit < limit}):
                self._look(page)
                for unit in sorted(self._mine() - claimed):
                    if unit // PAGE_UNITS == page and unit < limit and self._claim(unit):
                        self._held.add(unit)
                        self._meter.set("dist_sae_produce_claimed_units", len(self._held))
                        if self._store.size(manifest_key(unit)) is None:
                            return unit
                        self.release(unit, done=True)  # finished since it was looked for
            mine = self._mine()
            if not mine:
                return None
            held_back = min(mine) >= limit
            if held_back and time.monotonic() - said > _SAY_EVERY_SECONDS:
                said = time.monotonic()
                logger.warning("unit %d waits for %s", min(mine), slowest)
            self._stopping.wait(_POLL_SECONDS)
            self.waited_seconds += _POLL_SECONDS
            self._meter.set("dist_sae_produce_wait_seconds", self.waited_seconds)
            self._meter.add(
                "dist_sae_produce_waited_seconds_total",
                _POLL_SECONDS,
                waited_for="consumers" if held_back else "producers",
            )
        return None

    @contextmanager
    def renewed(self, lives: Callable[[], bool]) -> Iterator[None]:
        """Renews the claims at hand every third of their lease, in a thread of its own.

        Fetching text, loading a model or a batch may take longer than a lease.

        Args:
            lives: Whether the producer works; claims of one that hangs run out.
        """
        over = threading.Event()

        def work() -> None:
            while not over.wait(_LEASE_SECONDS / 3):
                try:
                    if lives():
                        self.renew()
                except StoreError as exc:  # the producer meets it, too, and ends by it
                    logger.warning("claims are not renewed: %s", exc)

        thread = threading.Thread(target=work, name="claims", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(_LEASE_SECONDS)  # the store may be patient for longer

    def renew(self) -> None:
        """Renew the claims at hand."""
        with self._renewing:
            for unit in sorted(self._held):
                self._write(unit)

    def release(self, unit: int, *, done: bool) -> None:
        """Give a unit back."""
        with self._renewing:
            if self._exclusive:
                self._store.delete(_key(unit))
            if done:
                self._pending.discard(unit)
            self._held.discard(unit)
        self._meter.set("dist_sae_produce_claimed_units", len(self._held))

    def release_all(self) -> None:
        """Give back what was claimed and not done, so that others need not wait for the lease."""
        for unit in sorted(self._held):
            self.release(unit, done=False)

    def pending(self) -> bool:
        """Whether units were missing when last looked at."""
        return bool(self._pending)

    def left(self) -> set[int]:
        """Units that did not exist when last looked at."""
        return set(self._pending)

    def done(self) -> int:
        """Units that exist, as far as this producer has seen."""
        return self._units - len(self._pending)

    def _mine(self) -> set[int]:
        """Units that are not done and not at hand; without claims, of this producer's share."""
        left = self._pending - self._held
        if self._exclusive:
            return left
        return {unit for unit in left if unit % self._worker.of == self._worker.number}

    def _limit(self) -> tuple[int, str]:
        """(The first unit that is too far ahead, whom it would leave behind)."""
        if self._max_ahead is None:
            return self._units, ""
        reached, run = self._consumers.slowest()
        return reached + self._max_ahead, (
            f"{run}, which is at unit {reached} (store.max_ahead_units {self._max_ahead})"
        )

    def _claimed(self) -> set[int]:
        """Units on which live producers work."""
        if not self._exclusive:
            return set()
        return {
            int(key["unit"])
            for key, entry in CLAIMS.entries(self._store)
            if entry.age_seconds < _LEASE_SECONDS
        }

    def _claim(self, unit: int) -> bool:
        """Claim a unit whose claim is missing or has run out."""
        if not self._exclusive or self._store.put(_key(unit), self._lease, if_absent=True):
            return True
        if unit in self._claimed():  # another was faster
            return False
        self._write(unit)  # two may take over at once: work done twice, and nothing worse
        self._meter.add("dist_sae_produce_takeovers_total", 1)
        logger.warning("unit %d: taken over; its producer has not renewed its claim", unit)
        return True

    def _look(self, page: int) -> None:
        """Take note of the units that exist, of those that one request can list."""
        for unit in units_of_page(self._store, page):
            self._pending.discard(unit)
        self._meter.set("dist_sae_produce_ready_units", self.done())

    def _drop_left_overs(self) -> None:
        for key in list(CLAIMS.keys(self._store)):
            try:
                left_over = self._store.get(key[0]) == self._lease
            except ObjectNotFoundError:
                continue
            if left_over:
                self._store.delete(key[0])

    def _write(self, unit: int) -> None:
        if self._exclusive:
            self._store.put(_key(unit), self._lease)

    @property
    def _lease(self) -> bytes:
        return json.dumps({"worker": self._worker.name}).encode()


def producers_live(store: ObjectStore, unit: int) -> bool:
    """Whether a unit has been claimed, or one around this one made, within the time of a lease."""
    around = f"{unit // PAGE_UNITS:05d}"
    made = chain(CLAIMS.entries(store), MANIFESTS.entries(store, around))
    return any(entry.age_seconds < _LEASE_SECONDS for _, entry in made)


def _key(unit: int) -> str:
    return f"{CLAIMS.folder}{unit:08d}.json"
