"""Who is working on which unit: an optimisation, so that producers do not do work twice.

Correctness does not rest on it: a manifest is created once, whoever comes first.
"""

import json
import threading
import time

from dist_sae.data.plan import Plan
from dist_sae.data.shard import manifest_key
from dist_sae.errors import ObjectNotFoundError
from dist_sae.storage import ObjectStore

_LEASE_SECONDS = 600.0
_POLL_SECONDS = 1.0


class Claims:
    """Hands this producer the lowest unit that is neither done nor claimed by a live producer.

    Args:
        store: The activation set.
        plan: Its plan.
        worker: This producer; claims under its own name are left-overs of an earlier life.
        stopping: Ends every wait.
    """

    def __init__(
        self, store: ObjectStore, plan: Plan, worker: str, stopping: threading.Event
    ) -> None:
        self._store = store
        self._worker = worker
        self._stopping = stopping
        self._units = len(plan.units)
        made = {int(key[6:14]) for key in store.keys("units/") if key.endswith(".json")}
        # both are shared by the producer's threads: single set operations only
        self._pending = set(range(self._units)) - made
        self._held: set[int] = set()
        self._renewed = time.monotonic()

    def take(self) -> int | None:
        """Claim a unit; None when all are done or the producer is to stop.

        While all that is left is claimed by others it waits, to take over should they die.
        """
        while not self._stopping.is_set():
            for unit in sorted(self._pending - self._held):
                if self._exists(unit):
                    self._pending.discard(unit)
                elif self._claim(unit):
                    self._held.add(unit)
                    if not self._exists(unit):
                        return unit
                    self.release(unit)  # finished between the look and the claim
            if self._pending <= self._held:
                return None
            self._stopping.wait(_POLL_SECONDS)
        return None

    def renew(self) -> None:
        """Call it often: extends the leases of the units at hand once a third has run out."""
        if time.monotonic() - self._renewed > _LEASE_SECONDS / 3:
            self._renewed = time.monotonic()
            for unit in sorted(self._held):
                self._store.put(_key(unit), self._lease())

    def release(self, unit: int) -> None:
        """Give a unit back, done or not."""
        self._store.delete(_key(unit))
        if self._exists(unit):
            self._pending.discard(unit)
        self._held.discard(unit)

    def release_all(self) -> None:
        """Give back what was claimed and not done, so that others need not wait for the lease."""
        for unit in sorted(self._held):
            self.release(unit)

    def pending(self) -> bool:
        """Whether units were missing when last looked at."""
        return bool(self._pending)

    def done(self) -> int:
        """Units that exist, as far as this producer has seen."""
        return self._units - len(self._pending)

    def _exists(self, unit: int) -> bool:
        return self._store.size(manifest_key(unit)) is not None

    def _claim(self, unit: int) -> bool:
        if self._store.put(_key(unit), self._lease(), if_absent=True):
            return True
        try:
            there = json.loads(self._store.get(_key(unit)))
        except ObjectNotFoundError:
            return False  # released in this instant; the next round sees how
        if there["worker"] == self._worker or there["until"] < time.time():
            self._store.put(_key(unit), self._lease())
            return True
        return False

    def _lease(self) -> bytes:
        return json.dumps({"worker": self._worker, "until": time.time() + _LEASE_SECONDS}).encode()


def _key(unit: int) -> str:
    return f"claims/{unit:08d}.json"
