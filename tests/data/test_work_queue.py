import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dist_sae.data.work_queue
from dist_sae.config import Run
from dist_sae.data.consumers import Consumers
from dist_sae.data.shard import manifest_key
from dist_sae.data.work_queue import Work, Worker, WorkQueue
from dist_sae.errors import AbandonedError, ObjectNotFoundError
from dist_sae.producing.planner import plan
from dist_sae.producing.unit_queue import unit_queue
from dist_sae.storage import UNMETERED, Entry, Meter, ObjectStore, open_store
from dist_sae.storage.keys import NumberedKeys
from dist_sae.telemetry.exporter import Telemetry
from tests.runs import make_run
from tests.telemetry.scrape import values
from tests.world import Wrapped

UNITS = 17


class Clock(threading.Event):
    """A clock that advances only by `wait`, which also calls `then`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1e9
        self.waits = 0
        self.then: Callable[[], object] = lambda: None

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waits += 1
        self.now += timeout
        self.then()
        return self.is_set()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = make_run(tmp_path)
    assert len(plan(run).units) == UNITS
    return run


class Aging(Wrapped):
    """A store whose objects age by the test's clock."""

    def __init__(self, store: ObjectStore, clock: Clock) -> None:
        super().__init__(store)
        self._clock = clock
        self._written: dict[str, float] = {}

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        done = super().put(key, data, if_absent=if_absent)
        if done:
            self._written[key] = self._clock.now
        return done

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        for entry in super().entries(prefix):
            yield entry._replace(age_seconds=self._clock.now - self._written[entry.key])


@pytest.fixture
def store(run: Run, clock: Clock) -> ObjectStore:
    return Aging(open_store(run.store.activations), clock)


def open_claims(
    run: Run,
    worker: str,
    clock: Clock,
    store: ObjectStore,
    ahead: int | None = None,
    meter: Meter = UNMETERED,
) -> WorkQueue:
    consumers = Consumers(store, run.store.consumer_expiry_hours)
    made, own = plan(run), Worker(worker)
    return unit_queue(store, made, own, clock, consumers, ahead, meter, lambda: clock.now)


def finish(store: ObjectStore, *units: int) -> None:
    for unit in units:
        store.put(manifest_key(unit), b"{}")


def claimed(store: ObjectStore) -> dict[int, str]:
    return {int(k[7:15]): json.loads(store.get(k))["worker"] for k in store.keys("claims/")}


def test_the_lowest_free_unit_is_handed_out_and_none_twice(
    run: Run, clock: Clock, store: ObjectStore
) -> None:
    finish(store, 0, 2)
    a, b = open_claims(run, "a", clock, store), open_claims(run, "b", clock, store)
    assert [a.take(), b.take(), a.take(), b.take()] == [1, 3, 4, 5]
    assert claimed(store) == {1: "a", 3: "b", 4: "a", 5: "b"}


def test_units_that_others_finish_meanwhile_are_not_handed_out(
    run: Run, clock: Clock, store: ObjectStore
) -> None:
    claims = open_claims(run, "a", clock, store)
    finish(store, 0, 1)
    assert claims.take() == 2
    assert claims.done() == 2


def test_a_claim_of_a_dead_producer_is_taken_over_when_its_lease_ends(
    run: Run, clock: Clock, store: ObjectStore
) -> None:
    finish(store, *range(1, UNITS))
    assert open_claims(run, "dead", clock, store).take() == 0
    since = clock.now
    assert open_claims(run, "b", clock, store).take() == 0
    assert 180 <= clock.now - since < 182
    assert claimed(store) == {0: "b"}


def test_an_own_claim_of_an_earlier_life_is_taken_at_once(
    run: Run, clock: Clock, store: ObjectStore
) -> None:
    open_claims(run, "a", clock, store).take()
    assert open_claims(run, "a", clock, store).take() == 0
    assert clock.waits == 0


def test_renewing_keeps_a_slow_producers_unit(run: Run, clock: Clock, store: ObjectStore) -> None:
    """A producer that works on a unit for ten minutes keeps it by renewing its claim."""
    finish(store, *range(1, UNITS))
    slow = open_claims(run, "slow", clock, store)
    assert slow.take() == 0
    since = clock.now

    def meanwhile() -> None:
        slow.renew()
        if clock.now - since > 600:
            finish(store, 0)
            slow.release(0, done=True)

    clock.then = meanwhile
    assert open_claims(run, "b", clock, store).take() is None
    assert clock.now - since > 600


@pytest.mark.parametrize("lives", [True, False])
def test_claims_are_renewed_beside_the_work_while_it_does_not_hang(
    run: Run, clock: Clock, store: ObjectStore, monkeypatch: pytest.MonkeyPatch, *, lives: bool
) -> None:
    """Two claims are renewed twice before the third liveness check; never if the check fails."""
    monkeypatch.setattr(dist_sae.data.work_queue, "LEASE_SECONDS", 0.01)
    asked, over = itertools.count(1), threading.Event()

    class Counting(Wrapped):
        puts = 0

        def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
            self.puts += 1
            return super().put(key, data, if_absent=if_absent)

    counting = Counting(store)
    claims = open_claims(run, "a", clock, counting)
    claims.take()
    claims.take()
    counting.puts, seen = 0, list[int]()

    def answer() -> bool:
        if next(asked) == 3:
            seen.append(counting.puts)
            over.set()
        return lives

    with claims.renewed(answer):
        assert over.wait(60)
    assert seen == [4 if lives else 0]


def test_a_released_unit_is_free_for_others_at_once(
    run: Run, clock: Clock, store: ObjectStore
) -> None:
    a = open_claims(run, "a", clock, store)
    a.take()
    a.take()
    a.release_all()
    assert claimed(store) == {}
    assert open_claims(run, "b", clock, store).take() == 0
    assert clock.waits == 0


def test_release_counts_what_is_done(run: Run, clock: Clock, store: ObjectStore) -> None:
    claims = open_claims(run, "a", clock, store)
    assert (claims.take(), claims.take()) == (0, 1)
    finish(store, 0)
    claims.release(0, done=True)
    claims.release(1, done=False)
    assert claims.done() == 1
    assert claims.take() == 1


def test_take_ends_when_all_is_done_or_in_own_hands(
    run: Run, clock: Clock, store: ObjectStore
) -> None:
    finish(store, *range(2, UNITS))
    claims = open_claims(run, "a", clock, store)
    assert [claims.take(), claims.take(), claims.take()] == [0, 1, None]
    assert claims.pending()
    finish(store, 0, 1)
    claims.release_all()
    assert claims.take() is None
    assert not claims.pending()
    assert clock.waits == 0


def test_take_waits_for_others_and_ends_when_they_finish(
    run: Run, clock: Clock, store: ObjectStore
) -> None:
    finish(store, *range(1, UNITS))
    open_claims(run, "b", clock, store).take()
    clock.then = lambda: finish(store, 0) if clock.waits == 5 else None
    claims = open_claims(run, "a", clock, store)
    assert claims.take() is None
    assert (clock.waits, claims.pending()) == (5, False)


def test_take_ends_when_the_producer_is_stopped(run: Run, clock: Clock, store: ObjectStore) -> None:
    finish(store, *range(1, UNITS))
    open_claims(run, "b", clock, store).take()
    clock.then = clock.set
    claims = open_claims(run, "a", clock, store)
    assert claims.take() is None
    assert claims.pending()


def test_a_unit_that_another_claims_in_the_same_instant_is_left_to_it(
    run: Run, clock: Clock, store: ObjectStore
) -> None:
    class Racing(Wrapped):
        def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
            if key == "claims/00000000.json":
                self.inner.put(key, b'{"worker": "faster"}')
            return super().put(key, data, if_absent=if_absent)

    taken = open_claims(run, "a", clock, Racing(store)).take()
    assert taken
    assert claimed(store) == {0: "faster", taken: "a"}


def test_a_claim_released_in_the_instant_of_looking_is_no_error(
    run: Run, clock: Clock, store: ObjectStore
) -> None:
    class Racing(Wrapped):
        def get(self, key: str, *_: Any) -> bytes:
            self.delete(key)
            raise ObjectNotFoundError("no such object", url=self.url, key=key)

    open_claims(run, "b", clock, store).take()
    assert open_claims(run, "a", clock, Racing(store)).take() == 0


def test_a_unit_that_is_finished_between_the_look_and_the_claim_is_not_done_again(
    run: Run, clock: Clock, store: ObjectStore
) -> None:
    class Racing(Wrapped):
        def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
            if key == "claims/00000000.json":
                finish(store, 0)
            return super().put(key, data, if_absent=if_absent)

    claims = open_claims(run, "a", clock, Racing(store))
    assert claims.take() == 1
    assert claimed(store) == {1: "a"}
    assert claims.done() == 1


def test_a_unit_costs_four_requests_however_many_others_there_are(
    run: Run, clock: Clock, store: ObjectStore
) -> None:
    """Taking a unit costs four requests, because other producers' units are not checked one by one.

    The requests list the claims, list the units, write the claim, and check that the unit is not
    done.
    """

    class Counting(Wrapped):
        asked: Counter[str]

        def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
            self.asked["put"] += 1
            return super().put(key, data, if_absent=if_absent)

        def entries(self, prefix: str = "") -> Iterator[Entry]:
            self.asked["list"] += 1
            return super().entries(prefix)

        def keys(self, prefix: str = "") -> Iterator[str]:
            self.asked["list"] += 1
            return super().keys(prefix)

        def size(self, key: str) -> int | None:
            self.asked["size"] += 1
            return super().size(key)

    finish(store, *range(5))
    for other in "bcdef":
        open_claims(run, other, clock, store).take()
    counting = Counting(store)
    counting.asked = Counter()
    claims = open_claims(run, "a", clock, counting)
    counting.asked.clear()  # without the requests of opening the queue
    assert claims.take() == 10
    assert counting.asked == {"list": 2, "put": 1, "size": 1}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_without_exclusive_writes_each_producer_does_its_share(
    run: Run, clock: Clock, store: ObjectStore, number: int
) -> None:
    class Liar(Wrapped):
        exclusive = False

    finish(store, 3, 4, 5)
    liar = Liar(store)
    claims = unit_queue(liar, plan(run), Worker("p", number, 3), clock, Consumers(store, 1.0))
    taken = []
    while (unit := claims.take()) is not None:
        taken.append(unit)
        finish(store, unit)
        claims.renew()  # there is no claim to renew
        claims.release(unit, done=True)
    assert taken == [unit for unit in range(number, UNITS, 3) if unit not in (3, 4, 5)]
    assert claimed(store) == {}
    assert clock.waits == 0


# --- consumers


def test_a_producer_waits_for_the_slowest_run(
    run: Run, clock: Clock, store: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    consumers = Consumers(store, run.store.consumer_expiry_hours)
    consumers.report("slow", reached=2, needed=2)
    consumers.report("fast", reached=9, needed=9)
    claims = open_claims(run, "a", clock, store, ahead=3)
    assert [claims.take() for _ in range(5)] == [0, 1, 2, 3, 4]
    clock.then = lambda: (
        consumers.report("slow", reached=3, needed=2) if clock.waits == 40 else None
    )
    assert claims.take() == 5
    assert clock.waits == 40
    assert claims.waited_seconds == 40
    assert "unit 5 waits for slow, which is at unit 2 (store.max_ahead_units 3)" in caplog.text


def test_whom_a_producer_waits_for_and_what_it_takes_over_is_metered(
    run: Run, clock: Clock, store: ObjectStore
) -> None:
    telemetry = Telemetry("run", "produce", None)
    dead = open_claims(run, "dead", clock, store)
    assert [dead.take() for _ in range(UNITS)] == list(range(UNITS))
    claims = open_claims(run, "a", clock, store, ahead=UNITS, meter=telemetry)
    assert claims.take() == 0  # after the dead producer's lease has expired
    finish(store, 0)
    claims.release(0, done=True)
    consumers = Consumers(store, run.store.consumer_expiry_hours)
    consumers.report("slow", reached=0, needed=0)
    held_back = open_claims(run, "b", clock, store, ahead=1, meter=telemetry)
    before = clock.waits
    clock.then = lambda: consumers.report("slow", reached=1, needed=0)
    assert held_back.take() == 1
    found = values(telemetry.render().decode())
    assert found["dist_sae_produce_waited_seconds_total", "producers"] == before
    assert found["dist_sae_produce_waited_seconds_total", "consumers"] == clock.waits - before == 1
    assert found["dist_sae_produce_takeovers_total",] == 2
    assert found["dist_sae_produce_claimed_units",] == 1


def test_before_any_run_has_come_the_first_units_are_made(
    run: Run, clock: Clock, store: ObjectStore
) -> None:
    claims = open_claims(run, "a", clock, store, ahead=2)
    assert [claims.take(), claims.take()] == [0, 1]
    clock.then = clock.set
    assert claims.take() is None


def test_nobody_waits_for_a_run_that_was_abandoned(
    run: Run, clock: Clock, store: ObjectStore
) -> None:
    """Abandoned runs do not hold back production, unless all runs are abandoned.

    Then the last one's position still limits production.
    """
    consumers = Consumers(store, run.store.consumer_expiry_hours)
    consumers.report("gone", reached=1, needed=0)
    clock.now += 73 * 3600
    consumers.report("alive", reached=5, needed=4)
    assert consumers.slowest() == (5, "alive")
    assert [consumer.run for consumer in consumers.alive()] == ["alive"]
    clock.now += 73 * 3600
    assert consumers.slowest() == (5, "alive")
    assert consumers.alive() == []


def test_a_producer_that_nobody_will_ever_let_go_on_ends(
    run: Run, clock: Clock, store: ObjectStore
) -> None:
    """A producer ends with an error when no run will ever let it continue.

    It does not end while a run reports, even without progress. Time waited before does not count.
    """
    consumers = Consumers(store, 0.01)
    claims = unit_queue(
        store,
        plan(run),
        Worker("a"),
        clock,
        consumers,
        2,
        clock=lambda: clock.now,
        idle_hours=0.01,
    )
    assert [claims.take(), claims.take()] == [0, 1]
    finish(store, 0, 1)
    claims.release(0, done=True)
    claims.release(1, done=True)

    def report() -> None:
        if clock.waits < 80:
            consumers.report("r", reached=int(clock.waits > 70), needed=0)

    clock.then = report
    assert claims.take() == 2  # after waiting 70 s for a run that reports
    claims.release(2, done=False)
    finish(store, 2)
    with pytest.raises(AbandonedError, match=r"no run has made progress or reported for 0\.01 h"):
        claims.take()
    assert 79 + 36 <= clock.waits <= 79 + 40
    # with no idle limit it waits for ever, because another run may come
    patient = open_claims(run, "b", clock, store, ahead=2)
    clock.then = lambda: clock.set() if clock.waits > 300 else None
    assert patient.take() is None


# --- other work than units


def test_a_queue_of_any_numbered_work_is_shared_by_its_workers(
    clock: Clock, tmp_path: Path
) -> None:
    """A queue shares any numbered work, here an index's buckets, merged once they are cut."""
    store = Aging(open_store(str(tmp_path)), clock)
    done, ready = NumberedKeys("index/a/buckets/"), [3]
    merge = Work(
        "bucket",
        range(5),
        NumberedKeys("index/a/claims/"),
        done,
        lambda: (ready[0], "bucket 3 to be cut"),
    )
    finish(store, 0, 3)  # units in the same store do not count as buckets
    store.put("index/a/buckets/00000001.json", b"{}")
    a, b = (WorkQueue(store, merge, Worker(name), clock, clock=lambda: clock.now) for name in "ab")
    assert [a.take(), b.take()] == [0, 2]
    assert b.take(wait=False) is None
    assert clock.waits == 0
    assert list(store.keys("index/a/claims/")) == [
        "index/a/claims/00000000.json",
        "index/a/claims/00000002.json",
    ]
    clock.then = lambda: ready.__setitem__(0, 5) if clock.waits == 3 else None
    assert b.take() == 3
    assert b.waited_seconds == 3
    store.put(done.key(2), b"{}")
    b.release(2, done=True)
    clock.then = lambda: None
    assert [b.take(), b.left()] == [4, {0, 3, 4}]
    b.release_all()
    clock.now += 180  # a is dead
    c = WorkQueue(store, merge, Worker("c"), clock, clock=lambda: clock.now)
    assert [c.take(), c.take(), c.take(), c.take()] == [0, 3, 4, None]
    assert c.done() == 2
    assert claimed(store) == {}
