"""Behavior of local folders, beyond what every store does."""

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dist_sae.errors import AccessError, StoreError, StoreFullError
from dist_sae.storage import open_store


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_writer_that_dies_leaves_nothing_to_see(tmp_path: Path) -> None:
    # is killed after all bytes are written, but before the object is published
    code = """
import os, signal, sys
from dist_sae.storage import open_store
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
open_store(sys.argv[1]).put("units/1.json", b"content")
"""
    store = open_store(str(tmp_path))
    store.put("units/0.json", b"")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -9
    # one object and one temporary file
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 2
    assert list(store.keys()) == ["units/0.json"]
    assert store.size("units/1.json") is None
    assert store.put("units/1.json", b"content", if_absent=True)


def test_readers_see_whole_objects_only_while_they_are_overwritten(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    contents = [bytes([i]) * 200_000 for i in range(2)]
    store.put("key", contents[0])
    done = threading.Event()

    def write() -> None:
        for i in range(40):
            store.put("key", contents[i % 2])
        done.set()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        while not done.is_set():
            assert store.get("key") in contents
        writing.result()


@pytest.fixture
def full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with little space: a small mounted file system, or else a failing fsync."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if (
        os.geteuid() == 0
        and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    ):
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
        return

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    yield folder


@pytest.mark.parametrize("if_absent", [False, True])
def test_full_disk_is_reported_and_leaves_nothing(full_disk: Path, *, if_absent: bool) -> None:
    store = open_store(str(full_disk))
    with pytest.raises(StoreFullError, match="no space left") as caught:
        store.put("shards/big", bytes(1_000_000), if_absent=if_absent)
    assert caught.value.key == "shards/big"
    assert list(store.keys()) == []
    assert not any(path.is_file() for path in full_disk.rglob("*"))


def test_full_disk_keeps_the_object_that_was_to_be_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    store.put("key", b"old")

    def refuse(_: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StoreFullError):
        store.put("key", b"new")
    assert store.get("key") == b"old"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_folder_without_permission_is_an_access_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    # simulated, because tests may run as root, which may do everything
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", refuse)
    store = open_store(str(tmp_path))
    with pytest.raises(AccessError, match="check the folder's owner and permissions"):
        store.get("a/b")
    with pytest.raises(AccessError, match="check the folder's owner and permissions"):
        store.put("a/b", b"")


def test_file_in_the_way_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("no folder")
    store = open_store(str(tmp_path))
    with pytest.raises(StoreError) as caught:
        store.put("a/b", b"")
    assert caught.value.key == "a/b"


def test_keys_of_a_folder_that_vanishes_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    store.put("claims/1", b"")
    store.put("units/1", b"")
    scandir = os.scandir

    def vanish(path: Any) -> Any:
        # the folder's last claim was released after the folder was listed
        if str(path).endswith("claims"):
            store.delete("claims/1")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanish)
    assert list(store.keys()) == ["units/1"]


def test_plain_path_and_url_are_the_same_store_which_shows_the_path(tmp_path: Path) -> None:
    folder = tmp_path / "a b%20c \u00e4#1?x"
    open_store(str(folder)).put("key", b"content")
    for url in (folder.as_uri(), f"file://{tmp_path}/a b%2520c \u00e4#1?x"):
        assert open_store(url).get("key") == b"content"
        assert open_store(url).url == str(folder)


def test_object_that_is_deleted_while_listed_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    for key in ("a", "b", "c"):
        store.put(key, b"")
    listing = store.entries()
    assert next(listing).key == "a"
    store.delete("b")
    assert [entry.key for entry in listing] == ["c"]


def test_age_of_a_file_is_its_age(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("key", b"")
    written = (tmp_path / "key").stat().st_mtime
    os.utime(tmp_path / "key", (written - 90, written - 90))
    (entry,) = store.entries()
    assert 90 <= entry.age_seconds < 120


def test_age_is_told_by_the_clock_that_dates_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    # the clock of a machine that is five minutes ahead
    monkeypatch.setattr(time, "time", lambda: now() + 300)
    store = open_store(str(tmp_path))
    store.put("key", b"")
    (entry,) = store.entries()
    assert 0 <= entry.age_seconds < 60
    assert files(tmp_path) == ["key"]


def test_ages_in_a_folder_that_cannot_be_written_to_are_by_this_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(str(tmp_path))
    store.put("key", b"")

    # simulated, because tests may run as root, which may do everything
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "touch", refuse)
    assert [entry.key for entry in store.entries()] == ["key"]
    assert "ages of objects are measured by this machine's clock" in caplog.text
