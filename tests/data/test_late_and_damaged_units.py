"""Units that do not exist yet, and units that are damaged."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import dist_sae.data.activation_set
from dist_sae.data.shard import manifest_key, read_manifest
from dist_sae.errors import CorruptObjectError, ObjectNotFoundError, Stopped
from dist_sae.logs import SUPERVISED
from dist_sae.storage import Entry
from tests.data.numbered import LateUnits, World
from tests.world import Wrapped, batches, changed, open_activation_set, open_stream, same, take


@pytest.mark.parametrize("seed", [0, 1])
def test_units_that_come_late_and_in_any_order_are_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(dist_sae.data.activation_set, "POLL_SECONDS", (0.0, 0.001))
    steps = range(world.full_batches)
    store = LateUnits(world.store, seed)
    late = batches(open_activation_set(world.run, store=store), steps)
    assert store.misses > 5
    assert same(batches(open_activation_set(world.run), steps), late)


@pytest.mark.parametrize("sign", ["none", "claim", "unit", "supervised"])
def test_whether_producers_run_is_asked_only_where_nothing_tells(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, sign: str
) -> None:
    """The warning "are producers running?" appears only without a sign of producers.

    A sign is a claim, a unit written within the time of a lease, or a supervisor.
    """
    caplog.set_level("INFO")
    monkeypatch.setattr(dist_sae.data.activation_set, "POLL_SECONDS", (0.0, 0.001))
    monkeypatch.setattr(dist_sae.data.activation_set, "LOG_EVERY_SECONDS", 0.0)
    young = {"claim": ["claims/00000003.json"], "unit": ["units/00000002.json"]}.get(sign, [])

    class Aged(LateUnits):
        def entries(self, prefix: str = "") -> Iterator[Entry]:
            old = [entry._replace(age_seconds=1e4) for entry in super().entries(prefix)]
            yield from old
            yield from (Entry(key, 0, 1.0) for key in young if key.startswith(prefix))

    if sign == "supervised":
        monkeypatch.setenv(SUPERVISED, "1")
    store = Aged(world.store, 0)
    store.hidden = [manifest_key(4)]
    told: list[float] = []
    open_activation_set(world.run, store=store).manifest(4, told.append)
    assert ("are producers running?" in caplog.text) == (sign == "none")
    assert ("producers are running" in caplog.text) == (sign != "none")
    assert len(told) == 1


def test_waiting_for_a_unit_ends_when_the_run_is_stopped(world: World) -> None:
    stopping = threading.Event()

    class Nothing(Wrapped):
        def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
            if key.startswith("units/"):
                stopping.set()
                raise ObjectNotFoundError("no such object", url=self.url, key=key)
            return super().get(key, start, stop)

    activation_set = open_activation_set(world.run, stopping, Nothing(world.store))
    with pytest.raises(Stopped):
        batches(activation_set, range(1))
    with pytest.raises(Stopped, match="waiting for unit 3"), ThreadPoolExecutor(1) as pool:
        take(open_stream(activation_set, 3, pool), 1)


def test_a_run_that_is_stopped_still_gets_the_data_that_is_there(world: World) -> None:
    """A stopped loader still returns existing data: it only stops waiting.

    When to stop training is up to the trainer.
    """
    stopping = threading.Event()
    stopping.set()
    assert len(batches(open_activation_set(world.run, stopping), range(3))) == 3


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_block_is_an_error_that_names_the_shard(own_world: World, damage: str) -> None:
    shard = read_manifest(own_world.store, 8).sites["synthetic"]
    data = bytearray(own_world.store.get(shard.key))
    block = shard.blocks[1]
    if damage == "flip":
        data[block.offset + block.bytes - 1] ^= 1
    else:
        del data[block.offset + 10 :]
    own_world.store.put(shard.key, bytes(data))
    fault = {"flip": "does not match its checksum", "cut": "is truncated"}[damage]
    with pytest.raises(CorruptObjectError, match=f"block 1 {fault}") as caught:
        batches(open_activation_set(own_world.run), range(own_world.full_batches))
    assert caught.value.key == shard.key


def test_a_missing_shard_is_an_error_in_the_trainers_thread(own_world: World) -> None:
    key = read_manifest(own_world.store, 5).sites["synthetic"].key
    own_world.store.delete(key)
    with pytest.raises(CorruptObjectError, match="is gone; delete the unit's manifest") as caught:
        batches(open_activation_set(own_world.run), range(own_world.full_batches))
    assert caught.value.key == key


@pytest.mark.parametrize("change", [{"plan": "0" * 64}, {"rows": "many"}, {"schema_version": 2}])
def test_a_manifest_of_another_plan_or_form_is_an_error(
    own_world: World, change: dict[str, Any]
) -> None:
    key = manifest_key(0)
    own_world.store.put(key, changed(own_world.store.get(key), **change))
    with pytest.raises(CorruptObjectError) as caught:
        batches(open_activation_set(own_world.run), range(1))
    assert caught.value.key == "units/00000000.json"
