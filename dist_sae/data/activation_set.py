"""Reading an activation set, while producers may still be at work on it."""

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
from dist_sae.storage.own import PAGE

logger = logging.getLogger(__name__)

POLL_SECONDS = (0.1, 2.0)
"""First and longest pause while a unit is not there yet."""
SAY_EVERY_SECONDS = 30.0
"""Time between messages while a unit is waited for."""
SiteActs = Float[Tensor, "rows d_site"]
"""Activations of one site."""


class ActivationSet:
    """An activation set as its readers see it: manifests and rows of some of its sites.

    Args:
        store: The set.
        sites: The sites to read.
        stopping: Ends the waits for units that do not exist yet.
        wait: Whether to wait for such units at all.
        patience_seconds: Seconds without a sign of a producer after which a wait fails. A trainer
            has no limit: producers may come much later.
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
        self._said_unit: int | None = None
        self.closed = threading.Event()

    def until(self, closed: threading.Event) -> "ActivationSet":
        """Return the same set, for a reader whose waits end when `closed` is set as well."""
        reader = copy.copy(self)
        reader.closed = closed
        return reader

    def manifest(
        self, unit: int, waiting: Callable[[float], None] = lambda _: None
    ) -> UnitManifest:
        """Return the manifest of a unit as soon as it exists.

        Args:
            waiting: Called now and then with the seconds waited so far.

        Raises:
            ObjectNotFoundError: It does not exist, and this reader does not wait.
            CorruptObjectError: The unit was made under another plan.
            UnitMissingError: No producer has shown a sign of life for `patience_seconds`.
            Stopped: The wait was called off.
        """
        pause, longest = POLL_SECONDS
        look_every = min(SAY_EVERY_SECONDS, self._patience_seconds / 4)
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
            waiting(now - since)
            if now - looked > look_every:
                looked = now
                if self._look_for_producers(unit, now - since):
                    sign = now
                elif now - sign > self._patience_seconds:
                    raise UnitMissingError(
                        f"{self.store.url}: unit {unit} does not exist, and no producer has shown "
                        f"a sign of life for {now - sign:.0f} s; start producers (dist-sae produce "
                        f"RUN.yaml), then this again"
                    )

    def exist(self, units: Iterable[int]) -> bool:
        """Tell whether all these units have been produced."""
        return all(self.store.size(manifest_key(unit)) is not None for unit in units)

    def at(self, *sites: str) -> "ActivationSet":
        """Return the same set, for a reader of other sites."""
        reader = copy.copy(self)
        reader.sites = sites
        return reader

    def shards(self, manifest: UnitManifest) -> dict[str, SiteShard]:
        """Return the shard of each site of a unit; their blocks hold the same rows.

        Raises:
            CorruptObjectError: A site is missing, or two sites differ in their rows.
        """
        key = manifest_key(manifest.unit)
        if missing := [site for site in self.sites if site not in manifest.sites]:
            raise CorruptObjectError(
                f"has no {missing[0]}; delete it and produce the unit again",
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
        """Yield the same rows of all sites in fp32: whole units, by block, `limit` rows at most."""
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
        """Yield rows of the units that nobody trains on, as `rows` does."""
        return self.rows(self.plan.heldout_units, limit)

    def _look_for_producers(self, unit: int, seconds: float) -> bool:
        """Look for producers at work, and say that the unit is waited for.

        A reader with limited patience says so once per unit, since its error follows soon.
        """
        patient = self._patience_seconds == math.inf
        live = (patient and is_supervised()) or self._producers_live(unit)
        if patient or unit != self._said_unit:
            self._said_unit = unit
            if live:
                logger.info("waiting for unit %d for %.0f s; producers are at work", unit, seconds)
            else:
                logger.warning(
                    "waiting for unit %d for %.0f s; are producers running?", unit, seconds
                )
        return live

    def _producers_live(self, unit: int) -> bool:
        """True if, within a lease, any unit was claimed or a unit near this one was made."""
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
