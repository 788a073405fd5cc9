"""The stream of rows. `make_run` gives 16 training units in 4 streams, read 3 at a time."""

import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import dist_sae.data.activation_set
import dist_sae.data.loader
import dist_sae.data.shard
import dist_sae.data.streams
from dist_sae.config import Run
from dist_sae.data.plan import PLAN_KEY
from dist_sae.data.shard import manifest_key, read_manifest
from dist_sae.data.streams import Stream, StreamCursor
from dist_sae.errors import (
    CorruptObjectError,
    DataExhaustedError,
    ObjectNotFoundError,
    Stopped,
)
from dist_sae.logs import SUPERVISED
from dist_sae.producing.planner import plan
from dist_sae.storage import Entry, ObjectStore, open_store
from dist_sae.storage.records import seal
from tests.runs import DOCUMENT_ROWS, make_run
from tests.world import (
    RowNumbers,
    Wrapped,
    batches,
    changed,
    fill,
    open_loader,
    open_stream,
    open_units,
    same,
    take,
)


@dataclass
class World:
    run: Run
    store: ObjectStore
    stream_rows: list[int]
    """Rows of each stream in one pass."""

    @property
    def full_batches(self) -> int:
        return min(self.stream_rows) // 16


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    run = make_run(tmp_path_factory.mktemp("loader"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        made = fill(run, RowNumbers(), monkeypatch)
    store = open_store(run.store.activations)
    assert len(made.train_units) == 16
    rows = [sum(read_manifest(store, u).rows for u in made.stream_units(v)) for v in range(4)]
    return World(run, store, rows)


@pytest.fixture(scope="module")
def old_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Under a plan as they were before documents were dealt by size."""
    run = make_run(tmp_path_factory.mktemp("old"))
    store = open_store(run.store.activations)
    made = plan(run)
    store.put(PLAN_KEY, seal(made.model_copy(update={"unit_rows": None})))
    with pytest.MonkeyPatch.context() as monkeypatch:
        old = fill(run, RowNumbers(), monkeypatch)
    rows = [sum(read_manifest(store, u).rows for u in old.stream_units(v)) for v in range(4)]
    return World(run, store, rows)


def ids(acts: Tensor | list[Tensor]) -> list[int]:
    return [int(i) for i in (acts if isinstance(acts, Tensor) else torch.cat(acts))[:, 0]]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_divide_each_global_batch(world: World, ranks: int) -> None:
    """Ranks' parts, one after the other, are bitwise the batch of a single rank."""
    steps = range(world.full_batches)
    whole = batches(open_units(world.run), steps)
    parts = [batches(open_units(world.run), steps, world=ranks, rank=r) for r in range(ranks)]
    assert same(whole, [torch.cat(part) for part in zip(*parts, strict=True)])
    assert {len(batch) for part in parts for batch in part} == {64 // ranks}


@pytest.mark.parametrize("start", [1, 5, 17, 30, 31, 44])
def test_resuming_at_a_step_gives_the_batches_that_an_undisturbed_run_sees(
    world: World, start: int
) -> None:
    """Within a block, at and across the end of a window (372 of 496 rows), in the second pass."""
    stop = min(start + 8, 2 * world.full_batches)
    whole = batches(open_units(world.run), range(stop), passes=2)
    resumed = batches(open_units(world.run), range(start, stop), passes=2)
    assert same(whole[start:], resumed)


def test_resuming_with_another_number_of_ranks_changes_nothing(world: World) -> None:
    whole = batches(open_units(world.run), range(10))
    first = batches(open_units(world.run), range(4))
    rest = [batches(open_units(world.run), range(4, 10), world=2, rank=r) for r in (0, 1)]
    assert same(whole, first + [torch.cat(part) for part in zip(*rest, strict=True)])


def test_a_resumed_run_reads_no_manifest_of_units_that_it_has_behind_it(world: World) -> None:
    """With the cursors that its last batch had; and gives the same rows as without."""

    class Asked(Wrapped):
        keys_asked: ClassVar[set[str]] = set()

        def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
            self.keys_asked.add(key)
            return super().get(key, start, stop)

    steps = range(world.full_batches - 2, world.full_batches)
    with open_loader(open_units(world.run), range(steps.start)) as loader:
        cursors = [batch.cursors for batch in loader][-1]
    asked = Asked(world.store)
    with open_loader(open_units(world.run, store=asked), steps, cursors=cursors) as loader:
        resumed = [batch.acts for batch in loader]
    assert same(batches(open_units(world.run), steps), resumed)
    assert {key for key in asked.keys_asked if key.startswith("units/")} == {
        manifest_key(unit) for unit in range(12, 16)
    }


def test_one_pass_has_every_training_row_once(world: World) -> None:
    units = open_units(world.run)
    with ThreadPoolExecutor(2) as pool:
        seen = [
            ids(take(open_stream(units, v, pool), rows)) for v, rows in enumerate(world.stream_rows)
        ]
    documents = {
        number
        for unit in units.plan.train_units
        for span in units.plan.units[unit]
        for number in range(span.first, span.first + span.count)
    }
    expected = [d * DOCUMENT_ROWS + i for d in sorted(documents) for i in range(DOCUMENT_ROWS)]
    assert sorted(i for stream in seen for i in stream) == expected


def test_the_batches_of_one_pass_repeat_nothing_and_lack_less_than_a_batch_per_stream(
    world: World,
) -> None:
    seen = ids(batches(open_units(world.run), range(world.full_batches)))
    assert len(set(seen)) == len(seen) == 64 * world.full_batches
    assert min(world.stream_rows) - len(seen) // 4 < 16


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_stream_that_ends_early_reads_its_last_window_again(
    world: World, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams 2 and 3 have 480 rows, or 30 batches, of which the last window, a unit, has 112.

    Ten batches more repeat 160 rows of both and 144 of the others, which have 496; on any number
    of ranks, and from any step on.
    """
    monkeypatch.setattr(dist_sae.data.streams, "MOST_REPEATED_SHARE", 0.4)
    steps, units = range(world.full_batches + 10), open_units(world.run)
    repeated, parts, cursors = 0, [], list[dict[int, StreamCursor]]()
    for rank in range(ranks):
        with open_loader(units, steps, world=ranks, rank=rank) as loader:
            given = list(loader)
        repeated += sum(batch.repeated_rows for batch in given)
        parts.append([batch.acts for batch in given])
        cursors.append(dict(given[34].cursors))
    assert repeated == 2 * 160 + 2 * 144
    whole = [torch.cat(part) for part in zip(*parts, strict=True)]
    assert same(whole, batches(open_units(world.run), steps))
    merged = {v: place for part in cursors for v, place in part.items()}
    for known in (None, merged):
        resumed = batches(open_units(world.run), range(35, 40), cursors=known)
        assert same(whole[35:], resumed)
    for stream, rows in enumerate(world.stream_rows):
        given_rows = ids([batch[16 * stream : 16 * stream + 16] for batch in whole])
        assert len(set(given_rows)) == rows  # all of it, and nothing of another stream
        last = set(given_rows[rows - 112 : rows])
        assert set(given_rows[rows:]) <= last
        assert max(Counter(given_rows).values()) <= 3


@pytest.mark.parametrize(("before", "after"), [(1, 2), (1, 3), (2, 3), (3, 2)])
def test_another_number_of_passes_goes_on_where_the_rows_are(
    world: World, monkeypatch: pytest.MonkeyPatch, before: int, after: int
) -> None:
    """Stream 2 had ended; the place of its last window then lies in another pass."""
    monkeypatch.setattr(dist_sae.data.streams, "MOST_REPEATED_SHARE", 2.0)
    units, n = open_units(world.run), world.stream_rows[2]
    start = n * min(before, after) + 40
    with ThreadPoolExecutor(4) as pool:
        left = open_stream(units, 2, pool, before)
        take(left, start)
        assert left.place.data_pass == min(before, after)
        here = Stream(units, 2, start, after, pool, pool, left.place)
        assert torch.equal(
            take(here, n), take(open_stream(units, 2, pool, after), start + n)[start:]
        )


@pytest.mark.parametrize(("passes", "steps", "share"), [(1, 1, 0.05), (2, 3, 0.05), (2, 2, 0.01)])
def test_no_more_is_read_again_than_an_estimate_may_be_wrong_by(
    world: World, monkeypatch: pytest.MonkeyPatch, passes: int, steps: int, share: float
) -> None:
    """Wherever reading begins. 5% of 480 rows are 24; 1% less than a document of 16 each pass."""
    monkeypatch.setattr(dist_sae.data.streams, "MOST_REPEATED_SHARE", share)
    units, stop = open_units(world.run), passes * world.full_batches + steps
    with open_loader(units, range(stop), passes=passes) as loader:
        given = list(loader)
    for start, known in ((0, None), (stop, None), (stop, given[-1].cursors)):
        with pytest.raises(DataExhaustedError) as caught:
            batches(units, range(start, 300), passes=passes, cursors=known)
        message = str(caught.value)
        assert f"ends after {passes * 480} rows" in message
        assert f"{max(int(share * passes * 480), passes * 16)} were read again" in message
        assert message.endswith("excludes less (activations.exclude)")
        assert caught.value.exit_code == 2


def test_the_second_pass_has_the_same_rows_in_another_order(world: World) -> None:
    units = open_units(world.run)
    last = []
    for number, n in enumerate(world.stream_rows):
        with ThreadPoolExecutor(2) as pool:
            stream = open_stream(units, number, pool, 3)
            one, two, three = (ids(take(stream, n)) for _ in range(3))
        assert sorted(one) == sorted(two) == sorted(three)
        assert one != two
        assert two != three
        last.append([frozenset(order[-100:]) for order in (one, two, three)])
    # the last window is one unit of four; in a new pass it is another one
    assert any(len({*passes}) == 3 and not passes[1] & passes[2] for passes in last)


def test_the_sizes_in_which_a_stream_is_read_do_not_matter(world: World) -> None:
    units = open_units(world.run)
    with ThreadPoolExecutor(2) as pool:
        at_once = take(open_stream(units, 1, pool), 300)
        stream = open_stream(units, 1, pool)
        assert torch.equal(at_once, torch.cat([take(stream, n) for n in (1, 33, 66, 199, 1)]))


def test_streams_of_an_older_plan_end(old_world: World) -> None:
    """It promised nothing: how its streams differ is not known."""
    shortest = min(old_world.stream_rows)
    with pytest.raises(DataExhaustedError) as caught:
        batches(open_units(old_world.run), range(2 * old_world.full_batches + 5), passes=2)
    message = str(caught.value)
    assert f"ends after {2 * shortest} rows (2 passes)" in message
    assert f"about {8 * shortest} rows in all" in message
    assert "raise train.max_passes and start again" in message


class LateUnits(Wrapped):
    """Units appear one by one, in an order of its own, each time a reader finds one missing."""

    def __init__(self, store: ObjectStore, seed: int) -> None:
        super().__init__(store)
        self.hidden = sorted(key for key in store.keys("units/"))
        random.Random(seed).shuffle(self.hidden)
        self.misses = 0

    def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        if key in self.hidden:
            self.misses += 1
            self.hidden.pop()
            raise ObjectNotFoundError("no such object", url=self.url, key=key)
        return super().get(key, start, stop)


@pytest.mark.parametrize("seed", [0, 1])
def test_units_that_come_late_and_in_any_order_are_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(dist_sae.data.activation_set, "POLL_SECONDS", (0.0, 0.001))
    steps = range(world.full_batches)
    store = LateUnits(world.store, seed)
    late = batches(open_units(world.run, store=store), steps)
    assert store.misses > 5
    assert same(batches(open_units(world.run), steps), late)


@pytest.mark.parametrize("sign", ["none", "claim", "unit", "supervised"])
def test_whether_producers_run_is_asked_only_where_nothing_tells(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, sign: str
) -> None:
    """Signs of them: a claim, or a unit made within the time of a lease; or a supervisor."""
    caplog.set_level("INFO")
    monkeypatch.setattr(dist_sae.data.activation_set, "POLL_SECONDS", (0.0, 0.001))
    monkeypatch.setattr(dist_sae.data.activation_set, "SAY_EVERY_SECONDS", 0.0)
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
    open_units(world.run, store=store).manifest(4, told.append)
    assert ("are producers running?" in caplog.text) == (sign == "none")
    assert ("producers are at work" in caplog.text) == (sign != "none")
    assert len(told) == 1


def test_waiting_for_a_unit_ends_when_the_run_is_stopped(world: World) -> None:
    stopping = threading.Event()

    class Nothing(Wrapped):
        def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
            if key.startswith("units/"):
                stopping.set()
                raise ObjectNotFoundError("no such object", url=self.url, key=key)
            return super().get(key, start, stop)

    units = open_units(world.run, stopping, Nothing(world.store))
    with pytest.raises(Stopped):
        batches(units, range(1))
    with pytest.raises(Stopped, match="waiting for unit 3"), ThreadPoolExecutor(1) as pool:
        take(open_stream(units, 3, pool), 1)


def test_a_run_that_is_stopped_still_gets_the_data_that_is_there(world: World) -> None:
    """The trainer decides when to stop; the loader only ends its waits."""
    stopping = threading.Event()
    stopping.set()
    assert len(batches(open_units(world.run, stopping), range(3))) == 3


@pytest.fixture
def own_world(tmp_path: Path, world: World) -> World:
    """A copy that may be damaged."""
    run = make_run(tmp_path)
    store = open_store(run.store.activations)
    for key in world.store.keys(""):
        store.put(key, world.store.get(key))
    return World(run, store, world.stream_rows)


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
    fault = {"flip": "does not match its checksum", "cut": "is cut short"}[damage]
    with pytest.raises(CorruptObjectError, match=f"block 1 {fault}") as caught:
        batches(open_units(own_world.run), range(own_world.full_batches))
    assert caught.value.key == shard.key


def test_a_missing_shard_is_an_error_in_the_trainers_thread(own_world: World) -> None:
    key = read_manifest(own_world.store, 5).sites["synthetic"].key
    own_world.store.delete(key)
    with pytest.raises(CorruptObjectError, match="is gone; delete the unit's manifest") as caught:
        batches(open_units(own_world.run), range(own_world.full_batches))
    assert caught.value.key == key


@pytest.mark.parametrize("change", [{"plan": "0" * 64}, {"rows": "many"}, {"schema_version": 2}])
def test_a_manifest_of_another_plan_or_form_is_an_error(
    own_world: World, change: dict[str, Any]
) -> None:
    key = manifest_key(0)
    own_world.store.put(key, changed(own_world.store.get(key), **change))
    with pytest.raises(CorruptObjectError) as caught:
        batches(open_units(own_world.run), range(1))
    assert caught.value.key == "units/00000000.json"


def test_a_unit_without_rows_is_passed_over(own_world: World) -> None:
    """Unit 4 is the second of stream 0; without its rows the others come as they would."""
    manifest = read_manifest(own_world.store, 4)
    shard = manifest.sites["synthetic"].model_copy(update={"blocks": ()})
    gone = manifest.rows
    manifest = manifest.model_copy(update={"rows": 0, "sites": {"synthetic": shard}})
    own_world.store.put(manifest_key(4), seal(manifest))
    n = own_world.stream_rows[0]
    with ThreadPoolExecutor(2) as pool:
        before = ids(take(open_stream(open_units(own_world.run), 1, pool), 50))
        left = ids(take(open_stream(open_units(own_world.run), 0, pool), n - gone))
        again = ids(take(open_stream(open_units(own_world.run), 0, pool), n - gone + 18))
    assert len(set(left)) == len(set(again)) == n - gone
    assert before == ids(take(open_stream(open_units(own_world.run), 1, Inline()), 50))


class Inline(ThreadPoolExecutor):
    """Runs everything at once, so that what is fetched depends on nothing else."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except DataExhaustedError as exc:
            future.set_exception(exc)
        return future


def test_two_blocks_a_unit_of_the_window_are_in_memory(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 3 units a block in use and one on its way, and one of the next window, of one unit: 7."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def read_block(*args: Any) -> Tensor:
        nonlocal most
        acts = real(*args)
        alive.add(acts)
        most = max(most, len(alive))
        return acts

    real = dist_sae.data.shard.read_acts
    monkeypatch.setattr(dist_sae.data.streams, "read_acts", read_block)
    stream = open_stream(open_units(world.run), 0, Inline(), 2)
    for _ in range(2 * world.stream_rows[0] // 10):
        take(stream, 10)
    assert most == 7


def test_the_loader_does_not_run_ahead_of_the_trainer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches wait and one is in hand: with nobody taking any, a fourth is never begun."""
    begun = threading.Semaphore(0)
    real = Stream.put

    def put(self: Stream, acts: Tensor) -> None:
        begun.release()
        real(self, acts)

    monkeypatch.setattr(Stream, "put", put)
    with open_loader(open_units(world.run), range(world.full_batches)) as loader:
        for _ in range(3 * 4):  # 4 streams
            assert begun.acquire(timeout=30)
        assert not begun.acquire(timeout=0.3)
        next(iter(loader))
        for _ in range(4):
            assert begun.acquire(timeout=30)
        assert not begun.acquire(timeout=0.3)


def test_leaving_the_loader_ends_its_thread(world: World) -> None:
    with open_loader(open_units(world.run), range(world.full_batches)) as loader:
        next(iter(loader))
    loader._thread.join(timeout=30)
    assert not loader._thread.is_alive()


def test_waiting_is_measured(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit that takes .3 s to appear costs the first batch that, and the next ones nothing."""
    monkeypatch.setattr(dist_sae.data.activation_set, "POLL_SECONDS", (0.3, 0.3))
    store = LateUnits(world.store, 0)
    store.hidden = [manifest_key(0)]
    since = time.monotonic()
    with open_loader(open_units(world.run, store=store), range(3)) as loader:
        first, *rest = loader
    assert 0.25 < first.waited_seconds <= time.monotonic() - since
    assert sum(batch.waited_seconds for batch in rest) < 0.25
    assert [first.step, *(batch.step for batch in rest)] == [0, 1, 2]


def test_whoever_waits_for_a_batch_is_told_while_it_lasts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reporter counts the time: after a long wait there may be nobody to count it."""
    monkeypatch.setattr(dist_sae.data.activation_set, "POLL_SECONDS", (0.3, 0.3))
    monkeypatch.setattr(dist_sae.data.loader, "LOOK_UP_SECONDS", 0.05)
    store = LateUnits(world.store, 0)
    store.hidden = [manifest_key(0)]
    told: list[float] = []
    with open_loader(open_units(world.run, store=store), range(2)) as loader:
        first = loader.next(told.append)
        n_told = len(told)
        second = loader.next(told.append)
    assert first is not None
    assert second is not None
    assert n_told >= 2
    assert told[:n_told] == sorted(told[:n_told])  # for how long it has lasted
    assert len(told) <= n_told + 1


def test_rows_of_one_document_rarely_meet_in_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same-document pairs are at most 1.2 x what a uniform shuffle gives.

    1024 documents x 16 rows in 64 units of 2 streams; a uniform shuffle of all rows puts
    1024 C(16, 2) C(64, 2) / C(16384, 2) = 1.85 such pairs in a batch of 64. A producer that wrote
    its rows in any order, documents not spread, would give about 8 x that, for an eighth of the
    units is open at a time.
    """
    run = make_run(
        tmp_path,
        corpus={"kind": "synthetic", "documents": 1024, "document_rows": DOCUMENT_ROWS},
        activations={"streams": 2, "unit_rows": 256, "window_units": 4, "heldout_share": 0.0},
    )
    made = fill(run, RowNumbers(), monkeypatch)
    assert len(made.train_units) == 64
    pairs = [
        int((counts * (counts - 1) // 2).sum())
        for batch in batches(open_units(run), range(256))
        if len(counts := np.unique(batch[:, 1], return_counts=True)[1])
    ]
    uniform = 1024 * (16 * 15 / 2) * (64 * 63 / 2) / (16384 * 16383 / 2)
    assert np.mean(pairs) <= 1.2 * uniform
    thirds = np.array_split(np.array(pairs), 3)
    assert all(part.mean() <= 1.5 * uniform for part in thirds)  # and nowhere much more
