"""Counts the lives of a pod that end without progress, one after the other.

    <run>/lives/<part>-<index>.json    lives in a row of this pod and its predecessors

Kubernetes counts the crashes of an index for as long as its Job exists and forgets none, however
far the run has come since, and it counts no preemption and no exit with 75. So pods count here, and
Kubernetes only restarts them (`kubernetes/jobs.py`). A life counts from when it has work to do. If
it has made progress, the count begins anew; a life that finds too many before it ends the run. A
planner has nothing to show before the plan: its count begins anew when it ends by itself.
"""

import os
import threading
from contextlib import suppress
from typing import Literal

from dist_sae.config import Run
from dist_sae.errors import EXIT_CRASHED, LivesSpentError, ObjectNotFoundError
from dist_sae.storage.base import ObjectStore
from dist_sae.storage.records import Record, read_record, seal

JOB = "DIST_SAE_JOB"
"""Environment variable with the identifier of a pod's Job: in another one the count is 0."""
Part = Literal["planner", "trainer", "producer", "index"]
"""Parts whose lives are counted."""
_PROGRESS: dict[Part, str] = {
    "planner": "a plan",
    "trainer": "a new checkpoint",
    "producer": "a whole unit",
    "index": "a whole unit or bucket",
}
_REMEDY = {"trainer": ", save more often (train.save_every_steps)"}

_begun = threading.Event()  # of this process


class Lives(Record):
    """Content of the object."""

    schema_version: Literal[1] = 1
    job: str
    in_a_row: int
    """Lives that began to work and made no progress."""


class Life:
    """A life that is not counted: outside pods, and in all ranks of a pod but the first."""

    def begin(self) -> None:
        """Note that there is work to do; only the first call counts.

        Raises:
            LivesSpentError: Too many lives before this one made no progress.
        """

    def progressed(self) -> None:
        """Note progress; only the first call counts."""


class PodLife(Life):
    """The life of a pod.

    Args:
        store: The store of runs.
        run: Name of the run.
        part: Part of the run.
        index: Number of the pod.
        job: Identifier of its Job.
        retries: Lives in a row, after a first one, that may make no progress.
    """

    def __init__(
        self, store: ObjectStore, run: str, part: Part, index: int, *, job: str, retries: int
    ) -> None:
        self._store = store
        self._key = f"{run}/lives/{part}-{index}.json"
        self._who, self._part = f"{part} {index}", part
        self._job = job
        self._retries = retries
        self._has_begun = False
        self._has_progressed = False

    def begin(self) -> None:
        if self._has_begun:
            return
        self._has_begun = True
        before = 0
        with suppress(ObjectNotFoundError):
            lives = read_record(Lives, self._store, self._key)
            before = lives.in_a_row if lives.job == self._job else 0
        if before > self._retries:
            raise LivesSpentError(
                f"{self._who}: {before} lives in a row ended without {_PROGRESS[self._part]} "
                f"(cluster.{self._part}.retries {self._retries}); find out why in the log of "
                f"`dist-sae logs RUN {self._part} --previous`, mend it"
                f"{_REMEDY.get(self._part, '')}, and `dist-sae resume RUN`"
            )
        self._write(before + 1)
        _begun.set()

    def progressed(self) -> None:
        if self._has_begun and not self._has_progressed:
            self._has_progressed = True
            self._write(0)

    def _write(self, in_a_row: int) -> None:
        self._store.put(self._key, seal(Lives(job=self._job, in_a_row=in_a_row)))


def this_life(run: Run, part: Part, store: ObjectStore) -> Life:
    """The life of this process: a pod's, in its first rank, or one that nobody counts."""
    job = os.environ.get(JOB)
    if job is None or not _is_first():
        return Life()
    index = int(os.environ["JOB_COMPLETION_INDEX"])
    retries = getattr(run.cluster, part).retries
    return PodLife(store, run.name, part, index, job=job, retries=retries)


def crash_code() -> int | None:
    """Exit code of a bug in a life that is counted here; None elsewhere."""
    counted = JOB in os.environ and (_begun.is_set() or not _is_first())
    return EXIT_CRASHED if counted else None


def _is_first() -> bool:
    from dist_sae.device import local_rank  # imports torch, which rendering needs not

    return local_rank() == 0
