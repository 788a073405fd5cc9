"""A run in simulated time: producers, the store, trainers; preemption, lost nodes, a slow store.

The work queue, the consumers' progress and the order of units are the real code. The times of a
unit, a step and a request are inputs. All trainer ranks are simulated as one process, because they
run in lockstep: all wait for the slowest, and all restart from the last checkpoint when a node is
lost.
"""

import itertools
import logging
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from dist_sae.data.consumers import Consumers, lowest_unit
from dist_sae.data.plan import Plan
from dist_sae.data.shard import CLAIMS, MANIFESTS
from dist_sae.data.streams import StreamCursor
from dist_sae.data.work_queue import LEASE_SECONDS, Worker, WorkQueue
from dist_sae.planning.clock import Clock, NeverSet, Pause, Pipe, Process, SimulatedStore, TimedKeys
from dist_sae.producing.unit_queue import unit_queue

_POLL_SECONDS = 2.0  # of a trainer that waits for a unit
_EXPIRY_HOURS = 72.0
HOUR = 3600.0
_FOLDER_SLOWDOWN = 0.01


class Fleet(NamedTuple):
    """A run's processes and how long they take."""

    producers: int
    unit_seconds: float
    """Time of a producer's model for the largest unit. It varies by up to a tenth."""
    step_seconds: float = 0.0
    """Time of a training step of all ranks together."""
    batch_rows: int = 1
    rows: int = 0
    """Rows to train on in one pass. With 0, there are no trainers."""
    row_bytes: float = 0.0
    write_bytes_per_second: float = math.inf
    read_bytes_per_second: float = math.inf
    slowdown: float = 1.0
    """Factor on the time of every request and transfer."""
    in_folder: bool = False
    """Whether the store is a folder. Its requests take a hundredth of an object store's time."""
    max_ahead_units: int | None = None
    save_every_steps: int = 1000
    producer_hours: float = math.inf
    """Mean lifetime of a producer. Then it releases its claims, as on SIGTERM, and is replaced."""
    trainer_nodes: int = 1
    node_hours: float = math.inf
    """Mean lifetime of a trainer's node."""
    restart_seconds: float = 120.0
    """Time until a pod is replaced and the new one is ready to work."""
    producer_begin_seconds: float = 0.0
    """Time from a producer's start until it is ready for its first unit."""
    trainer_begin_seconds: float = 0.0
    """Time of the trainers outside their steps, at their start and end together."""


class Outcome(NamedTuple):
    """Times and counts of a simulated run."""

    first_step_seconds: float
    """Time until the trainers have their first rows."""
    seconds: float
    """Time until the last step, or until the last unit if there are no trainers."""
    rows: int
    """Rows trained on."""
    waited_seconds: float
    """Time that trainers waited for units."""
    repeated_seconds: float
    """Time of the trainers for repeated steps and for restarts."""
    producer_busy_share: float
    producer_seconds: float
    """Time that producers worked or restarted, summed over producers."""
    units: int
    """Number of units produced."""
    lost_units: int
    """Number of units that a producer started and did not finish."""
    preemptions: int
    lost_nodes: int
    requests: int
    """Number of requests of producers and trainers, without the transfers of rows."""


class Simulation:
    """One run in simulated time.

    Args:
        plan: Plan with the units.
        fleet: Processes that produce and read the units.
        seconds: Time limit, in simulated seconds.
        counted_from: Time after which requests and work are counted.
        seed: Seed for lifetimes and for the times of units.
    """

    def __init__(
        self,
        plan: Plan,
        fleet: Fleet,
        *,
        seconds: float = math.inf,
        counted_from: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.clock = Clock()
        self._claims, self._made = (
            TimedKeys(keys, len(plan.units)) for keys in (CLAIMS, MANIFESTS)
        )
        times = (self._claims, self._made)
        slowdown = fleet.slowdown * (_FOLDER_SLOWDOWN if fleet.in_folder else 1)
        self.store = SimulatedStore(self.clock, times, slowdown)
        self.begun: Counter[int] = Counter()
        """Number of times that each unit was started."""
        self.busy_seconds = 0.0
        self._plan, self._fleet, self._seed = plan, fleet, seed
        self._counted_from, self._stops = counted_from, seconds
        self._consumers = Consumers(self.store, _EXPIRY_HOURS)
        self._largest = max(plan.rows_of_units)
        self._writes, self._reads = (
            Pipe(self.clock, each / fleet.slowdown)
            for each in (fleet.write_bytes_per_second, fleet.read_bytes_per_second)
        )
        self._counts: Counter[str] = Counter()
        self._waited = self._repeated = self._ended = self._first_step = 0.0
        processes = [self._start_counting(), *map(self._produce, range(fleet.producers))]
        if fleet.rows:
            processes.append(self._train())
        with _quiet():
            self.clock.run(processes, lambda: self.clock.now >= self._stops)

    @property
    def seconds(self) -> float:
        """Time since `counted_from`."""
        return min(self._stops, self.clock.now) - self._counted_from

    @property
    def outcome(self) -> Outcome:
        """Times and counts so far."""
        counts, fleet = self._counts, self._fleet
        return Outcome(
            self._first_step,
            self._ended,
            counts["rows"],
            self._waited,
            self._repeated,
            self.busy_seconds / (fleet.producers * max(self.seconds, 1e-9)),
            self.busy_seconds + counts["preemptions"] * fleet.restart_seconds,
            counts["units"],
            counts["lost"],
            counts["preemptions"],
            counts["nodes"],
            self.store.requests.total() - counts["manifests"],
        )

    def _start_counting(self) -> Process[None]:
        yield self._counted_from
        self.store.requests.clear()
        self._counts["manifests"] = 0

    def _produce(self, number: int) -> Process[None]:
        """Simulate one producer and its replacements."""
        fleet, clock, chance = self._fleet, self.clock, random.Random(f"{self._seed}-{number}")
        yield fleet.producer_begin_seconds + chance.uniform(0, fleet.unit_seconds)
        for life in itertools.count():
            worker = Worker(f"p{number}-{life}", number, fleet.producers)
            queue = unit_queue(
                *(self.store, self._plan, worker, NeverSet(), self._consumers),
                fleet.max_ahead_units,
                clock=lambda: clock.now,
                keys=(self._claims, self._made),
            )
            dies = clock.now + _lifetime(chance, fleet.producer_hours)
            if (yield from self._work(queue, dies, chance)):
                return
            self._counts["preemptions"] += 1
            queue.release_all()
            yield fleet.restart_seconds

    def _work(self, queue: WorkQueue, dies: float, chance: random.Random) -> Process[bool]:
        """Produce until everything is done (True) or until this producer dies (False).

        As in `producing.loop`, the next unit is claimed and the previous one stored while the model
        runs on the current one.
        """
        rows, clock = self._plan.rows_of_units, self.clock
        last, unit = None, (yield from self._claim(queue))
        while unit is not None:
            began = clock.now
            self.begun[unit] += 1
            following = queue.take(wait=False) if queue.reserved or self._has_free else None
            yield 0.0
            if last is not None:
                yield from self._finish(queue, last)
            full = self._fleet.unit_seconds * rows[unit] / self._largest
            ends = began + full * chance.uniform(0.9, 1.1)
            worked = min(ends, dies, self._stops) - max(began, self._counted_from)
            self.busy_seconds += max(0.0, worked)
            yield from self._sleep_until(min(ends, dies), queue)
            if clock.now >= dies:
                self._counts["lost"] += 1
                return False
            last, unit = unit, following
            if unit is None:
                yield from self._finish(queue, last)
                last, unit = None, (yield from self._claim(queue))
        return True

    def _claim(self, queue: WorkQueue) -> Process[int | None]:
        """Wait for a free unit and return it; None if others have claimed all that are left.

        If one of these producers dies, its replacement produces the unit again.
        """
        while queue.reserved or self._has_free:
            try:
                unit = queue.take()
            except Pause as pause:
                yield pause.seconds
            else:
                yield 0.0
                return unit
        return None

    @property
    def _has_free(self) -> bool:
        """Whether a unit is neither stored nor claimed. A real producer would list the store."""
        return bool(np.isinf(np.minimum(self._claims.written, self._made.written)).any())

    def _finish(self, queue: WorkQueue, unit: int) -> Process[None]:
        size = self._plan.rows_of_units[unit] * self._fleet.row_bytes
        yield from self._sleep_until(self._writes.book(size), queue)
        self.store.put(MANIFESTS.key(unit), b"{}", if_absent=True)
        self._counts.update(("manifests", "units"))
        yield 0.0
        queue.release(unit, done=True)
        yield 0.0
        if not self._fleet.rows:
            self._ended = self.clock.now

    def _sleep_until(self, second: float, queue: WorkQueue) -> Process[None]:
        """Pause until this time. Renews the claims three times per lease."""
        while (left := second - self.clock.now) > LEASE_SECONDS / 3:
            yield LEASE_SECONDS / 3
            queue.renew()
        yield max(0.0, left)

    def _train(self) -> Process[None]:
        """Read window after window of all streams together, and train on their rows."""
        plan, fleet, clock = self._plan, self._fleet, self.clock
        chance = random.Random(f"{self._seed}-trainers")
        units_of = [plan.stream_units(stream) for stream in range(plan.streams)]
        yield fleet.trainer_begin_seconds
        for first in range(0, max(map(len, units_of)), plan.window_units):
            at = dict.fromkeys(range(plan.streams), StreamCursor(0, first, 0))
            reached = lowest_unit(plan, at, multi_pass=False)
            self._consumers.report("simulated", reached=reached, needed=0)
            window = [unit for of in units_of for unit in of[first : first + plan.window_units]]
            since = clock.now
            for unit in window:
                while not self.store.holds(MANIFESTS.key(unit)):
                    yield _POLL_SECONDS
            self._waited += clock.now - since
            self._first_step = self._first_step or clock.now
            left = fleet.rows - self._counts["rows"]
            rows = min(sum(plan.rows_of_units[unit] for unit in window), left)
            arrives = self._reads.book(rows * fleet.row_bytes)
            yield self._step_seconds(rows / fleet.batch_rows * fleet.step_seconds, chance)
            late = max(0.0, arrives - clock.now)
            self._waited += late
            yield late
            self._counts["rows"] += rows
            if rows == left:
                break
        self._ended = self._stops = clock.now

    def _step_seconds(self, seconds: float, chance: random.Random) -> float:
        """Return how long this much training takes, including restarts and repeated steps."""
        fleet, lost = self._fleet, 0.0
        since_save = fleet.save_every_steps * fleet.step_seconds  # upper bound
        while (lives := _lifetime(chance, fleet.node_hours / fleet.trainer_nodes)) < seconds:
            again = chance.uniform(0, since_save)
            self._counts["nodes"] += 1
            self._repeated += again + fleet.restart_seconds
            lost += lives + fleet.restart_seconds
            seconds += again - lives
        return lost + seconds


def _lifetime(chance: random.Random, mean_hours: float) -> float:
    """Draw a lifetime in seconds. An infinite mean uses no random number."""
    return chance.expovariate(1 / (mean_hours * HOUR)) if mean_hours < math.inf else math.inf


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the work queue's warnings, because they are about simulated events."""
    queue = logging.getLogger("dist_sae.data.work_queue")
    before, queue.disabled = queue.disabled, True
    try:
        yield
    finally:
        queue.disabled = before


def plan_from_units(
    unit_rows: Sequence[int], heldout_unit_rows: Sequence[int] = (), /, **activations: Any
) -> Plan:
    """Make a plan of units without documents, with these numbers of rows.

    Args:
        unit_rows: Rows of each training unit.
        heldout_unit_rows: Rows of each held-out unit.
        **activations: Settings of the plan.
    """
    rows = (*unit_rows, *heldout_unit_rows)
    return Plan(
        settings={"activations": {"seed": 0, **activations}},
        files=(),
        document_rows=1.0,
        n_train_units=len(unit_rows),
        units=((),) * len(rows),
        unit_rows=rows,
    )
