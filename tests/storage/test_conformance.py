"""What every object store must do, tried on a folder and on an S3 server alike."""

import errno
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    IncompleteReadError,
    NoCredentialsError,
    ReadTimeoutError,
)
from botocore.response import StreamingBody

from dist_sae.config.data import S3Config
from dist_sae.errors import (
    AccessError,
    ObjectNotFoundError,
    StoreError,
    StoreFullError,
    UnavailableError,
)
from dist_sae.storage import ObjectStore, open_store
from tests.conftest import Bucket

METHODS: dict[str, Callable[[ObjectStore], object]] = {
    "get": lambda store: store.get("a/b"),
    "put": lambda store: store.put("a/b", b""),
    "size": lambda store: store.size("a/b"),
    "keys": lambda store: list(store.keys("a/b")),
    "delete": lambda store: store.delete("a/b"),
}


@pytest.fixture
def s3_store(bucket: Bucket) -> ObjectStore:
    return open_store(f"s3://{bucket.name}/some/prefix", S3Config(endpoint_url=bucket.endpoint_url))


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "file":
        return open_store((tmp_path / "new" / "store with space").as_uri())
    s3: ObjectStore = request.getfixturevalue("s3_store")
    return s3


def test_put_object_is_got_back(store: ObjectStore) -> None:
    content = bytes(range(256)) * 3
    assert store.put("deep/er/key", content)
    assert store.get("deep/er/key") == content
    assert store.size("deep/er/key") == 768
    assert store.put("empty", b"")
    assert store.get("empty") == b""
    assert store.size("empty") == 0


@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, None), (3, None), (0, 4), (3, 7), (9, 10), (5, 5), (7, 3), (8, 99), (10, 12), (99, None)],
)
def test_get_cuts_a_range_as_a_slice_does(store: ObjectStore, start: int, stop: int | None) -> None:
    store.put("key", b"0123456789")
    assert store.get("key", start, stop) == b"0123456789"[start:stop]


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


def test_put_if_absent_has_one_winner_among_racing_writers(store: ObjectStore) -> None:
    n_writers = 8
    barrier = threading.Barrier(n_writers)

    def race(writer: int, key: str) -> bool:
        barrier.wait()
        return store.put(key, b"%d" % writer, if_absent=True)

    for key in ("folder/a", "folder/b", "c"):
        with ThreadPoolExecutor(n_writers) as pool:
            won = list(pool.map(race, range(n_writers), [key] * n_writers))
        assert sum(won) == 1
        assert store.get(key) == b"%d" % won.index(True)
    assert list(store.keys()) == ["c", "folder/a", "folder/b"]


def test_keys_are_sorted_over_folders_and_filtered_by_prefix(store: ObjectStore) -> None:
    # "-" < "." < "/" < "0": the order is that of whole keys, not of folder after folder
    keys = ["a", "a-b", "a.c", "a1", "d/x", "d/y/z", "d-x", "d0", "\u00e9", "\U0001f600", "\uffee"]
    for key in keys:
        store.put(key, b"")
    assert list(store.keys()) == sorted(keys)
    assert list(store.keys("d")) == ["d-x", "d/x", "d/y/z", "d0"]
    assert list(store.keys("d/")) == ["d/x", "d/y/z"]
    assert list(store.keys("d/y")) == ["d/y/z"]
    assert list(store.keys("d/y/z")) == ["d/y/z"]
    assert list(store.keys("none/at/all")) == []


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
    store.put("key", b"content")
    again = pickle.loads(pickle.dumps(store))
    assert again.url == store.url
    assert again.get("key") == b"content"


# --- folders


def test_writer_that_dies_leaves_nothing_to_see(tmp_path: Path) -> None:
    # dies with everything written and nothing published
    code = """
import os, signal, sys
from dist_sae.storage import open_store
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
open_store(sys.argv[1]).put("units/1.json", b"content")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert any(path.is_file() for path in tmp_path.rglob("*"))  # it had begun to write
    store = open_store(str(tmp_path))
    assert list(store.keys()) == []
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
    """A folder with little room: a real file system where we may mount one."""
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
    def refuse(*_: Any, **__: Any) -> None:  # root may do everything, so it cannot be had for real
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", refuse)
    store = open_store(str(tmp_path))
    for method in (METHODS["get"], METHODS["put"]):
        with pytest.raises(AccessError, match="check the folder's owner and permissions"):
            method(store)


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
        if str(path).endswith("claims"):  # its last claim was released since it was listed
            store.delete("claims/1")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanish)
    assert list(store.keys()) == ["units/1"]


def test_plain_path_and_url_are_the_same_store(tmp_path: Path) -> None:
    open_store(str(tmp_path / "a b%20c")).put("key", b"content")
    assert open_store((tmp_path / "a b%20c").as_uri()).get("key") == b"content"


# --- S3


def test_s3_keys_go_over_pages(
    bucket: Bucket, s3_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "5")  # of a page; 1,000 on S3
    keys = [f"units/{i:02d}" for i in range(12)]
    for key in keys:
        s3_store.put(key, b"")
    page = bucket.client.list_objects_v2(Bucket=bucket.name)
    assert page["KeyCount"] == 5
    assert page["IsTruncated"]
    assert list(s3_store.keys("units/")) == keys


def test_s3_stores_of_other_prefixes_do_not_meet(bucket: Bucket) -> None:
    config = S3Config(endpoint_url=bucket.endpoint_url)
    names = ("", "/a", "/a/b", "/ab")
    for name in names:
        open_store(f"s3://{bucket.name}{name}", config).put("key", name.encode())
    assert list(open_store(f"s3://{bucket.name}/a", config).keys()) == ["b/key", "key"]
    found = bucket.client.list_objects_v2(Bucket=bucket.name)["Contents"]
    assert [entry["Key"] for entry in found] == ["a/b/key", "a/key", "ab/key", "key"]


def test_s3_bucket_that_does_not_exist_is_an_access_error(bucket: Bucket) -> None:
    store = open_store("s3://no-such-bucket/p", S3Config(endpoint_url=bucket.endpoint_url))
    for method in METHODS.values():
        with pytest.raises(AccessError) as caught:
            method(store)
        assert str(caught.value) == (
            "s3://no-such-bucket/p: no such bucket; create it or correct the URL"
        )
        assert caught.value.url == "s3://no-such-bucket/p"


def test_s3_bucket_name_that_cannot_be_is_an_access_error(bucket: Bucket) -> None:
    store = open_store("s3://my bucket!/p", S3Config(endpoint_url=bucket.endpoint_url))
    with pytest.raises(AccessError) as caught:
        store.get("key")
    assert str(caught.value) == "s3://my bucket!/p: not a valid bucket name; correct the URL"


def test_s3_endpoint_that_does_not_answer_is_told_within_seconds(bucket: Bucket) -> None:
    with socket.socket() as closed:  # bound and not listening: nobody else gets the port
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        store = open_store(f"s3://{bucket.name}", S3Config(endpoint_url=endpoint))
        since = time.monotonic()
        with pytest.raises(UnavailableError) as caught:
            store.get("key")
        seconds = time.monotonic() - since
    assert f"{endpoint} does not answer" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert seconds < 5


def test_s3_without_credentials_is_an_access_error(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for variable in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(variable, str(tmp_path / "none"))
    store = open_store(f"s3://{bucket.name}/p", S3Config(endpoint_url=bucket.endpoint_url))
    with pytest.raises(AccessError, match="no credentials found; set AWS_ACCESS_KEY_ID") as caught:
        store.get("key")
    assert caught.value.url == store.url
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(AccessError, match=r"profile .nobody. could not be found"):
        store.get("key")


def test_s3_with_wrong_credentials_is_an_access_error(bucket: Bucket) -> None:
    def check_credentials(after: str) -> None:
        request = urllib.request.Request(
            f"{bucket.endpoint_url}/moto-api/reset-auth",
            data=after.encode(),
            headers={"Content-Type": "text/plain"},
        )
        urllib.request.urlopen(request).close()

    store = open_store(f"s3://{bucket.name}", S3Config(endpoint_url=bucket.endpoint_url))
    check_credentials("0")
    try:
        with pytest.raises(AccessError, match="check AWS_ACCESS_KEY_ID"):
            store.get("key")
        with pytest.raises(AccessError, match="check the credentials"):
            store.size("key")  # a HEAD has no body that could say more
    finally:
        check_credentials("inf")


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("AccessDenied", AccessError),
        ("403", AccessError),
        ("SignatureDoesNotMatch", AccessError),
        ("ExpiredToken", AccessError),
        ("RequestTimeTooSkewed", AccessError),
        ("QuotaExceeded", StoreFullError),
        ("507", StoreFullError),
        ("XMinioStorageFull", StoreFullError),
        ("SlowDown", UnavailableError),
        ("503", UnavailableError),
        ("InternalError", UnavailableError),
        ("NoSuchKey", ObjectNotFoundError),
        ("SomethingElse", StoreError),
    ],
)
def test_s3_answers_become_errors_of_ours(
    s3_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, code: str, error: type[StoreError]
) -> None:
    def answer(*_: Any, **__: Any) -> None:
        raise ClientError({"Error": {"Code": code, "Message": "said\nthe server"}}, "Operation")

    monkeypatch.setattr("botocore.client.BaseClient._make_api_call", answer)
    for name, method in METHODS.items():
        with pytest.raises(StoreError) as caught:
            method(s3_store)
        # where HEAD does not find an object, HEAD of the bucket does not find that, too
        head = code == "NoSuchKey" and name == "size"
        assert type(caught.value) is (AccessError if head else error)
        assert str(caught.value).startswith(s3_store.url)
        assert "\n" not in str(caught.value)
        assert caught.value.url == s3_store.url


@pytest.mark.parametrize(
    ("exception", "error"),
    [
        (NoCredentialsError(), AccessError),
        (CredentialRetrievalError(provider="sso", error_msg="expired"), AccessError),
        (ReadTimeoutError(endpoint_url="http://x"), UnavailableError),
        (BotoCoreError(), StoreError),
    ],
)
def test_s3_client_errors_become_errors_of_ours(
    s3_store: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
    exception: Exception,
    error: type[StoreError],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise exception

    monkeypatch.setattr("botocore.client.BaseClient._make_api_call", fail)
    with pytest.raises(StoreError) as caught:
        s3_store.put("key", b"")
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n_failures", [1, 4, 5])
def test_s3_get_asks_again_when_the_connection_breaks_on_the_way(
    s3_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, n_failures: int
) -> None:
    s3_store.put("key", b"content")
    left = n_failures
    read = StreamingBody.read

    def break_off(body: StreamingBody, *arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            body.close()
            raise IncompleteReadError(actual_bytes=1, expected_bytes=7)
        return read(body, *arguments)

    monkeypatch.setattr(StreamingBody, "read", break_off)
    if n_failures < 5:
        assert s3_store.get("key") == b"content"
    else:
        with pytest.raises(UnavailableError):
            s3_store.get("key")


def test_s3_put_if_absent_gives_up_when_others_write_for_ever(
    s3_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*_: Any, **__: Any) -> None:
        raise ClientError({"Error": {"Code": "ConditionalRequestConflict"}}, "PutObject")

    monkeypatch.setattr("botocore.client.BaseClient._make_api_call", answer)
    with pytest.raises(UnavailableError, match="others write it"):
        s3_store.put("key", b"", if_absent=True)
    with pytest.raises(StoreError):
        s3_store.put("key", b"")
