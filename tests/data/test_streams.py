"""The rows of a stream: that all are read, in which order, and what follows the last one."""

import weakref
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dist_sae.data.shard
import dist_sae.data.streams
from dist_sae.data.plan import PLAN_KEY
from dist_sae.data.shard import manifest_key, read_manifest
from dist_sae.data.streams import Stream, StreamCursor
from dist_sae.errors import DataExhaustedError
from dist_sae.producing.planner import plan
from dist_sae.storage import open_store
from dist_sae.storage.records import seal
from tests.data.numbered import World, ids
from tests.runs import DOCUMENT_ROWS, make_run
from tests.world import (
    RowNumbers,
    Wrapped,
    batches,
    fill,
    only,
    open_activation_set,
    open_loader,
    open_stream,
    same,
    take,
)


@pytest.fixture(scope="module")
def old_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A store whose plan is from before documents were dealt by size."""
    run = make_run(tmp_path_factory.mktemp("old"))
    store = open_store(run.store.activations)
    made = plan(run)
    store.put(PLAN_KEY, seal(made.model_copy(update={"unit_rows": None})))
    with pytest.MonkeyPatch.context() as monkeypatch:
        old = fill(run, RowNumbers(), monkeypatch)
    rows = [sum(read_manifest(store, u).rows for u in old.stream_units(v)) for v in range(4)]
    return World(run, store, rows)


def test_one_pass_has_every_training_row_once(world: World) -> None:
    activation_set = open_activation_set(world.run)
    with ThreadPoolExecutor(2) as pool:
        seen = [
            ids(take(open_stream(activation_set, v, pool), rows))
            for v, rows in enumerate(world.stream_rows)
        ]
    documents = {
        number
        for unit in activation_set.plan.train_units
        for span in activation_set.plan.units[unit]
        for number in range(span.first, span.first + span.count)
    }
    expected = [d * DOCUMENT_ROWS + i for d in sorted(documents) for i in range(DOCUMENT_ROWS)]
    assert sorted(i for stream in seen for i in stream) == expected


@pytest.mark.parametrize(("rows", "units"), [(180, [1, 5, 9]), (192, [1, 5, 9, 13])])
def test_the_next_window_is_read_when_half_of_the_present_one_is_taken(
    world: World, rows: int, units: list[int]
) -> None:
    """The next window is read once half of the current window is taken.

    The first window of stream 1 has three units of 124 rows, and the second one has only the last
    unit.
    """
    read = set[str]()

    class Asked(Wrapped):
        def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
            read.add(key)
            return super().get(key, start, stop)

    activation_set = open_activation_set(world.run, store=Asked(world.store))
    with ThreadPoolExecutor(2) as pool:
        take(open_stream(activation_set, 1, pool), rows)
    manifests = [read_manifest(world.store, unit) for unit in units]
    shards = {shard.key for manifest in manifests for shard in manifest.sites.values()}
    assert read - {PLAN_KEY} == shards | {manifest_key(unit) for unit in units}


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_a_stream_that_ends_early_reads_its_last_window_again(
    world: World, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that ends early repeats its last window, on any number of ranks and from any step.

    Streams 2 and 3 have 480 rows, or 30 batches, of which 112 are in the last window (one unit).
    Ten more batches repeat 160 rows of each of these, and 144 rows of the other streams, which have
    496.
    """
    monkeypatch.setattr(dist_sae.data.streams, "MOST_REPEATED_SHARE", 0.4)
    steps, activation_set = range(world.full_batches + 10), open_activation_set(world.run)
    repeated, parts, cursors = 0, [], list[dict[int, StreamCursor]]()
    for rank in range(ranks):
        with open_loader(activation_set, steps, world=ranks, rank=rank) as loader:
            given = list(loader)
        repeated += sum(batch.repeated_rows for batch in given)
        parts.append([only(batch.acts) for batch in given])
        cursors.append(dict(given[34].cursors))
    assert repeated == 2 * 160 + 2 * 144
    whole = [torch.cat(part) for part in zip(*parts, strict=True)]
    assert same(whole, batches(open_activation_set(world.run), steps))
    merged = {v: place for part in cursors for v, place in part.items()}
    for known in (None, merged):
        resumed = batches(open_activation_set(world.run), range(35, 40), cursors=known)
        assert same(whole[35:], resumed)
    for stream, rows in enumerate(world.stream_rows):
        given_rows = ids([batch[16 * stream : 16 * stream + 16] for batch in whole])
        assert len(set(given_rows)) == rows  # every row of this stream, and no row of another one
        last = set(given_rows[rows - 112 : rows])
        assert set(given_rows[rows:]) <= last
        assert max(Counter(given_rows).values()) <= 3


@pytest.mark.parametrize(("before", "after"), [(1, 2), (1, 3), (2, 3), (3, 2)])
def test_another_number_of_passes_goes_on_where_the_rows_are(
    world: World, monkeypatch: pytest.MonkeyPatch, before: int, after: int
) -> None:
    """A changed number of passes continues at the same rows.

    Stream 2 had ended, so the cursor within its last window belongs to another pass.
    """
    monkeypatch.setattr(dist_sae.data.streams, "MOST_REPEATED_SHARE", 2.0)
    activation_set, n = open_activation_set(world.run), world.stream_rows[2]
    start = n * min(before, after) + 40
    with ThreadPoolExecutor(4) as pool:
        left = open_stream(activation_set, 2, pool, before)
        take(left, start)
        assert left.cursor.data_pass == min(before, after)
        here = Stream(activation_set, 2, start, after, pool, pool, left.cursor)
        assert torch.equal(
            take(here, n), take(open_stream(activation_set, 2, pool, after), start + n)[start:]
        )


@pytest.mark.parametrize(("passes", "steps", "share"), [(1, 1, 0.05), (2, 3, 0.05), (2, 2, 0.01)])
def test_no_more_is_read_again_than_an_estimate_may_be_wrong_by(
    world: World, monkeypatch: pytest.MonkeyPatch, passes: int, steps: int, share: float
) -> None:
    """Repeating rows ends with an error at a fixed share of the stream, wherever reading begins.

    5 % of 480 rows are 24. 1 % is less than one document of 16 rows per pass, so the document
    counts.
    """
    monkeypatch.setattr(dist_sae.data.streams, "MOST_REPEATED_SHARE", share)
    activation_set, stop = open_activation_set(world.run), passes * world.full_batches + steps
    with open_loader(activation_set, range(stop), passes=passes) as loader:
        given = list(loader)
    for start, known in ((0, None), (stop, None), (stop, given[-1].cursors)):
        with pytest.raises(DataExhaustedError) as caught:
            batches(activation_set, range(start, 300), passes=passes, cursors=known)
        message = str(caught.value)
        assert f"ends after {passes * 480} rows" in message
        assert f"{max(int(share * passes * 480), passes * 16)} rows were reread" in message
        assert message.endswith("excludes less (activations.exclude)")
        assert caught.value.exit_code == 2


def test_the_second_pass_has_the_same_rows_in_another_order(world: World) -> None:
    activation_set = open_activation_set(world.run)
    last = []
    for number, n in enumerate(world.stream_rows):
        with ThreadPoolExecutor(2) as pool:
            stream = open_stream(activation_set, number, pool, 3)
            one, two, three = (ids(take(stream, n)) for _ in range(3))
        assert sorted(one) == sorted(two) == sorted(three)
        assert one != two
        assert two != three
        last.append([frozenset(order[-100:]) for order in (one, two, three)])
    # the last window has one unit of four, and a new pass puts another unit there
    assert any(len({*passes}) == 3 and not passes[1] & passes[2] for passes in last)


def test_the_sizes_in_which_a_stream_is_read_do_not_matter(world: World) -> None:
    activation_set = open_activation_set(world.run)
    with ThreadPoolExecutor(2) as pool:
        at_once = take(open_stream(activation_set, 1, pool), 300)
        stream = open_stream(activation_set, 1, pool)
        assert torch.equal(at_once, torch.cat([take(stream, n) for n in (1, 33, 66, 199, 1)]))


def test_streams_of_an_older_plan_end(old_world: World) -> None:
    """Streams of an older plan end instead of repeating rows.

    Such a plan does not guarantee how far its streams differ in length.
    """
    shortest = min(old_world.stream_rows)
    with pytest.raises(DataExhaustedError) as caught:
        batches(open_activation_set(old_world.run), range(2 * old_world.full_batches + 5), passes=2)
    message = str(caught.value)
    assert f"ends after {2 * shortest} rows (2 passes)" in message
    assert f"about {8 * shortest} rows in all" in message
    assert "raise train.max_passes and start again" in message


def test_a_unit_without_rows_is_passed_over(own_world: World) -> None:
    """A unit without rows is skipped, and the other rows of its stream are unaffected.

    Unit 4 is the second unit of stream 0.
    """
    manifest = read_manifest(own_world.store, 4)
    shard = manifest.sites["synthetic"].model_copy(update={"blocks": ()})
    gone = manifest.rows
    manifest = manifest.model_copy(update={"rows": 0, "sites": {"synthetic": shard}})
    own_world.store.put(manifest_key(4), seal(manifest))
    n = own_world.stream_rows[0]
    with ThreadPoolExecutor(2) as pool:
        before = ids(take(open_stream(open_activation_set(own_world.run), 1, pool), 50))
        left = ids(take(open_stream(open_activation_set(own_world.run), 0, pool), n - gone))
        again = ids(take(open_stream(open_activation_set(own_world.run), 0, pool), n - gone + 18))
    assert len(set(left)) == len(set(again)) == n - gone
    assert before == ids(take(open_stream(open_activation_set(own_world.run), 1, Inline()), 50))


class Inline(ThreadPoolExecutor):
    """An executor that runs each task at submission, so that prefetching is deterministic."""

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
    """At most 7 blocks are in memory: two for each of 3 units, and one of the next window.

    Of each unit, one block is in use and one is being read.
    """
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
    stream = open_stream(open_activation_set(world.run), 0, Inline(), 2)
    for _ in range(2 * world.stream_rows[0] // 10):
        take(stream, 10)
    assert most == 7


def test_rows_of_one_document_rarely_meet_in_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same-document pairs in a batch are at most 1.2 x as frequent as in a uniform shuffle.

    There are 1024 documents x 16 rows in 64 units of 2 streams. A uniform shuffle of all rows puts
    1024 C(16, 2) C(64, 2) / C(16384, 2) = 1.85 such pairs in a batch of 64. A producer that did not
    spread the rows of a document would give about 8 x that, because an eighth of the units is open
    at a time.
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
        for batch in batches(open_activation_set(run), range(256))
        if len(counts := np.unique(batch[:, 1], return_counts=True)[1])
    ]
    uniform = 1024 * (16 * 15 / 2) * (64 * 63 / 2) / (16384 * 16383 / 2)
    assert np.mean(pairs) <= 1.2 * uniform
    thirds = np.array_split(np.array(pairs), 3)
    # and no third of the batches has many more
    assert all(part.mean() <= 1.5 * uniform for part in thirds)
