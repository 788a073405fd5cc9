"""Metrics of a store's operations."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from dist_sae.errors import ObjectNotFoundError, StoreError
from dist_sae.storage import ObjectStore, open_store
from dist_sae.storage.metered import MeteredStore
from dist_sae.telemetry.exporter import Telemetry
from tests.telemetry.scrape import values
from tests.world import Wrapped

PREFIX = "dist_sae_store_"


def test_operations_bytes_and_errors_of_a_folder_are_metered(tmp_path: Path) -> None:
    telemetry = Telemetry("run", "train", None)
    store = open_store(str(tmp_path), meter=telemetry)
    assert isinstance(store, ObjectStore)
    assert store.put("a/key", b"12345", if_absent=True)
    assert not store.put("a/key", b"678", if_absent=True)  # returns False and writes nothing
    store.put_stream("a/key", lambda: (b"12", b"345"))
    assert store.get("a/key", 1, 3) == b"23"
    assert store.size("a/key") == 5
    assert list(store.keys()) == [entry.key for entry in store.entries()] == ["a/key"]
    # a missing object is an answer and does not count as an error
    with pytest.raises(ObjectNotFoundError):
        store.get("another")
    with pytest.raises(StoreError):
        store.put("a/key/below", b"")
    store.delete("a/key")
    found = values(telemetry.render().decode())
    assert found[f"{PREFIX}bytes_total", "in"] == 2
    assert found[f"{PREFIX}bytes_total", "out"] == 10
    counts = {
        name[1]: value
        for name, value in found.items()
        if name[0] == f"{PREFIX}operation_seconds_count"
    }
    assert counts == {"put": 4, "get": 2, "size": 1, "list": 2, "delete": 1}
    errors = {name[1]: n for name, n in found.items() if name[0] == f"{PREFIX}errors_total"}
    assert {error: n for error, n in errors.items() if n} == {"StoreError": 1}


def test_bytes_of_a_write_that_begins_anew_count_once(tmp_path: Path) -> None:
    class Twice(Wrapped):
        def put_stream(self, key: str, content: Callable[[], Iterable[bytes]]) -> None:
            assert next(iter(content())) == b"12"
            self.inner.put_stream(key, content)

    telemetry = Telemetry("run", "train", None)
    store = MeteredStore(Twice(open_store(str(tmp_path))), telemetry)
    store.put_stream("key", lambda: (b"12", b"345"))
    assert store.get("key") == b"12345"
    assert values(telemetry.render().decode())[f"{PREFIX}bytes_total", "out"] == 5
