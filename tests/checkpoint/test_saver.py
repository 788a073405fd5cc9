"""Saving in the background: what is copied when, and what happens if a rank fails."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.checkpoint.saver import Saved, Saver
from dist_sae.errors import Stopped, UnavailableError
from dist_sae.storage import ObjectStore, open_store
from tests.checkpoint.test_state import advance, make_run, make_state, tensors
from tests.world import Wrapped


class Held(Wrapped):
    """A store whose writes block until the test allows them."""

    def __init__(self, store: ObjectStore) -> None:
        super().__init__(store)
        self.go = threading.Event()

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        assert self.go.wait(60)
        return super().put(key, data, if_absent=if_absent)


class Down(Wrapped):
    """A store that one rank cannot reach."""

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:  # noqa: ARG002
        raise UnavailableError("does not answer", url=self.url, key=key)


def make_saver(
    store: ObjectStore,
    state: Any,
    durable: Callable[[Saved], None],
    all_gather: Callable[[Any, Any], list[Any]] = lambda value, _: [value],
    *,
    first: bool = True,
    before: Callable[[], None] = lambda: None,
    background: bool = True,
    kind: type[Checkpoints] = Checkpoints,
) -> Saver:
    return Saver(
        checkpoints=kind(store, "run", keep=2),
        state=state,
        scalars={"a": 1},
        all_gather=all_gather,
        writes_manifest=first,
        before_commit=before,
        on_durable=durable,
        last_step=0,
        background=background,
    )


def test_training_goes_on_and_does_not_reach_what_is_saved(tmp_path: Path) -> None:
    state = make_state(make_run(tmp_path, "topk"), "topk")
    advance(state, range(3))
    store, saved = Held(open_store(str(tmp_path))), list[Saved]()
    with make_saver(store, state, saved.append) as saver:
        expected = tensors(state)
        # returns although nothing can be written yet
        saver.save(3, {0: (0, 0, 0)}, heldout_fvu=0.5)
        advance(state, range(3, 6))
        assert not saved
        store.go.set()
    checkpoint = Checkpoints(store, "run", keep=2).open(3)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor), name
    assert [(s.step, s.cursors) for s in saved] == [(3, {0: (0, 0, 0)})]
    assert checkpoint.scalars == {
        "a": 1,
        "heldout_fvu": 0.5,
        "ema_updates": 3,
        "places": {"0": [0, 0, 0]},
    }


def test_where_memory_is_short_training_waits_until_all_is_durable(tmp_path: Path) -> None:
    """Without background saving, `save` returns when all is durable, and copies no weights.

    Only the part that is being uploaded is copied.
    """
    state = make_state(make_run(tmp_path, "topk"), "topk")
    advance(state, range(3))
    store, saved = open_store(str(tmp_path)), list[Saved]()
    written: list[Any] = []

    class Watched(Checkpoints):
        def write(self, step: int, pieces: Any) -> Any:
            written.extend(pieces)
            return super().write(step, written)

    with make_saver(store, state, saved.append, background=False, kind=Watched) as saver:
        saver.save(3, {})
        assert [s.step for s in saved] == [3]
        own = {p.data_ptr() for p in state.sae.parameters()}
        assert own <= {piece.rows.data_ptr() for piece in written}
    checkpoint = Checkpoints(store, "run", keep=2).open(3)
    for name, tensor in tensors(state).items():
        assert torch.equal(checkpoint.read(name), tensor), name


def test_the_step_that_is_saved_already_is_not_saved_again(tmp_path: Path) -> None:
    state = make_state(make_run(tmp_path, "topk"), "topk")
    advance(state, range(1))
    store, saved = open_store(str(tmp_path)), list[Saved]()
    with make_saver(store, state, saved.append) as saver:
        for step in (0, 4, 4):
            saver.save(step, {})
    assert [s.step for s in saved] == [4]


def test_what_belongs_to_a_checkpoint_is_there_before_it(tmp_path: Path) -> None:
    """The history is written before the checkpoint.

    Otherwise a run that dies right after a save would lack the history of the steps before it.
    """
    state = make_state(make_run(tmp_path, "topk"), "topk")
    advance(state, range(1))
    store, seen = open_store(str(tmp_path)), list[list[int]]()

    def before() -> None:
        seen.append(Checkpoints(store, "run", keep=2).steps())

    with make_saver(store, state, lambda _: None, before=before) as saver:
        saver.save(4, {})
    assert seen == [[]]


def test_what_one_rank_cannot_save_is_no_checkpoint(tmp_path: Path) -> None:
    """A rank that cannot save reports why, and no checkpoint is committed.

    The other rank stops too instead of waiting, and exits as one to be restarted.
    """
    state = make_state(make_run(tmp_path, "topk"), "topk")
    advance(state, range(1))
    store = open_store(str(tmp_path))
    meeting, said = threading.Barrier(2, timeout=60), [None, None]

    def rank(number: int) -> None:
        def all_gather(value: Any, _: Any) -> list[Any]:
            said[number] = value
            meeting.wait()
            both = list(said)
            meeting.wait()
            return both

        own = Down(store) if number else store
        with make_saver(own, state, lambda _: None, all_gather, first=number == 0) as saver:
            saver.save(7, {})

    with ThreadPoolExecutor(2) as threads:
        futures = [threads.submit(rank, number) for number in range(2)]
        with pytest.raises(Stopped, match="another rank could not save"):
            futures[0].result()
        with pytest.raises(UnavailableError):
            futures[1].result()
    assert Checkpoints(store, "run", keep=2).steps() == []
