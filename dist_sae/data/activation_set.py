"""An activation set as its readers see it: manifests, waited for while producers are at work."""

import logging
import threading
import time
from collections.abc import Callable
from itertools import chain

from dist_sae.data.plan import Plan
from dist_sae.data.shard import (
    CLAIMS,
    MANIFESTS,
    SiteShard,
    UnitManifest,
    manifest_key,
    read_manifest,
)
from dist_sae.data.work_queue import LEASE_SECONDS
from dist_sae.errors import CorruptObjectError, ObjectNotFoundError, Stopped
from dist_sae.logs import is_supervised
from dist_sae.storage import ObjectStore
from dist_sae.storage.own import PAGE

logger = logging.getLogger(__name__)

_POLL_SECONDS = (0.1, 2.0)  # first and longest pause while a unit is not there yet
_SAY_EVERY_SECONDS = 30.0


class ActivationSet:
    """Manifests of an activation set, waited for when they are not there yet."""

    def __init__(
        self,
        store: ObjectStore,
        plan: Plan,
        site: str,
        stopping: threading.Event,
        closed: threading.Event | None = None,
    ) -> None:
        self.store = store
        self.plan = plan
        self.stopping = stopping
        self._site = site
        self._closed = closed or threading.Event()

    def until(self, closed: threading.Event) -> "ActivationSet":
        """The same, for a reader whose waits end when `closed` is set."""
        return ActivationSet(self.store, self.plan, self._site, self.stopping, closed)

    def manifest(
        self, unit: int, waiting: Callable[[float], None] = lambda _: None
    ) -> UnitManifest:
        """The manifest of `unit`, as soon as it exists.

        Args:
            unit: Its number.
            waiting: Told now and then for how many seconds there has been none.

        Raises:
            Stopped: The wait was called off.
        """
        pause, longest = _POLL_SECONDS
        since = said = time.monotonic()
        while True:
            try:
                manifest = read_manifest(self.store, unit)
            except ObjectNotFoundError:
                pass
            else:
                return self._checked(manifest)
            if self.stopping.wait(pause) or self._closed.is_set():
                raise Stopped(f"stopped while waiting for unit {unit}")
            pause = min(pause * 1.5, longest)
            waiting(time.monotonic() - since)
            if time.monotonic() - said > _SAY_EVERY_SECONDS:
                said = time.monotonic()
                self._say_waiting(unit, said - since)

    def shard(self, manifest: UnitManifest) -> SiteShard:
        """The shard of this reader's site."""
        return manifest.sites[self._site]

    def _say_waiting(self, unit: int, seconds: float) -> None:
        if is_supervised() or self._producers_live(unit):
            logger.info("waiting for unit %d for %.0f s; producers are at work", unit, seconds)
        else:
            logger.warning("waiting for unit %d for %.0f s; are producers running?", unit, seconds)

    def _producers_live(self, unit: int) -> bool:
        """Whether a unit was claimed, or one near this one made, within the time of a lease."""
        near = MANIFESTS.entries(self.store, MANIFESTS.page(unit // PAGE))
        signs = chain(CLAIMS.entries(self.store), near)
        return any(entry.age_seconds < LEASE_SECONDS for _, entry in signs)

    def _checked(self, manifest: UnitManifest) -> UnitManifest:
        if manifest.plan != self.plan.hash:
            raise CorruptObjectError(
                "was made under another plan; delete it and produce the unit again",
                url=self.store.url,
                key=manifest_key(manifest.unit),
            )
        return manifest
