"""A run in simulated time: producers, the store, trainers; preemption, lost nodes, a slow store.

The work queue, the progress of runs and the order of the units are the real ones. The times of a
unit, a step and a request are given. Trainer ranks go in step, so they are one worker here: all
wait for the slowest, and all begin again from the last checkpoint when a node is lost.
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
from dist_sae.planning.clock import Clock, Pause, Pipe, Process, SimulatedStore, Stopping, Times
from dist_sae.producing.unit_queue import unit_queue

_POLL_SECONDS = 2.0  # between two looks of a trainer that waits
_EXPIRY_HOURS = 72.0
HOUR = 3600.0
_OF_FOLDER = 0.01


class Fleet(NamedTuple):
    """The processes of a run, and how long they take."""

    producers: int
    unit_seconds: float
    """Time of a producer's model for the largest unit, give or take a tenth."""
    step_seconds: float = 0.0
    """Time of a training step of all ranks together."""
    batch_rows: int = 1
    rows: int = 0
    """Rows to train on, in one pass; 0: there is no trainer."""
    row_bytes: float = 0.0
    write_bytes_per_second: float = math.inf
    read_bytes_per_second: float = math.inf
    slowdown: float = 1.0
    """Factor on the time of every request and transfer."""
    in_folder: bool = False
    """Whether the store is a folder, whose requests take a hundredth of an object store's time."""
    max_ahead_units: int | None = None
    save_every_steps: int = 1000
    producer_hours: float = math.inf
    """Mean life of a producer; then it gives back its units, as on SIGTERM, and is replaced."""
    trainer_nodes: int = 1
    node_hours: float = math.inf
    """Mean life of a trainer's node."""
    restart_seconds: float = 120.0
    """Until a pod is replaced and has loaded what it needs."""
    producer_begin_seconds: float = 0.0
    """From a producer's start until it is ready for its first unit."""
    trainer_begin_seconds: float = 0.0
    """Of the trainers beside their steps: from their start to their end."""


class Outcome(NamedTuple):
    """Times and counts of a simulated run."""

    first_step_seconds: float
    """Until the trainers had their first rows."""
    seconds: float
    """Until the last step, or without a trainer until the last unit."""
    rows: int
    """Rows trained on."""
    waited_seconds: float
    """Of the trainers for units."""
    repeated_seconds: float
    """Of the trainers, for steps made again and for restarts."""
    producer_busy_share: float
    producer_seconds: float
    """Of producers while they had something to do, restarts included."""
    units: int
    """Units made."""
    lost_units: int
    """Units begun and not finished by the producer that began them."""
    preemptions: int
    lost_nodes: int
    requests: int
    """Of producers and trainers, transfers of rows aside."""


class Simulation:
    """One run in simulated time.

    Args:
        plan: Whose units are made and read.
        fleet: Who makes and reads them.
        seconds: When to stop at the latest.
        counted_from: Second from which requests and work are counted.
        seed: Of lives and of the times of units.
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
        self._claims, self._made = (Times(keys, len(plan.units)) for keys in (CLAIMS, MANIFESTS))
        times = (self._claims, self._made)
        slowdown = fleet.slowdown * (_OF_FOLDER if fleet.in_folder else 1)
        self.store = SimulatedStore(self.clock, times, slowdown)
        self.begun: Counter[int] = Counter()
        """How often each unit was begun."""
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
        processes = [self._begin_to_count(), *map(self._produce, range(fleet.producers))]
        if fleet.rows:
            processes.append(self._train())
        with _quiet():
            self.clock.run(processes, lambda: self.clock.now >= self._stops)

    @property
    def seconds(self) -> float:
        """Counted time."""
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

    def _begin_to_count(self) -> Process[None]:
        yield self._counted_from
        self.store.requests.clear()
        self._counts["manifests"] = 0

    def _produce(self, number: int) -> Process[None]:
        """One producer and those that replace it."""
        fleet, clock, chance = self._fleet, self.clock, random.Random(f"{self._seed}-{number}")
        yield fleet.producer_begin_seconds + chance.uniform(0, fleet.unit_seconds)
        for life in itertools.count():
            worker = Worker(f"p{number}-{life}", number, fleet.producers)
            queue = unit_queue(
                *(self.store, self._plan, worker, Stopping(), self._consumers),
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
        """Produce until everything is done, or until this producer dies; tell which.

        As in `producing.loop`, the next unit is claimed, and the last one stored, while the model
        works on the present one.
        """
        rows, clock = self._plan.rows_of_units, self.clock
        last, unit = None, (yield from self._taken(queue))
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
                last, unit = None, (yield from self._taken(queue))
        return True

    def _taken(self, queue: WorkQueue) -> Process[int | None]:
        """A unit, as soon as one is free; None if others have all that is left in hand.

        Those that replace them make it again if they die.
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
        """Whether a unit is neither made nor in hand; a look would tell a producer the same."""
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
        """Pause, and renew the claims in hand every third of their lease."""
        while (left := second - self.clock.now) > LEASE_SECONDS / 3:
            yield LEASE_SECONDS / 3
            queue.renew()
        yield max(0.0, left)

    def _train(self) -> Process[None]:
        """Read window after window of all streams in step, and train on their rows."""
        plan, fleet, clock = self._plan, self._fleet, self.clock
        chance = random.Random(f"{self._seed}-trainers")
        units_of = [plan.stream_units(stream) for stream in range(plan.streams)]
        yield fleet.trainer_begin_seconds
        for first in range(0, max(map(len, units_of)), plan.window_units):
            at = dict.fromkeys(range(plan.streams), StreamCursor(0, first, 0))
            reached = lowest_unit(plan, at, keeps=False)
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
        """Time of so many seconds of steps; what a lost node undoes is done again."""
        fleet, lost = self._fleet, 0.0
        since_save = fleet.save_every_steps * fleet.step_seconds  # at most
        while (lives := _lifetime(chance, fleet.node_hours / fleet.trainer_nodes)) < seconds:
            again = chance.uniform(0, since_save)
            self._counts["nodes"] += 1
            self._repeated += again + fleet.restart_seconds
            lost += lives + fleet.restart_seconds
            seconds += again - lives
        return lost + seconds


def _lifetime(chance: random.Random, mean_hours: float) -> float:
    """Draw a lifetime in seconds; an infinite one draws nothing."""
    return chance.expovariate(1 / (mean_hours * HOUR)) if mean_hours < math.inf else math.inf


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the queue's warnings, which are of a simulated world."""
    queue = logging.getLogger("dist_sae.data.work_queue")
    before, queue.disabled = queue.disabled, True
    try:
        yield
    finally:
        queue.disabled = before


def plan_of(
    unit_rows: Sequence[int], heldout_unit_rows: Sequence[int] = (), /, **activations: Any
) -> Plan:
    """A plan of units of which only the rows matter; `activations` are its settings."""
    rows = (*unit_rows, *heldout_unit_rows)
    return Plan(
        settings={"activations": {"seed": 0, **activations}},
        files=(),
        document_rows=1.0,
        n_train_units=len(unit_rows),
        units=((),) * len(rows),
        unit_rows=rows,
    )
