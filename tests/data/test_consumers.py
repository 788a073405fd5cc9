"""How far runs have read, and which data is deleted behind them."""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import pytest

from dist_sae.config import Run
from dist_sae.data.consumers import Consumers, Registration, retired_below
from dist_sae.data.plan import Plan
from dist_sae.data.shard import SHARDS, manifest_key, read_block, read_manifest
from dist_sae.data.streams import StreamCursor
from dist_sae.data.upkeep import gc
from dist_sae.errors import AccessError, CorruptObjectError, DataExhaustedError
from dist_sae.producing.verify import verify
from dist_sae.storage import Entry, ObjectStore, open_store
from dist_sae.storage.records import seal
from tests.runs import make_run
from tests.world import RowNumbers, Wrapped, fill


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with 16 training units in 4 streams."""
    return make_run(tmp_path)


@pytest.fixture
def plan(run: Run, monkeypatch: pytest.MonkeyPatch) -> Plan:
    return fill(run, RowNumbers(), monkeypatch)


@pytest.fixture
def store(run: Run) -> ObjectStore:
    return open_store(run.store.activations)


def registration_of(
    store: ObjectStore, plan: Plan, run: str = "r", *, multi_pass: bool = False
) -> Registration:
    return Finished(Consumers(store, 1.0), plan, run, multi_pass=multi_pass, retires=True)


class Finished(Registration):
    """A registration that waits after each checkpoint until all deletable data is deleted."""

    def checkpointed(self, cursors: Mapping[int, StreamCursor], *, ended: bool = False) -> None:
        super().checkpointed(cursors, ended=ended)
        self.finish()


def everywhere(first: int) -> dict[int, StreamCursor]:
    """Return cursors of all four streams, each in the window that starts with its unit `first`."""
    return {stream: StreamCursor(0, first, 0) for stream in range(4)}


def readable(store: ObjectStore, plan: Plan) -> list[int]:
    units = []
    for unit in range(len(plan.units)):
        try:
            read_block(store, read_manifest(store, unit).sites["synthetic"], 0)
        except CorruptObjectError:
            continue
        units.append(unit)
    return units


def test_the_position_is_that_of_the_slowest_stream(store: ObjectStore, plan: Plan) -> None:
    consumers = Consumers(store, 1.0)
    registration = registration_of(store, plan, multi_pass=True)
    registration.register({})
    assert consumers.slowest() == (0, "r")
    registration.advance(
        {
            0: StreamCursor(0, 3, 90),
            1: StreamCursor(0, 2, 60),
            2: StreamCursor(0, 3, 90),
            3: StreamCursor(0, 2, 60),
        }
    )
    assert consumers.slowest() == (9, "r")  # unit 2 of stream 1 is 1 + 4 * 2
    registration.advance(
        {0: StreamCursor(1, 0, 200), 1: StreamCursor(0, 3, 90)}
    )  # stream 0 is in its second pass, so only stream 1 counts
    assert consumers.slowest() == (13, "r")


def test_a_run_of_one_pass_that_has_ended_still_reads_its_last_windows(
    store: ObjectStore, plan: Plan
) -> None:
    """The last window of a finished stream stays, for rereading until all streams end."""
    registration = registration_of(store, plan)
    registration.register({})
    for cursors in (
        {0: StreamCursor(1, 3, 90), 1: StreamCursor(2, 3, 120), 2: StreamCursor(0, 3, 80)},
    ) * 2:
        registration.advance(cursors)
        registration.checkpointed(cursors)
    assert Consumers(store, 1.0).slowest() == (12, "r")
    assert readable(store, plan)[0] == 12


def test_what_every_run_has_behind_it_is_deleted(store: ObjectStore, plan: Plan) -> None:
    slow, fast = registration_of(store, plan, "slow"), registration_of(store, plan, "fast")
    slow.register({})
    fast.register({})
    fast.checkpointed(everywhere(2))
    fast.checkpointed(everywhere(3))
    assert readable(store, plan) == list(range(17))
    slow.advance(everywhere(3))  # reported, but not yet in a checkpoint
    fast.checkpointed(everywhere(3))
    assert readable(store, plan) == list(range(17))
    # one checkpoint is not enough, because it may turn out to be damaged
    slow.checkpointed(everywhere(1))
    assert readable(store, plan) == list(range(17))
    slow.checkpointed(everywhere(2))
    assert readable(store, plan) == list(range(4, 17))
    slow.checkpointed({}, ended=True)
    assert readable(store, plan) == list(range(12, 17))
    fast.checkpointed({}, ended=True)
    assert readable(store, plan) == [16]  # held-out units are never deleted


def test_a_run_that_had_ended_begins_again_though_all_is_deleted(
    store: ObjectStore, plan: Plan
) -> None:
    """A run that ended can start again, even though all data is deleted.

    A run that is killed after its last report starts from its last checkpoint and reads no rows.
    """
    registration_of(store, plan).checkpointed({}, ended=True)
    assert retired_below(store) == 16
    registration_of(store, plan).register(everywhere(3), ended=True)
    with pytest.raises(DataExhaustedError, match="starts at unit 12"):
        registration_of(store, plan).register(everywhere(3))


def test_manifests_of_deleted_units_stay_so_that_nobody_makes_them_again(
    run: Run, store: ObjectStore, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    registration_of(store, plan).checkpointed({}, ended=True)
    before = list(store.keys())
    fill(run, RowNumbers(), monkeypatch)
    assert list(store.keys()) == before
    found = verify(run)
    assert (found["retired_units"], found["missing_units"], found["bad_objects"]) == (16, 0, {})
    assert found["objects"] == 2  # the held-out unit's manifest and shard


def test_a_run_that_may_go_through_the_data_again_keeps_all_of_it(
    store: ObjectStore, plan: Plan
) -> None:
    keeper, other = (
        registration_of(store, plan, "keeper", multi_pass=True),
        registration_of(store, plan, "other"),
    )
    keeper.register({})
    keeper.checkpointed(everywhere(3))
    other.checkpointed({}, ended=True)
    assert readable(store, plan) == list(range(17))
    keeper.checkpointed({}, ended=True)
    assert readable(store, plan) == [16]


def test_a_run_that_joins_late_is_told_what_is_gone(store: ObjectStore, plan: Plan) -> None:
    registration_of(store, plan, "early").register(everywhere(2))
    with pytest.raises(DataExhaustedError, match="run late starts at unit 0, but units below 8"):
        registration_of(store, plan, "late").register({})
    registration_of(store, plan, "resumed").register(everywhere(2))


def test_nothing_is_kept_for_an_abandoned_run(store: ObjectStore, plan: Plan) -> None:
    class Aged(Wrapped):
        def entries(self, prefix: str = "") -> Iterator[Entry]:
            for entry in super().entries(prefix):
                old = entry.key == "consumers/gone.json"
                yield entry._replace(age_seconds=3601.0 if old else 1.0)

    aged = Aged(store)
    registration_of(aged, plan, "gone").register({})
    registration_of(aged, plan, "alive").register(everywhere(1))
    assert readable(store, plan) == list(range(4, 17))


def test_a_run_that_waits_reports_again_until_it_ends(store: ObjectStore, plan: Plan) -> None:
    """A waiting run repeats its last report unchanged, and reports nothing before the first one."""
    reports: list[bytes] = []
    several = threading.Event()

    class Watched(Wrapped):
        def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
            reports.append(data)
            if len(reports) > 4:
                several.set()
            return super().put(key, data, if_absent=if_absent)

    consumers = Consumers(Watched(store), 0.1 / 3600)
    with Registration(consumers, plan, "r", multi_pass=False, retires=False) as registration:
        assert not several.wait(0.2)
        assert not reports
        registration.register(everywhere(1))
        registration.advance(everywhere(2))
        assert several.wait(60)
    # the first report, perhaps repeated, and then the second
    assert len(list(groupby(reports))) == 2
    assert Consumers(store, 1.0).slowest() == (8, "r")


def test_a_repeated_report_never_overwrites_a_newer_one(store: ObjectStore, plan: Plan) -> None:
    """A slow repetition of an old report does not overwrite the report that the run has ended."""
    repeating, newer, repeated = threading.Event(), threading.Event(), threading.Event()
    reached: list[int] = []

    class Slow(Wrapped):
        def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
            repeats = threading.current_thread().name == "consumer"
            if repeats:
                repeating.set()
                newer.wait(0.5)  # always times out, because the newer report waits for this one
            reached.append(json.loads(data)["reached"])
            if repeats:
                repeated.set()
            elif repeating.is_set():
                newer.set()
            return super().put(key, data, if_absent=if_absent)

    consumers = Consumers(Slow(store), 0.1 / 3600)
    with Registration(consumers, plan, "r", multi_pass=False, retires=False) as registration:
        registration.register({})
        assert repeating.wait(60)
        registration.checkpointed({}, ended=True)
        assert repeated.wait(60)
    assert reached[-1] == 16
    assert reached == sorted(reached)


def test_a_position_beyond_the_data_deletes_no_more_than_there_is(
    store: ObjectStore, plan: Plan
) -> None:
    Consumers(store, 1.0).report("odd", reached=10_000, needed=10_000)
    Consumers(store, 1.0).retire(plan)
    assert retired_below(store) == 16
    assert readable(store, plan) == [16]


def test_a_run_that_ends_before_all_units_are_made_deletes_those_there_are(
    store: ObjectStore, plan: Plan
) -> None:
    for unit in (7, 15):
        store.delete(manifest_key(unit))
    Consumers(store, 1.0).report("world", reached=16, needed=16)
    Consumers(store, 1.0).retire(plan)
    assert {int(key["unit"]) for key in SHARDS.keys(store)} == {7, 15, 16}


def test_shards_are_deleted_together_while_saving_goes_on(store: ObjectStore, plan: Plan) -> None:
    """Deletion runs in the background and takes one request for 16 units.

    The store does not finish deleting before the second report.
    """
    reported, asked = threading.Event(), list[int]()

    class Slow(Wrapped):
        def delete_many(self, keys: Sequence[str]) -> None:
            assert reported.wait(60)
            asked.append(len(keys))
            super().delete_many(keys)

    consumers = Consumers(Slow(store), 1.0)
    with Registration(consumers, plan, "r", multi_pass=False, retires=True) as registration:
        registration.register({})
        registration.checkpointed({}, ended=True)
        reported.set()
    assert asked == [16]
    assert readable(store, plan) == [16]


def test_a_shard_that_cannot_be_deleted_ends_the_run(store: ObjectStore, plan: Plan) -> None:
    class Locked(Wrapped):
        def delete_many(self, keys: Sequence[str]) -> None:
            raise AccessError("access denied", url=self.url, key=keys[0])

    consumers = Consumers(Locked(store), 1.0)

    def run() -> None:
        with Registration(consumers, plan, "r", multi_pass=False, retires=True) as registration:
            registration.register({})
            registration.checkpointed({}, ended=True)

    with pytest.raises(AccessError, match="access denied"):
        run()


def test_a_crash_between_the_word_and_the_deed_leaves_orphans_that_gc_finds(
    run: Run, store: ObjectStore, plan: Plan
) -> None:
    class Dying(Wrapped):
        def delete_many(self, *_: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registration_of(Dying(store), plan).register(everywhere(1))
    assert retired_below(store) == 4
    # too young: a producer may still be about to name the shards in a manifest
    assert gc(run, hours=1.0, delete=True)["orphans"] == 0
    found = gc(run, hours=0.0, delete=False)
    assert (found["orphans"], found["deleted"]) == (4, False)
    assert readable(store, plan) == list(range(17))
    assert gc(run, hours=0.0, delete=True)["orphans"] == 4
    assert readable(store, plan) == list(range(4, 17))


def test_gc_finds_what_dead_and_slow_producers_left(
    run: Run, store: ObjectStore, plan: Plan
) -> None:
    """`gc` finds a shard of a unit without a manifest, and a second shard of a unit with one."""
    named = read_manifest(store, 3).sites["synthetic"].key
    store.put("shards/synthetic/00000003-aaaaaaaa.tar", b"12345")
    store.delete("units/00000005.json")
    lost = list(store.keys("shards/synthetic/00000005-"))
    found = gc(run, hours=0.0, delete=True)
    assert sorted(found["keys"]) == ["shards/synthetic/00000003-aaaaaaaa.tar", *lost]
    assert found["bytes"] > 5
    assert store.size(named)
    assert verify(run)["missing_units"] == 1
    assert gc(run, hours=0.0, delete=True)["orphans"] == 0


@pytest.mark.parametrize(
    "named",
    [
        "shards/synthetic/00000009-0a1b2c3d.tar",  # of another unit
        "shards/other/00000002-0a1b2c3d.tar",  # of another site
        "shards/synthetic/../../00000002-0a1b2c3d.tar",
        "plan.json",
        "../runs/world/run.yaml",
    ],
)
def test_a_manifest_cannot_choose_what_is_deleted(
    store: ObjectStore, plan: Plan, named: str
) -> None:
    """A manifest with keys outside its own unit and site deletes nothing.

    The manifest has a valid seal, because anyone who can write to the bucket can seal one.
    """
    manifest = read_manifest(store, 2)
    shard = manifest.sites["synthetic"].model_copy(update={"key": named})
    store.put(manifest_key(2), seal(manifest.model_copy(update={"sites": {"synthetic": shard}})))
    deleted = list[str]()

    class Noted(Wrapped):
        def delete_many(self, keys: Sequence[str]) -> None:
            deleted.extend(keys)

    Consumers(store, 1.0).report("world", reached=16, needed=16)
    with pytest.raises(
        CorruptObjectError, match="is not a shard of synthetic of unit 2; delete the"
    ):
        Consumers(Noted(store), 1.0).retire(plan)
    assert deleted == []
