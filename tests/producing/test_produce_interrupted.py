"""Producers that die, hang, are stopped or cannot write leave only whole units behind."""

import json
import threading
from pathlib import Path

import pytest

import dist_sae.data.work_queue
from dist_sae.config import Run
from dist_sae.data.consumers import Consumers
from dist_sae.data.shard import manifest_key, read_manifest
from dist_sae.data.work_queue import Worker, WorkQueue
from dist_sae.errors import Stopped, StoreFullError
from dist_sae.producing.planner import plan
from dist_sae.producing.unit_queue import unit_queue
from dist_sae.storage import ObjectStore, open_store
from tests.producing.producers import (
    UNITS,
    Hooked,
    LetterSource,
    complete_units,
    letters_run,
    start,
    with_source,
    with_store,
)
from tests.world import RowNumbers, Wrapped


def test_a_dead_producers_unit_is_taken_over(
    run: Run, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The units of a dead producer are produced by another one after its lease of .2 s.

    The dead producer had claimed two units.
    """
    monkeypatch.setattr(dist_sae.data.work_queue, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(dist_sae.data.work_queue, "LEASE_SECONDS", 0.2)
    dead = unit_queue(store, plan(run), Worker("dead"), threading.Event(), Consumers(store, 1.0))
    assert (dead.take(), dead.take()) == (0, 1)
    with_source(monkeypatch, RowNumbers())
    start(run, "b")
    assert complete_units(store) == list(range(UNITS))


def test_a_zombie_that_finishes_late_changes_nothing(
    run: Run, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A producer that is suspended for longer than its lease changes nothing when it finishes.

    Another producer has meanwhile produced all units, including the suspended one's.
    """
    monkeypatch.setattr(WorkQueue, "renew", lambda _: None)
    monkeypatch.setattr(dist_sae.data.work_queue, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(dist_sae.data.work_queue, "LEASE_SECONDS", 0.2)

    def others_finish(calls: int) -> None:
        if calls == 0:
            with monkeypatch.context() as m:
                with_source(m, RowNumbers())
                start(run, "fast")
            before.update({key: store.get(key) for key in store.keys("units/")})

    before: dict[str, bytes] = {}
    with_source(monkeypatch, Hooked(others_finish))
    start(run, "zombie")
    assert len(before) == UNITS
    assert {key: store.get(key) for key in store.keys("units/")} == before
    assert {read_manifest(store, unit).producer for unit in complete_units(store)} == {"fast"}


@pytest.mark.parametrize("at", [0, 1, 5, UNITS - 1])
def test_a_stop_leaves_whole_units_only_and_no_claim(
    run: Run, store: ObjectStore, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    stopping = threading.Event()
    with_source(monkeypatch, Hooked(lambda calls: stopping.set() if calls == at else None))
    if at < UNITS - 1:
        with pytest.raises(Stopped):
            start(run, "a", stopping)
    else:  # the last unit is complete, so there is nothing left to stop
        start(run, "a", stopping)
    assert list(store.keys("claims/")) == []
    assert len(complete_units(store)) == at + 1
    with_source(monkeypatch, RowNumbers())
    start(run, "b")
    assert complete_units(store) == list(range(UNITS))


def test_a_stop_within_a_unit_leaves_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = letters_run(tmp_path, monkeypatch, ["abcdefgh"] * 40)
    stopping = threading.Event()
    source = LetterSource(before=lambda calls: stopping.set() if calls == 0 else None)
    with_source(monkeypatch, source)
    with pytest.raises(Stopped, match="stopped within unit 0"):
        start(run, "a", stopping)
    assert list(open_store(run.store.activations).keys()) == ["plan.json"]


def test_a_unit_claimed_in_the_instant_of_a_stop_is_released(
    run: Run, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit that is claimed while the producer fails is released.

    The preparing thread is about to claim unit 1 when the model fails at unit 0.
    """
    claiming, released = threading.Event(), threading.Event()

    class Slow(Wrapped):
        def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
            if key == "claims/00000001.json":
                claiming.set()
                released.wait(0.3)  # always times out, because the release waits for this claim
            return super().put(key, data, if_absent=if_absent)

    def fail(calls: int) -> None:
        claiming.wait(60)
        raise ModelFailureError

    def release_all(self: WorkQueue) -> None:
        real(self)
        released.set()

    real = WorkQueue.release_all
    monkeypatch.setattr(WorkQueue, "release_all", release_all)
    with_store(monkeypatch, Slow(store))
    with_source(monkeypatch, Hooked(fail))
    with pytest.raises(ModelFailureError):
        start(run, "a")
    assert list(store.keys("claims/")) == []


class ModelFailureError(Exception):
    pass


def test_a_kill_between_shard_and_manifest_leaves_no_unit(
    run: Run, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A producer that fails between shard and manifest leaves no unit.

    The manifest is written last, after all shards.
    """
    seen = {}

    class Full(Wrapped):
        def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
            if key == manifest_key(2):
                seen.update(json.loads(data)["sites"]["synthetic"])
                raise StoreFullError("no space left", url=self.url, key=key)
            return super().put(key, data, if_absent=if_absent)

    with_source(monkeypatch, RowNumbers())
    with monkeypatch.context() as m:
        with_store(m, Full(store))
        with pytest.raises(StoreFullError):
            start(run, "a")
    assert store.size(seen["key"]) == seen["bytes"]
    assert complete_units(store) == [0, 1]
    assert list(store.keys("claims/")) == []
    start(run, "a")
    assert complete_units(store) == list(range(UNITS))
