"""Count of a pod's lives in a row that made no progress.

    <run>/lives/<part>-<index>.json    the count for a pod and the pods that it replaces

Kubernetes counts all crashes of an index for as long as its Job exists, however much progress the
run has made since. It does not count preemptions or exits with 75. So pods count here, and
Kubernetes only restarts them (`kubernetes/jobs.py`). A life counts once it has work to do, and its
first progress resets the count. A pod that finds too many such lives before its own ends the run. A
planner makes no progress before the plan, so its count is reset when it exits resumably.
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
"""Environment variable with the identifier of a pod's Job. A new Job starts with a count of 0."""
Part = Literal["planner", "trainer", "producer", "index"]
"""Parts of a run whose lives are counted."""
_PROGRESS: dict[Part, str] = {
    "planner": "a plan",
    "trainer": "a new checkpoint",
    "producer": "a whole unit",
    "index": "a whole unit or bucket",
}
_REMEDY = {"trainer": ", save more often (train.save_every_steps)"}

_begun = threading.Event()  # set once this process's life counts


class Lives(Record):
    """Content of `<run>/lives/<part>-<index>.json`."""

    schema_version: Literal[1] = 1
    job: str
    in_a_row: int
    """Number of consecutive lives that had work to do and made no progress."""


class Life:
    """A life that is not counted: outside pods, and in all ranks of a pod but the first."""

    def begin(self) -> None:
        """Record that there is work to do; only the first call has an effect.

        Raises:
            LivesSpentError: Too many lives before this one made no progress.
        """

    def progressed(self) -> None:
        """Record progress; only the first call has an effect."""


class PodLife(Life):
    """A pod's life, which is counted.

    Args:
        store: Store of runs.
        run: Name of the run.
        part: Part of the run.
        index: Index of the pod in its Job.
        job: Identifier of the Job.
        retries: Number of lives in a row, after the first, that may make no progress.
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
                f"{self._who}: {before} starts in a row ended without {_PROGRESS[self._part]} "
                f"(cluster.{self._part}.retries {self._retries}); find the reason with "
                f"`dist-sae logs RUN {self._part} --previous`, fix it"
                f"{_REMEDY.get(self._part, '')}, then run `dist-sae resume RUN`"
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
    """Return the life of this process; it is counted only in the first rank of a pod."""
    job = os.environ.get(JOB)
    if job is None or not _is_first():
        return Life()
    index = int(os.environ["JOB_COMPLETION_INDEX"])
    retries = getattr(run.cluster, part).retries
    return PodLife(store, run.name, part, index, job=job, retries=retries)


def crash_code() -> int | None:
    """Return the exit code of a crash if this life is counted here; otherwise None."""
    counted = JOB in os.environ and (_begun.is_set() or not _is_first())
    return EXIT_CRASHED if counted else None


def _is_first() -> bool:
    from dist_sae.device import local_rank  # imports torch, which rendering does not need

    return local_rank() == 0
