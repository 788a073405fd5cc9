"""A rank's batches: the same for any number of ranks and from any step, and not read too early."""

import threading
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import dist_sae.data.activation_set
import dist_sae.data.loader
from dist_sae.checkpoint.lineage import Lineage
from dist_sae.data.shard import manifest_key
from dist_sae.data.streams import Stream
from dist_sae.distributed.mesh import SINGLE_PROCESS
from dist_sae.training.batches import open_loader as open_loader_of_rank
from tests.data.numbered import LateUnits, World
from tests.forks import HANG_SECONDS
from tests.world import Wrapped, batches, only, open_activation_set, open_loader, same


@pytest.mark.parametrize(("ranks", "rows"), [(2, 64), (4, 64), (8, 64), (3, 48)])
def test_ranks_divide_each_global_batch(world: World, ranks: int, rows: int) -> None:
    """The parts of all ranks, concatenated, are bitwise the batch of a single rank.

    There are four streams: several ranks may share one stream, or three ranks may share all four.
    """
    steps = range(world.full_batches)
    whole = batches(open_activation_set(world.run), steps, rows=rows)
    parts = [
        batches(open_activation_set(world.run), steps, rows=rows, world=ranks, rank=r)
        for r in range(ranks)
    ]
    assert same(whole, [torch.cat(part) for part in zip(*parts, strict=True)])
    assert {len(batch) for part in parts for batch in part} == {rows // ranks}


@pytest.mark.parametrize("start", [1, 5, 17, 30, 31, 44])
def test_resuming_at_a_step_gives_the_batches_that_an_undisturbed_run_sees(
    world: World, start: int
) -> None:
    """A resumed run gets the same batches as an undisturbed one.

    Starts within a block, at and across the end of a window (372 of 496 rows), and in the second
    pass.
    """
    stop = min(start + 8, 2 * world.full_batches)
    whole = batches(open_activation_set(world.run), range(stop), passes=2)
    resumed = batches(open_activation_set(world.run), range(start, stop), passes=2)
    assert same(whole[start:], resumed)


def test_resuming_with_another_number_of_ranks_changes_nothing(world: World) -> None:
    whole = batches(open_activation_set(world.run), range(10))
    first = batches(open_activation_set(world.run), range(4))
    rest = [
        batches(open_activation_set(world.run), range(4, 10), world=8, rank=r) for r in range(8)
    ]
    assert same(whole, first + [torch.cat(part) for part in zip(*rest, strict=True)])


def test_a_resumed_run_reads_no_manifest_of_units_that_it_has_behind_it(world: World) -> None:
    """With its last cursors, a resumed run reads no old manifests and gets the same rows."""

    class Asked(Wrapped):
        keys_asked: ClassVar[set[str]] = set()

        def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
            self.keys_asked.add(key)
            return super().get(key, start, stop)

    steps = range(world.full_batches - 2, world.full_batches)
    with open_loader(open_activation_set(world.run), range(steps.start)) as loader:
        cursors = [batch.cursors for batch in loader][-1]
    asked = Asked(world.store)
    with open_loader(open_activation_set(world.run, store=asked), steps, cursors=cursors) as loader:
        resumed = [only(batch.acts) for batch in loader]
    assert same(batches(open_activation_set(world.run), steps), resumed)
    assert {key for key in asked.keys_asked if key.startswith("units/")} == {
        manifest_key(unit) for unit in range(12, 16)
    }


def test_the_loader_does_not_run_ahead_of_the_trainer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no batch taken, the loader assembles three batches and does not begin a fourth.

    Two batches wait in the queue, and the loader waits to add the third.
    """
    begun = threading.Semaphore(0)
    real = Stream.put

    def put(self: Stream, acts: Mapping[str, Tensor]) -> None:
        begun.release()
        real(self, acts)

    monkeypatch.setattr(Stream, "put", put)
    with open_loader(open_activation_set(world.run), range(world.full_batches)) as loader:
        for _ in range(3 * 4):  # each batch puts rows of 4 streams
            assert begun.acquire(timeout=30)
        assert not begun.acquire(timeout=0.3)
        next(iter(loader))
        for _ in range(4):
            assert begun.acquire(timeout=30)
        assert not begun.acquire(timeout=0.3)


def test_leaving_the_loader_ends_its_thread(world: World) -> None:
    with open_loader(open_activation_set(world.run), range(world.full_batches)) as loader:
        next(iter(loader))
    for thread in threading.enumerate():
        if thread.name == "loader":
            thread.join(timeout=30)
            assert not thread.is_alive()


def test_waiting_is_measured(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch reports a wait of .3 s for its unit, and no wait is counted twice."""
    monkeypatch.setattr(dist_sae.data.activation_set, "POLL_SECONDS", (0.3, 0.3))
    store = LateUnits(world.store, 0)
    store.hidden = [manifest_key(0)]
    since = time.monotonic()
    with open_loader(open_activation_set(world.run, store=store), range(3)) as loader:
        first, *rest = loader
    elapsed = time.monotonic() - since
    assert first.waited_seconds > 0.25
    assert first.waited_seconds + sum(batch.waited_seconds for batch in rest) <= elapsed
    assert [first.step, *(batch.step for batch in rest)] == [0, 1, 2]


def test_whoever_waits_for_a_batch_is_told_while_it_lasts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reporter is called while a batch is late.

    It counts the time during the wait, because a process that is killed cannot count it later.
    """
    monkeypatch.setattr(dist_sae.data.loader, "LOOK_UP_SECONDS", 0.05)
    told: list[float] = []
    told_twice = threading.Event()

    class Held(Wrapped):
        """A store that delays unit 0 until the reporter has been called twice."""

        def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
            if key == manifest_key(0):
                assert told_twice.wait(HANG_SECONDS)
            return super().get(key, start, stop)

    def tell(seconds: float) -> None:
        told.append(seconds)
        if len(told) == 2:
            told_twice.set()

    units = open_activation_set(world.run, store=Held(world.store))
    with open_loader(units, range(1)) as loader:
        first = loader.next(tell)
    assert first is not None
    assert told == sorted(told)  # each call reports the time waited so far
    assert 0.05 <= told[0] < told[-1] <= first.waited_seconds


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_for_a_gpu_are_assembled_in_pinned_memory(
    world: World, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Batches for a GPU are pinned, so that the GPU can copy them asynchronously."""
    pinned: list[bool] = []
    empty = torch.empty

    def note(*size: int, pin_memory: bool = False, **others: Any) -> Tensor:
        pinned.append(pin_memory)
        return empty(*size, **others)

    monkeypatch.setattr(torch, "empty", note)
    mesh = SINGLE_PROCESS._replace(device=torch.device(device))
    activation_set = open_activation_set(world.run)
    with open_loader_of_rank(world.run, mesh, activation_set, range(1), Lineage(), None) as loader:
        batch = loader.next()
    assert batch is not None
    assert any(pinned) == (device == "cuda")
    assert same([only(batch.acts)], batches(open_activation_set(world.run), range(1)))
