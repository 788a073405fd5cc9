"""A lease that allows only one trainer per run.

    <run>/trainer.json    the current trainer; renewed every few seconds, deleted at the end

Two trainers would delete each other's checkpoints and history. Only the first rank holds the lease.
If a trainer is killed, the file stays. Another trainer takes over in one of three cases: the file
is old by the store's clock, it does not change while watched, or its process ran on this machine
and no longer exists.
"""

import logging
import os
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Literal

from dist_sae.errors import (
    CorruptObjectError,
    ObjectNotFoundError,
    RunTakenError,
    Stopped,
    StoreError,
)
from dist_sae.storage import ObjectStore
from dist_sae.storage.records import Record, read_record, seal

logger = logging.getLogger(__name__)

RENEW_SECONDS = 5.0
"""Time between renewals."""
LEASE_SECONDS = 20.0
"""Time without a renewal after which the holder counts as dead."""
LOOK_SECONDS = 0.5
"""Time between two reads of a lease that may have expired."""
_START_FIELD = 19  # in /proc/<pid>/stat, counted after the program's name
_DEAD = "ZX"  # process states: zombie or dead


class Holder(Record):
    """The trainer that holds the lease: the content of `trainer.json`."""

    schema_version: Literal[1] = 1
    life: str
    """Random identifier of the process."""
    host: str
    pid: int
    machine: str
    """Boot id and process namespace of `pid`. Empty if unknown."""
    started: str
    """Start time of the process in kernel ticks, since a `pid` may be reused."""
    beat: int
    """Number of renewals."""


class TrainerLease:
    """Context manager in which this process holds the lease on a run.

    Args:
        store: The store of runs.
        run: Name of the run.
        stopping: Event that is set if another trainer has taken over, because renewals failed for
            too long. This process then saves and stops.
    """

    def __init__(self, store: ObjectStore, run: str, stopping: threading.Event) -> None:
        self._store = store
        self._run = run
        self._key = f"{run}/trainer.json"
        self._stopping = stopping
        self._over = threading.Event()
        self._mine = Holder(
            life=uuid.uuid4().hex,
            host=os.uname().nodename,
            pid=os.getpid(),
            machine=_machine(),
            started=_started(os.getpid()),
            beat=0,
        )
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> "TrainerLease":
        """Acquire the lease.

        Raises:
            RunTakenError: Another trainer holds the run.
            Stopped: A stop was requested while waiting for the lease.
        """
        self._await_free()
        self._store.put(self._key, seal(self._mine))
        other = self._holder()
        if other is not None and other.life != self._mine.life:  # both started at the same instant
            raise self._taken(other)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(LEASE_SECONDS)  # the store may retry for longer
        with suppress(StoreError):  # the lease expires by itself
            holder = self._holder()
            if holder is not None and holder.life == self._mine.life:
                self._store.delete(self._key)

    def _await_free(self) -> None:
        first = self._holder()
        if first is None:
            return
        if first.machine and first.machine == self._mine.machine:
            if first.started == _started(first.pid):
                raise self._taken(first)
            return  # the holder was killed
        ages = [e.age_seconds for e in self._store.entries(self._key) if e.key == self._key]
        if not ages or ages[0] > LEASE_SECONDS:
            return
        logger.info(
            "%s: a trainer on %s was active recently; waiting up to %.0f s to see if it still runs",
            self._run,
            first.host,
            LEASE_SECONDS,
        )
        until = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < until and not self._stopping.wait(LOOK_SECONDS):
            now = self._holder()
            if now is None:
                return
            if now != first:
                raise self._taken(now)
        if self._stopping.is_set():
            raise Stopped("stopped before the first step; start again to continue")

    def _renew(self) -> None:
        while not self._over.wait(RENEW_SECONDS):
            try:
                holder = self._holder()
                if holder is not None and holder.life != self._mine.life:
                    logger.error("%s; this trainer will save and stop", self._taken(holder))
                    self._stopping.set()
                    return
                self._mine = self._mine.model_copy(update={"beat": self._mine.beat + 1})
                self._store.put(self._key, seal(self._mine))
            except StoreError as exc:
                logger.warning("the lease on the run could not be renewed: %s", exc)

    def _holder(self) -> Holder | None:
        try:
            return read_record(Holder, self._store, self._key)
        except (ObjectNotFoundError, CorruptObjectError):  # a damaged lease has no holder
            return None

    def _taken(self, holder: Holder) -> RunTakenError:
        return RunTakenError(
            f"{self._store.url}/{self._run}: is already being trained by process {holder.pid} on "
            f"{holder.host}; stop that process first, or give this run another name"
        )


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # not Linux
        return ""


def _started(pid: int) -> str:
    """Return the start time of a process on this machine in kernel ticks. Empty if it is dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in _DEAD else fields[_START_FIELD]
