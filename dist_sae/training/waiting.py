"""`--wait`: waits for input, in programs that are started together as plain Kubernetes Jobs."""

import logging
import threading
from collections.abc import Callable
from contextlib import suppress

from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.checkpoint.trained import trained_run
from dist_sae.config import Run
from dist_sae.data.plan import PLAN_KEY, load_plan
from dist_sae.errors import ObjectNotFoundError, Stopped
from dist_sae.storage import open_store

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 10.0


def await_plan(run: Run, stopping: threading.Event) -> None:
    """Wait until the activation set has its plan.

    Raises:
        Stopped: `stopping` was set first.
    """
    store = open_store(run.store.activations, run.store.s3, None, stopping)
    what = f"a plan in {store.url}"
    await_until(what, lambda: store.size(PLAN_KEY) is not None, stopping)


def await_end(run: Run, stopping: threading.Event) -> None:
    """Wait until the run's last checkpoint exists.

    Raises:
        PlanMismatchError: The run in the store, or its plan, has other settings.
        Stopped: `stopping` was set first.
    """
    store = open_store(run.store.runs, run.store.s3, None, stopping)
    checkpoints = Checkpoints(store, run.name, run.train.keep_checkpoints)
    last = "the last step" if run.train.rows == "all" else f"step {run.steps}"
    if run.train.rows == "all":  # refuse a plan with other settings early
        await_plan(run, stopping)
        load_plan(open_store(run.store.activations, run.store.s3, None, stopping), run)

    def has_ended() -> bool:
        with suppress(ObjectNotFoundError):  # a newer checkpoint replaced it meanwhile
            if newest := checkpoints.latest():
                # raises if the run has other settings, because it might never reach that step
                return newest.step >= trained_run(newest, run).steps
        return False

    await_until(f"{last} of {store.url}/{run.name}", has_ended, stopping)


def await_until(what: str, is_there: Callable[[], bool], stopping: threading.Event) -> None:
    """Wait until something exists.

    Args:
        what: Name of the thing, for messages.

    Raises:
        Stopped: `stopping` was set first.
    """
    if is_there():
        return
    logger.info("waiting for %s", what)
    while not stopping.wait(_LOOK_SECONDS):
        if is_there():
            return
    raise Stopped(f"stopped while waiting for {what}; start again to continue")
