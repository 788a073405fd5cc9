"""The queue of units to produce."""

import threading
import time
from collections.abc import Callable

from dist_sae.data.consumers import Consumers
from dist_sae.data.plan import Plan
from dist_sae.data.shard import CLAIMS, MANIFESTS
from dist_sae.data.work_queue import QueueMetrics, Work, Worker, WorkQueue
from dist_sae.storage import UNMETERED, Meter, ObjectStore

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
) -> WorkQueue:
    """Open the queue of a plan's units, which keeps step with the runs that read them.

    Args:
        store: The activation set.
        stopping: Ends every wait.
        max_ahead_units: No unit this far ahead of the slowest run is begun; None: no limit.
        clock: See `WorkQueue`.
    """

    def limit() -> tuple[int, str]:
        if max_ahead_units is None:
            return len(plan.units), ""
        reached, run = consumers.slowest()
        return reached + max_ahead_units, (
            f"{run}, which is at unit {reached} (store.max_ahead_units {max_ahead_units})"
        )

    work = Work("unit", range(len(plan.units)), CLAIMS, MANIFESTS, limit, _METRICS)
    return WorkQueue(store, work, worker, stopping, meter, clock)
