"""One trainer to a run: two of one name would delete each other's checkpoints and history.

    <run>/trainer.json    who trains it, rewritten every few seconds; deleted when it ends

Only the first rank holds it. A trainer that was killed leaves it behind: another one takes over as
soon as it is old by the store's clock, or does not change while it watches, or names a process of
this machine that is gone.
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

_RENEW_SECONDS = 5.0
_LEASE_SECONDS = 20.0  # without a change for so long, its holder is dead
_LOOK_SECONDS = 0.5
_START_FIELD = 19  # of /proc/<pid>/stat, counted from what follows the program's name
_DEAD = "ZX"  # states: killed, and nobody has asked what became of it


class Holder(Record):
    """`trainer.json`."""

    schema_version: Literal[1] = 1
    life: str
    """Identifies one process; drawn at random when it starts."""
    host: str
    pid: int
    machine: str
    """The boot and the process namespace that `pid` is of; empty where that cannot be told."""
    started: str
    """When, by the kernel's count: the number may be another process's later."""
    beat: int
    """Grows with every renewal."""


class TrainerLease:
    """This process's hold on a run, while in its `with`.

    Args:
        store: The store of runs.
        run: Name of the run.
        stopping: Set when another trainer has taken over, which happens when renewing failed for
            long: this one saves and stops.
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
        """Take hold of the run.

        Raises:
            RunTakenError: Another trainer has it.
            Stopped: Asked to stop meanwhile.
        """
        self._await_free()
        self._store.put(self._key, seal(self._mine))
        other = self._holder()
        if other is not None and other.life != self._mine.life:  # it began in the same instant
            raise self._taken(other)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(_LEASE_SECONDS)  # the store may be patient for longer
        with suppress(StoreError):  # it runs out by itself
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
            return  # it was killed
        ages = [e.age_seconds for e in self._store.entries(self._key) if e.key == self._key]
        if not ages or ages[0] > _LEASE_SECONDS:
            return
        logger.info("%s: had a trainer on %s a moment ago; watching it", self._run, first.host)
        until = time.monotonic() + _LEASE_SECONDS
        while time.monotonic() < until and not self._stopping.wait(_LOOK_SECONDS):
            now = self._holder()
            if now is None:
                return
            if now != first:
                raise self._taken(now)
        if self._stopping.is_set():
            raise Stopped("stopped before the first step; start again to go on")

    def _renew(self) -> None:
        while not self._over.wait(_RENEW_SECONDS):
            try:
                holder = self._holder()
                if holder is not None and holder.life != self._mine.life:
                    logger.error("%s; this one saves and stops", self._taken(holder))
                    self._stopping.set()
                    return
                self._mine = self._mine.model_copy(update={"beat": self._mine.beat + 1})
                self._store.put(self._key, seal(self._mine))
            except StoreError as exc:
                logger.warning("the trainer's hold on the run could not be renewed: %s", exc)

    def _holder(self) -> Holder | None:
        try:
            return read_record(Holder, self._store, self._key)
        except (ObjectNotFoundError, CorruptObjectError):  # damaged: nobody's
            return None

    def _taken(self, holder: Holder) -> RunTakenError:
        return RunTakenError(
            f"{self._store.url}/{self._run}: is being trained by process {holder.pid} on "
            f"{holder.host}; stop that one first, or give this run another name"
        )


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # not Linux
        return ""


def _started(pid: int) -> str:
    """When a process of this machine started; empty if there is none, or it is dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in _DEAD else fields[_START_FIELD]
