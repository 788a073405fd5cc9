"""Counting the units that are ready to be read, with few requests."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_sae.data import backlog
from dist_sae.data.backlog import ReadyUnits
from dist_sae.data.plan import Plan
from dist_sae.data.shard import manifest_key
from dist_sae.errors import UnavailableError
from dist_sae.storage import open_store
from dist_sae.storage.keys import PAGE
from tests.world import Wrapped

PLAN = Plan.model_construct(settings={}, files=(), document_rows=1.0, n_train_units=2500, units=())


class Listing(Wrapped):
    """A store that lists the manifests of the given units and records the listed prefixes."""

    def __init__(self, folder: Path, units: set[int]) -> None:
        super().__init__(open_store(str(folder)))
        self.units = units
        self.asked: list[str] = []

    def keys(self, prefix: str = "") -> Iterator[str]:
        self.asked.append(prefix)
        return iter(sorted(k for k in map(manifest_key, self.units) if k.startswith(prefix)))


def open_ready(store: Listing, show: Callable[[int], None] = print) -> ReadyUnits:
    return ReadyUnits(store, PLAN, show)


def test_units_are_counted_and_complete_pages_are_not_listed_again(tmp_path: Path) -> None:
    store = Listing(tmp_path, set(range(PAGE)) | {1000, 1002})
    ready = open_ready(store)
    assert ready.count() == 1002
    assert store.asked == ["units/00000", "units/00001", "units/00002"]
    store.asked.clear()
    store.units |= {1001, 2499, 2500}  # the last one, 2500, is held out
    assert ready.count() == 1004
    assert store.asked == ["units/00001", "units/00002"]


def test_a_gap_is_no_complete_page(tmp_path: Path) -> None:
    store = Listing(tmp_path, set(range(1, 2000)))
    ready = open_ready(store)
    assert ready.count() == 1999
    store.units.add(0)
    assert ready.count() == 2000


def test_a_store_that_does_not_answer_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backlog, "LOOK_EVERY_SECONDS", 0.01)
    shown, seen = list[int](), threading.Event()

    class Moody(Listing):
        def keys(self, prefix: str = "") -> Iterator[str]:
            if not self.asked:
                self.asked.append(prefix)
                raise UnavailableError("does not answer", url="s3://bucket")
            return super().keys(prefix)

    def show(units: int) -> None:
        shown.append(units)
        seen.set()

    with open_ready(Moody(tmp_path, {0, 1}), show):
        assert seen.wait(20)
    assert shown[0] == 2
    assert "the ready units could not be counted: s3://bucket: does not answer" in caplog.text
