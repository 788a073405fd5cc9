"""Notice to all parts of a run that one of them has failed for good.

    <run>/failure.json    which pod has failed, why, and in which attempt

A JobSet ends all of its parts when one fails. Parts that have their own Jobs
(`cluster.producer.apart`, `cluster.jobset: false`) would instead wait forever and occupy their
devices. So a program that exits with 2 writes this notice, and the other parts look for it every
minute. A notice from an earlier attempt is ignored, because `submit` gives each attempt a new name.
"""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from dist_sae.config import Run
from dist_sae.errors import (
    CorruptObjectError,
    DistSaeError,
    ObjectNotFoundError,
    PartFailedError,
    StoreError,
)
from dist_sae.storage import ObjectStore, open_store
from dist_sae.storage.records import Record, read_record, seal

logger = logging.getLogger(__name__)

ATTEMPT = "DIST_SAE_ATTEMPT"
"""Environment variable with the name of the attempt. If it is not set, no notice is written."""
POD = "POD_NAME"
"""Environment variable with the name of the pod."""
_LOOK_SECONDS = 60.0


class Failure(Record):
    """Content of `<run>/failure.json`."""

    schema_version: Literal[1] = 1
    attempt: str
    pod: str
    why: str


def report_failure(run: Run, error: DistSaeError) -> None:
    """Notify the other parts of this attempt that this one has failed; the first notice counts."""
    attempt = os.environ.get(ATTEMPT)
    if not attempt or isinstance(error, PartFailedError):
        return
    try:
        store = open_store(run.store.runs, run.store.s3)
        if _read(store, run.name, attempt) is None:
            pod = os.environ.get(POD, "a pod")
            store.put(_key(run.name), seal(Failure(attempt=attempt, pod=pod, why=str(error))))
    except StoreError as exc:
        logger.warning("the other parts of the run could not be notified of this failure: %s", exc)


@contextmanager
def stop_if_peer_failed(
    run: Run, stopping: threading.Event, look_seconds: float = _LOOK_SECONDS
) -> Iterator[None]:
    """End if another part of this attempt fails for good; check at once and then every minute.

    Only the first rank of a pod checks; it stops the other ranks.

    Args:
        run: The run.
        stopping: Event that is set if another part has failed, so that the program saves its state.
        look_seconds: Pause between checks.

    Raises:
        PartFailedError: Another part has failed.
    """
    from dist_sae.device import local_rank  # imports torch

    attempt = os.environ.get(ATTEMPT)
    if not attempt or local_rank():
        yield
        return
    store = open_store(run.store.runs, run.store.s3, None, stopping)
    if failure := _read(store, run.name, attempt):
        raise _peer_failed(failure)
    found: list[Failure] = []
    over = threading.Event()

    def watch() -> None:
        while not found and not over.wait(look_seconds):
            try:
                if failure := _read(store, run.name, attempt):
                    found.append(failure)
                    stopping.set()
            except StoreError as exc:  # the program itself also gets this error
                logger.warning("cannot check whether another part has failed: %s", exc)

    # a daemon, because the program must not wait at its exit while the store retries
    threading.Thread(target=watch, name="failure", daemon=True).start()
    try:
        yield
    except DistSaeError as exc:
        if found:
            raise _peer_failed(found[0]) from exc
        raise
    finally:
        over.set()


def _peer_failed(failure: Failure) -> PartFailedError:
    return PartFailedError(
        f"stopped because {failure.pod} failed ({failure.why}); fix that, then run "
        f"`dist-sae resume RUN`"
    )


def _key(run: str) -> str:
    return f"{run}/failure.json"


def _read(store: ObjectStore, run: str, attempt: str) -> Failure | None:
    """Return the failure of this attempt, if any."""
    try:
        failure = read_record(Failure, store, _key(run))
    except (ObjectNotFoundError, CorruptObjectError):
        return None
    return failure if failure.attempt == attempt else None
