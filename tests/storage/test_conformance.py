"""Behavior that every object store must have: a folder and three S3 servers."""

import itertools
import logging
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dist_sae.config.data import S3Config
from dist_sae.errors import CorruptObjectError, ObjectNotFoundError
from dist_sae.storage import ObjectStore, open_store, s3
from tests.conftest import Bucket

LIARS = {"rclone"}
"""Servers that accept conditions on writes and ignore them."""
FOLDERWISE = {"seaweedfs"}
"""Servers that list folder by folder, and not in the order of whole keys."""


@pytest.fixture(params=["file", "moto", "seaweedfs", "rclone"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def store(kind: str, make_bucket: Callable[[str], Bucket], tmp_path: Path) -> ObjectStore:
    if kind == "file":
        return open_store((tmp_path / "new" / "store with space").as_uri())
    bucket = make_bucket(kind)
    config = S3Config(endpoint_url=bucket.endpoint_url, deadline_seconds=10)
    return open_store(f"s3://{bucket.name}/some/prefix", config)


def test_put_object_is_got_back(store: ObjectStore) -> None:
    content = bytes(range(256)) * 3
    assert store.put("deep/er/key", content)
    assert store.get("deep/er/key") == content
    assert store.size("deep/er/key") == 768
    assert store.put("empty", b"")
    assert store.get("empty") == b""
    assert store.size("empty") == 0


def test_get_cuts_a_range_as_a_slice_does(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"0123456789"
    store.put("key", content)
    spans = [(0, None), (3, None), (9, None), (10, None), (99, None), (0, 4), (3, 7), (9, 10)]
    spans += [(5, 5), (7, 3), (0, 0), (8, 99), (10, 12), (0, 99), (1, 10)]
    for part_bytes in (3, 5, 2**24):
        monkeypatch.setattr(s3, "PART_BYTES", part_bytes)
        for start, stop in spans:
            assert store.get("key", start, stop) == content[start:stop], (start, stop, part_bytes)


def test_large_object_is_got_back(store: ObjectStore) -> None:
    content = os.urandom(2**20) * 33  # three parts, of which the last is smaller
    assert store.put("large", content)
    assert store.get("large") == content
    assert store.size("large") == len(content)
    part = 2**24
    assert store.get("large", part - 5, 2 * part + 5) == content[part - 5 : 2 * part + 5]


def test_stream_is_got_back_whatever_its_pieces(store: ObjectStore) -> None:
    content = os.urandom(2**20) * 37  # three parts, of which the last is smaller
    cuts = [0, 0, 1, 2**24 - 1, 2**24, 3 * 2**24 // 2, len(content), len(content)]
    spans = list(itertools.pairwise(cuts))
    store.put_stream("large", lambda: (content[start:stop] for start, stop in spans))
    assert store.get("large") == content
    store.put_stream("large", lambda: (b"sm", b"", b"all"))
    assert store.get("large") == b"small"
    store.put_stream("none/at/all", lambda: ())
    assert store.size("none/at/all") == 0


@pytest.mark.parametrize("before", [0, 40])
def test_stream_that_breaks_off_changes_nothing(store: ObjectStore, before: int) -> None:
    store.put("key", b"old")

    def content() -> Iterator[bytes]:
        yield from (bytes(2**20) for _ in range(before))
        raise CorruptObjectError("damaged", url="other")

    for key in ("key", "new"):
        with pytest.raises(CorruptObjectError):
            store.put_stream(key, content)
    assert store.get("key") == b"old"
    assert list(store.keys()) == ["key"]


@pytest.mark.parametrize("span", [(0, None), (2, 4), (4, 4)])
def test_get_raises_when_there_is_no_object(
    store: ObjectStore, span: tuple[int, int | None]
) -> None:
    with pytest.raises(ObjectNotFoundError) as caught:
        store.get("folder/none", *span)
    assert caught.value.url == store.url
    assert caught.value.key == "folder/none"
    assert str(caught.value) == f"{store.url}/folder/none: no such object"


def test_missing_object_has_no_size_and_can_be_deleted(store: ObjectStore) -> None:
    assert store.size("folder/none") is None
    assert list(store.keys()) == []
    store.delete("folder/none")


def test_several_objects_are_deleted_together(store: ObjectStore) -> None:
    keys = ["a", "b/c d", "b/ü&<e>", "b/none"]
    for key in (*keys[:3], "kept"):
        store.put(key, b"content")
    store.delete_many(keys)
    assert list(store.keys()) == ["kept"]
    store.delete_many(())


def test_put_overwrites(store: ObjectStore) -> None:
    store.put("key", b"long content")
    assert store.put("key", b"short")
    assert store.get("key") == b"short"


def test_put_if_absent_leaves_what_is_there(store: ObjectStore) -> None:
    assert store.put("key", b"first", if_absent=True)
    assert not store.put("key", b"second", if_absent=True)
    assert store.get("key") == b"first"
    store.delete("key")
    assert store.put("key", b"third", if_absent=True)
    assert list(store.keys()) == ["key"]  # the probe of the server leaves no object behind


def test_server_that_ignores_conditions_is_found_out(
    kind: str, store: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "dist_sae"):
        assert store.exclusive == (kind not in LIARS)
        store.put("key", b"", if_absent=True)
        assert store.exclusive == (kind not in LIARS)
    warnings = [record.getMessage() for record in caplog.records if "dist_sae" in record.name]
    assert len(warnings) == (kind in LIARS)
    assert all("does not support If-None-Match" in warning for warning in warnings)


def test_put_if_absent_has_one_winner_among_racing_writers(kind: str, store: ObjectStore) -> None:
    """Exactly one of several writers that race for a key wins.

    On a server that ignores conditions, several may win, which producers tolerate. moto checks and
    writes in two steps, so its races are not judged.
    """
    n_writers = 8
    barrier = threading.Barrier(n_writers)

    def race(writer: int, key: str) -> bool:
        barrier.wait()
        return store.put(key, b"%d" % writer, if_absent=True)

    for key in ("folder/a", "c"):
        with ThreadPoolExecutor(n_writers) as pool:
            won = list(pool.map(race, range(n_writers), [key] * n_writers))
        assert any(won)
        if kind not in (*LIARS, "moto"):
            assert sum(won) == 1
            assert store.get(key) == b"%d" % won.index(True)
    keys = list(store.keys())
    if kind in LIARS:
        keys = sorted(set(keys))  # rclone may list a key twice after a race
    assert keys == ["c", "folder/a"]


def test_entries_tell_bytes_and_age(store: ObjectStore) -> None:
    store.put("folder/a", bytes(5))
    store.put("b", b"")
    entries = list(store.entries())
    assert [(entry.key, entry.bytes) for entry in entries] == [("b", 0), ("folder/a", 5)]
    assert all(0 <= entry.age_seconds < 30 for entry in entries)
    assert [entry.key for entry in store.entries("folder/")] == ["folder/a"]


def test_keys_are_sorted_and_filtered_by_prefix(kind: str, store: ObjectStore) -> None:
    def ordered(*keys: str) -> list[str]:
        # "-" < "." < "/" < "0", so sorting whole keys differs from listing folder by folder
        return sorted(keys, key=lambda key: key.split("/") if kind in FOLDERWISE else [key])

    keys = ["a", "a-b", "a.c", "a1", "d/x", "d/y/z", "d-x", "d0", "\u00e9", "\U0001f600", "\uffee"]
    for key in keys:
        store.put(key, b"")
    assert list(store.keys()) == ordered(*keys)
    assert list(store.keys("d")) == ordered("d-x", "d/x", "d/y/z", "d0")
    assert list(store.keys("d/")) == ["d/x", "d/y/z"]
    assert list(store.keys("d/y")) == ["d/y/z"]
    assert list(store.keys("d/y/z")) == ["d/y/z"]
    assert list(store.keys("none/at/all")) == []


def test_folders_are_listed_without_what_is_in_them(store: ObjectStore) -> None:
    for key in ("a/x", "a/y/z", "a-b/x", "b", "c/d/e", "c/f", "c0"):
        store.put(key, b"")
    assert store.folders("") == ["a", "a-b", "c"]
    assert store.folders("c/") == ["d"]
    assert store.folders("a/y/") == store.folders("none/at/all/") == []


def test_deleted_object_is_gone_and_its_neighbours_are_not(store: ObjectStore) -> None:
    store.put("folder/a", b"")
    store.put("folder/b", b"")
    store.delete("folder/a")
    assert list(store.keys()) == ["folder/b"]
    store.delete("folder/b")
    store.delete("folder/b")
    assert list(store.keys()) == []
    store.put("folder/a", b"again")
    assert store.get("folder/a") == b"again"


def test_store_survives_pickling_when_in_use(store: ObjectStore) -> None:
    store.put("key", b"content", if_absent=True)
    again = pickle.loads(pickle.dumps(store))
    assert again.url == store.url
    assert again.get("key") == b"content"
