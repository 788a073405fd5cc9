"""S3 stores: pagination, prefixes, encryption, metrics."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from botocore.exceptions import ClientError

from dist_sae.config.data import S3Config
from dist_sae.errors import AccessError
from dist_sae.storage import ObjectStore, open_store, s3
from tests.conftest import Bucket
from tests.faults import FaultProxy
from tests.storage.endpoints import make_store


def test_nothing_is_asked_of_the_endpoint_before_it_is_needed(bucket: Bucket) -> None:
    with FaultProxy(bucket.endpoint_url, 0, {}) as proxy:
        assert isinstance(make_store(bucket, proxy.endpoint_url), ObjectStore)
        assert not proxy.requests


@pytest.mark.parametrize("kind", ["moto", "seaweedfs", "rclone"])
def test_keys_go_over_pages(
    kind: str, make_bucket: Callable[[str], Bucket], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(make_bucket(kind))
    keys = [f"units/{i:02d}" for i in range(12)]
    for key in keys:
        store.put(key, b"")

    pages: list[Any] = []
    events = store.client.meta.events  # type: ignore[attr-defined]
    events.register(
        "before-parameter-build.s3.ListObjectsV2", lambda params, **_: params.update(MaxKeys=5)
    )
    events.register("after-call.s3.ListObjectsV2", lambda parsed, **_: pages.append(parsed))
    assert list(store.keys("units/")) == keys
    assert [page["KeyCount"] for page in pages] == [5, 5, 2]


def test_a_thousand_objects_are_deleted_with_each_request(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(bucket)
    asked: list[int] = []

    def delete_objects(**request: Any) -> dict[str, Any]:
        asked.append(len(request["Delete"]["Objects"]))
        return {}

    monkeypatch.setattr(store.client, "delete_objects", delete_objects)  # type: ignore[attr-defined]
    store.delete_many([f"key-{i}" for i in range(2001)])
    assert asked == [1000, 1000, 1]


def test_an_object_that_may_not_be_deleted_with_others_is_named(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = {"Errors": [{"Key": "some/prefix/b", "Code": "AccessDenied", "Message": "no"}]}
    store = make_store(bucket)
    monkeypatch.setattr(store.client, "delete_objects", lambda **_: answer)  # type: ignore[attr-defined]
    with pytest.raises(AccessError, match="access denied"):
        store.delete_many(["a", "b"])


def test_objects_are_deleted_one_by_one_where_the_endpoint_knows_nothing_else(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(bucket)
    for key in ("a", "b", "c"):
        store.put(key, b"")

    def refuse(**_: Any) -> None:
        raise ClientError({"Error": {"Code": "NotImplemented"}}, "DeleteObjects")

    monkeypatch.setattr(store.client, "delete_objects", refuse)  # type: ignore[attr-defined]
    store.delete_many(["a", "b"])
    assert list(store.keys()) == ["c"]


def test_stores_of_other_prefixes_do_not_meet(bucket: Bucket) -> None:
    config = S3Config(endpoint_url=bucket.endpoint_url)
    for name in ("", "/a", "/a/b", "/ab"):
        open_store(f"s3://{bucket.name}{name}", config).put("key", name.encode())
    assert list(open_store(f"s3://{bucket.name}/a", config).keys()) == ["b/key", "key"]
    found = bucket.client.list_objects_v2(Bucket=bucket.name)["Contents"]
    assert [entry["Key"] for entry in found] == ["a/b/key", "a/key", "ab/key", "key"]


def test_encryption_is_asked_for_with_every_write(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "MULTIPART_FROM_BYTES", 5)
    store = make_store(bucket, encryption="aws:kms", kms_key_id="a-key")
    store.put("one", b"1234")
    store.put("parts", b"12345")
    store.put("absent", b"1234", if_absent=True)
    for key in ("one", "parts", "absent"):
        head = bucket.client.head_object(Bucket=bucket.name, Key=f"some/prefix/{key}")
        assert head["ServerSideEncryption"] == "aws:kms"
        assert head["SSEKMSKeyId"].endswith("a-key")
    assert head["ETag"].count("-") == 0
    parts = bucket.client.head_object(Bucket=bucket.name, Key="some/prefix/parts")
    assert parts["ETag"].endswith('-1"')  # the object was uploaded in parts


class Recorder:
    """A meter that adds up all values."""

    def __init__(self) -> None:
        self.sums: Counter[str] = Counter()

    def set(self, name: str, value: float, **labels: str) -> None:
        raise AssertionError((name, value, labels))

    def add(self, name: str, value: float, **labels: str) -> None:
        self.sums[" ".join([name.removeprefix("dist_sae_store_"), *labels.values()])] += int(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        assert 0 <= value < 60
        self.sums[" ".join([name.removeprefix("dist_sae_store_"), *labels.values()])] += 1


@pytest.mark.usefixtures("short_pauses")
def test_requests_bytes_and_retries_are_metered(bucket: Bucket) -> None:
    recorder = Recorder()
    with FaultProxy(
        bucket.endpoint_url,
        0,
        {"reset": 1.0},
        most_per_request=4,
        only=lambda method, _: method == "GET",
    ) as proxy:
        store = make_store(bucket, proxy.endpoint_url, meter=recorder)
        store.put("key", b"12345")
        assert store.get("key", 1, 3) == b"23"
    assert recorder.sums == {
        "requests_total PutObject 200": 1,
        "request_seconds PutObject": 1,
        "bytes_total out": 5,
        "requests_total GetObject none": 4,
        "requests_total GetObject 206": 1,
        "request_seconds GetObject": 5,
        "operation_seconds put": 1,
        "operation_seconds get": 1,
        "bytes_total in": 2,
        "retries_total": 4,  # two by boto, one by the store, one by boto
    }
