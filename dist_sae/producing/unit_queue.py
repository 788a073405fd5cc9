"""Queue of the units to produce."""

import threading
import time
from collections.abc import Callable

from dist_sae.data.consumers import Consumers
from dist_sae.data.plan import Plan
from dist_sae.data.shard import CLAIMS, MANIFESTS
from dist_sae.data.work_queue import QueueMetrics, Work, Worker, WorkQueue
from dist_sae.errors import AbandonedError
from dist_sae.storage import UNMETERED, Meter, ObjectStore
from dist_sae.storage.keys import NumberedKeys

_METRICS = QueueMetrics(
    claimed="dist_sae_produce_claimed_units",
    done="dist_sae_produce_ready_units",
    takeovers="dist_sae_produce_takeovers_total",
    wait_seconds="dist_sae_produce_wait_seconds",
    waited_seconds="dist_sae_produce_waited_seconds_total",
    limiters="consumers",
    others="producers",
)


def unit_queue(
    store: ObjectStore,
    plan: Plan,
    worker: Worker,
    stopping: threading.Event,
    consumers: Consumers,
    max_ahead_units: int | None = None,
    meter: Meter = UNMETERED,
    clock: Callable[[], float] = time.monotonic,
    idle_hours: float | None = None,
    keys: tuple[NumberedKeys, NumberedKeys] = (CLAIMS, MANIFESTS),
) -> WorkQueue:
    """Open the queue of a plan's units, limited by the progress of the runs that read them.

    Args:
        store: Object store of the activation set.
        stopping: Event that ends every wait.
        max_ahead_units: Distance from the slowest run's unit from which on no unit is started; None
            for no limit.
        clock: See `WorkQueue`.
        idle_hours: Hours that a worker is held back at the same limit, without any live run, before
            `take` raises `AbandonedError`. None waits forever.
        keys: Keys of the claims, and of the objects that mark units as done.
    """
    held: tuple[int, float] | None = None  # limit that holds this worker back, and since when

    def is_idle(seconds: float) -> bool:
        return idle_hours is not None and seconds > 3600 * idle_hours

    def limit() -> tuple[int, str]:
        nonlocal held
        if max_ahead_units is None:
            return len(plan.units), ""
        reached, run = consumers.slowest()
        first = reached + max_ahead_units
        if held is None or held[0] != first:
            held = first, clock()
        elif is_idle(clock() - held[1]) and not consumers.alive():
            raise AbandonedError(
                f"{store.url}: no run has made progress or reported for {idle_hours:g} h "
                f"(store.consumer_expiry_hours), and no unit may be produced before one does; to "
                f"continue: dist-sae resume"
            )
        return first, (
            f"{run}, which is at unit {reached} (store.max_ahead_units {max_ahead_units})"
        )

    work = Work("unit", range(len(plan.units)), *keys, limit, _METRICS)
    return WorkQueue(store, work, worker, stopping, meter, clock)
