import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import dist_sae.data.claims
from dist_sae.config import Run
from dist_sae.data.claims import Claims
from dist_sae.data.shard import manifest_key
from dist_sae.errors import ObjectNotFoundError
from dist_sae.plan import plan
from dist_sae.storage import ObjectStore, open_store
from tests.world import Wrapped, make_run

UNITS = 17


class Clock(threading.Event):
    """A clock that only waiting moves; `then` is what happens while one waits."""

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
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    times = SimpleNamespace(time=lambda: clock.now, monotonic=lambda: clock.now)
    monkeypatch.setattr(dist_sae.data.claims, "time", times)
    return clock


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = make_run(tmp_path)
    assert len(plan(run).units) == UNITS
    return run


@pytest.fixture
def store(run: Run) -> ObjectStore:
    return open_store(run.store.activations)


def open_claims(run: Run, worker: str, clock: Clock, store: ObjectStore | None = None) -> Claims:
    return Claims(store or open_store(run.store.activations), plan(run), worker, clock)


def finish(store: ObjectStore, *units: int) -> None:
    for unit in units:
        store.put(manifest_key(unit), b"{}")


def claimed(store: ObjectStore) -> dict[int, str]:
    return {int(k[7:15]): json.loads(store.get(k))["worker"] for k in store.keys("claims/")}


def test_the_lowest_free_unit_is_handed_out_and_none_twice(
    run: Run, clock: Clock, store: ObjectStore
) -> None:
    finish(store, 0, 2)
    a, b = open_claims(run, "a", clock), open_claims(run, "b", clock)
    assert [a.take(), b.take(), a.take(), b.take()] == [1, 3, 4, 5]
    assert claimed(store) == {1: "a", 3: "b", 4: "a", 5: "b"}


def test_units_that_others_finish_meanwhile_are_not_handed_out(
    run: Run, clock: Clock, store: ObjectStore
) -> None:
    claims = open_claims(run, "a", clock)
    finish(store, 0, 1)
    assert claims.take() == 2
    assert claims.done() == 2


def test_a_claim_of_a_dead_producer_is_taken_over_when_its_lease_ends(
    run: Run, clock: Clock, store: ObjectStore
) -> None:
    finish(store, *range(1, UNITS))
    assert open_claims(run, "dead", clock).take() == 0
    since = clock.now
    assert open_claims(run, "b", clock).take() == 0
    assert 600 < clock.now - since < 602
    assert claimed(store) == {0: "b"}


def test_an_own_claim_of_an_earlier_life_is_taken_at_once(
    run: Run, clock: Clock, store: ObjectStore
) -> None:
    open_claims(run, "a", clock).take()
    assert open_claims(run, "a", clock).take() == 0
    assert clock.waits == 0


def test_renewing_keeps_a_slow_producers_unit(run: Run, clock: Clock, store: ObjectStore) -> None:
    """It works for 50 minutes on one unit, and says so every minute."""
    finish(store, *range(1, UNITS))
    slow = open_claims(run, "slow", clock)
    assert slow.take() == 0
    since = clock.now

    def meanwhile() -> None:
        slow.renew()
        if clock.now - since > 3000:
            finish(store, 0)
            slow.release(0)

    clock.then = meanwhile
    assert open_claims(run, "b", clock).take() is None
    assert clock.now - since > 3000


def test_renewing_often_writes_rarely(run: Run, clock: Clock) -> None:
    """Twice in 450 s for each of two units: the lease is 600 s."""

    class Counting(Wrapped):
        puts = 0

        def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
            self.puts += 1
            return super().put(key, data, if_absent=if_absent)

    store = Counting(open_store(run.store.activations))
    claims = open_claims(run, "a", clock, store)
    claims.take()
    claims.take()
    store.puts = 0
    for _ in range(450):
        claims.renew()
        clock.now += 1
    assert store.puts == 4


def test_a_released_unit_is_free_for_others_at_once(
    run: Run, clock: Clock, store: ObjectStore
) -> None:
    a = open_claims(run, "a", clock)
    a.take()
    a.take()
    a.release_all()
    assert claimed(store) == {}
    assert open_claims(run, "b", clock).take() == 0
    assert clock.waits == 0


def test_release_counts_what_is_done(run: Run, clock: Clock, store: ObjectStore) -> None:
    claims = open_claims(run, "a", clock)
    assert (claims.take(), claims.take()) == (0, 1)
    finish(store, 0)
    claims.release(0)
    claims.release(1)
    assert claims.done() == 1
    assert claims.take() == 1


def test_take_ends_when_all_is_done_or_in_own_hands(
    run: Run, clock: Clock, store: ObjectStore
) -> None:
    finish(store, *range(2, UNITS))
    claims = open_claims(run, "a", clock)
    assert [claims.take(), claims.take(), claims.take()] == [0, 1, None]
    assert claims.pending()
    finish(store, 0, 1)
    claims.release_all()
    assert not claims.pending()
    assert claims.take() is None
    assert clock.waits == 0


def test_take_waits_for_others_and_ends_when_they_finish(
    run: Run, clock: Clock, store: ObjectStore
) -> None:
    finish(store, *range(1, UNITS))
    open_claims(run, "b", clock).take()
    clock.then = lambda: finish(store, 0) if clock.waits == 5 else None
    claims = open_claims(run, "a", clock)
    assert claims.take() is None
    assert (clock.waits, claims.pending()) == (5, False)


def test_take_ends_when_the_producer_is_stopped(run: Run, clock: Clock, store: ObjectStore) -> None:
    finish(store, *range(1, UNITS))
    open_claims(run, "b", clock).take()
    clock.then = clock.set
    claims = open_claims(run, "a", clock)
    assert claims.take() is None
    assert claims.pending()


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


def test_a_claim_released_in_the_instant_of_looking_is_no_error(run: Run, clock: Clock) -> None:
    class Racing(Wrapped):
        def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
            if key == "claims/00000000.json":
                self.delete(key)
                raise ObjectNotFoundError("no such object", url=self.url, key=key)
            return super().get(key, start, stop)

    open_claims(run, "b", clock).take()
    claims = open_claims(run, "a", clock, Racing(open_store(run.store.activations)))
    assert [claims.take(), claims.take()] == [1, 0]
