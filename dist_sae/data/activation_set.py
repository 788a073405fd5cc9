"""Reader of an activation set, which producers may still be extending."""

import copy
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain

from jaxtyping import Float
from torch import Tensor

from dist_sae.data.plan import Plan
from dist_sae.data.shard import (
    CLAIMS,
    MANIFESTS,
    SiteShard,
    UnitManifest,
    manifest_key,
    read_block,
    read_manifest,
)
from dist_sae.data.work_queue import LEASE_SECONDS
from dist_sae.errors import CorruptObjectError, ObjectNotFoundError, Stopped, UnitMissingError
from dist_sae.logs import is_supervised
from dist_sae.storage import ObjectStore
from dist_sae.storage.keys import PAGE

logger = logging.getLogger(__name__)

POLL_SECONDS = (0.1, 2.0)
"""First and longest pause between checks for a unit that does not exist yet."""
LOG_EVERY_SECONDS = 30.0
"""Time between log messages while waiting for a unit."""
SiteActs = Float[Tensor, "rows d_site"]
"""Activations of one site."""


class ActivationSet:
    """Reader of an activation set: of its manifests, and of the rows of some of its sites.

    Args:
        store: Object store of the set.
        sites: Sites to read.
        stopping: Event that ends all waits for units that do not exist yet.
        wait: Whether to wait for units that do not exist yet.
        patience_seconds: Seconds without a sign of life from any producer after which a wait
            fails. Trainers have no limit, because producers may start much later.
    """

    def __init__(
        self,
        store: ObjectStore,
        plan: Plan,
        sites: tuple[str, ...],
        stopping: threading.Event | None = None,
        *,
        wait: bool = True,
        patience_seconds: float = math.inf,
    ) -> None:
        self.store = store
        self.plan = plan
        self.sites = sites
        self.stopping = stopping or threading.Event()
        self._wait = wait
        self._patience_seconds = patience_seconds
        self._logged_unit: int | None = None
        self.closed = threading.Event()

    def with_closed_event(self, closed: threading.Event) -> "ActivationSet":
        """Return a copy of this reader whose waits also end when `closed` is set."""
        reader = copy.copy(self)
        reader.closed = closed
        return reader

    def manifest(
        self, unit: int, on_wait: Callable[[float], None] = lambda _: None
    ) -> UnitManifest:
        """Return the manifest of a unit; wait until it exists.

        Args:
            on_wait: Callback for the seconds waited so far, called after every pause.

        Raises:
            ObjectNotFoundError: The unit does not exist, and this reader does not wait.
            CorruptObjectError: The unit was produced under another plan.
            UnitMissingError: No producer has shown a sign of life for `patience_seconds`.
            Stopped: `stopping` or `closed` was set during the wait.
        """
        pause, longest = POLL_SECONDS
        look_every = min(LOG_EVERY_SECONDS, self._patience_seconds / 4)
        since = looked = sign = time.monotonic()
        while True:
            try:
                return self._checked(read_manifest(self.store, unit))
            except ObjectNotFoundError:
                if not self._wait:
                    raise
            if self.stopping.wait(pause) or self.closed.is_set():
                raise Stopped(f"stopped while waiting for unit {unit}")
            pause = min(pause * 1.5, longest)
            now = time.monotonic()
            on_wait(now - since)
            if now - looked > look_every:
                looked = now
                if self._look_for_producers(unit, now - since):
                    sign = now
                elif now - sign > self._patience_seconds:
                    raise UnitMissingError(
                        f"{self.store.url}: unit {unit} does not exist, and no producer has shown "
                        f"a sign of life for {now - sign:.0f} s; start producers (dist-sae produce "
                        f"RUN.yaml), then rerun this command"
                    )

    def exist(self, units: Iterable[int]) -> bool:
        """Return whether all these units have been produced."""
        return all(self.store.size(manifest_key(unit)) is not None for unit in units)

    def with_sites(self, *sites: str) -> "ActivationSet":
        """Return a copy of this reader that reads these sites."""
        reader = copy.copy(self)
        reader.sites = sites
        return reader

    def shards(self, manifest: UnitManifest) -> dict[str, SiteShard]:
        """Return each site's shard of a unit, after checking that they have the same block sizes.

        Raises:
            CorruptObjectError: A site is missing, or two sites have different numbers of rows.
        """
        key = manifest_key(manifest.unit)
        if missing := [site for site in self.sites if site not in manifest.sites]:
            raise CorruptObjectError(
                f"has no site {missing[0]}; delete it and produce the unit again",
                url=self.store.url,
                key=key,
            )
        shards = {site: manifest.sites[site] for site in self.sites}
        rows = {site: [block.rows for block in shard.blocks] for site, shard in shards.items()}
        first = self.sites[0]
        for site in self.sites:
            if rows[site] != rows[first]:
                raise CorruptObjectError(
                    f"has {sum(rows[first])} rows of {first} in {len(rows[first])} blocks, and "
                    f"{sum(rows[site])} of {site} in {len(rows[site])}, so they cannot be read "
                    f"together; delete it and produce the unit again",
                    url=self.store.url,
                    key=key,
                )
        return shards

    def rows(self, units: Iterable[int], limit: int) -> Iterator[Mapping[str, SiteActs]]:
        """Yield up to `limit` rows in fp32, block by block; all sites have the same rows."""
        for unit in units:
            shards = self.shards(self.manifest(unit))
            for block in range(len(shards[self.sites[0]].blocks)):
                acts = {
                    site: read_block(self.store, shard, block).acts[:limit].float()
                    for site, shard in shards.items()
                }
                limit -= len(acts[self.sites[0]])
                yield acts
                if limit <= 0:
                    return

    def heldout_rows(self, limit: int) -> Iterator[Mapping[str, SiteActs]]:
        """Yield up to `limit` rows of the held-out units, in the same way as `rows`."""
        return self.rows(self.plan.heldout_units, limit)

    def _look_for_producers(self, unit: int, seconds: float) -> bool:
        """Return whether producers are working, and log that this reader waits for the unit.

        Under `dist-sae run`, a reader without a time limit assumes that they are. A reader with a
        limit logs this only once per unit, because its error follows soon.
        """
        patient = self._patience_seconds == math.inf
        live = (patient and is_supervised()) or self._producers_live(unit)
        if patient or unit != self._logged_unit:
            self._logged_unit = unit
            if live:
                logger.info("waiting for unit %d for %.0f s; producers are running", unit, seconds)
            else:
                logger.warning(
                    "waiting for unit %d for %.0f s; are producers running?", unit, seconds
                )
        return live

    def _producers_live(self, unit: int) -> bool:
        """Return whether, within one lease, any unit was claimed or one near this was finished."""
        near = MANIFESTS.entries(self.store, MANIFESTS.page(unit // PAGE))
        signs = chain(CLAIMS.entries(self.store), near)
        return any(entry.age_seconds < LEASE_SECONDS for _, entry in signs)

    def _checked(self, manifest: UnitManifest) -> UnitManifest:
        if manifest.plan != self.plan.hash:
            raise CorruptObjectError(
                "was produced under a different plan; delete it and produce the unit again",
                url=self.store.url,
                key=manifest_key(manifest.unit),
            )
        return manifest
