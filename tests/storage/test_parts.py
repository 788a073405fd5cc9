"""Cutting a stream into parts, and limiting the parts in memory."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from botocore.exceptions import ClientError

from dist_sae import retry
from dist_sae.storage import s3
from dist_sae.storage.parts import in_parts, map_ahead
from tests.conftest import Bucket
from tests.storage.endpoints import make_store


@pytest.mark.parametrize(
    ("pieces", "parts"),
    [
        ([], []),
        ([b"", b""], []),
        ([b"abcdef"], [b"abc", b"def"]),
        ([b"a", b"bcdefgh", b"", b"ij"], [b"abc", b"def", b"ghi", b"j"]),
        ([b"ab", b"c"], [b"abc"]),
    ],
)
def test_parts_are_full_but_the_last(pieces: list[bytes], parts: list[bytes]) -> None:
    assert list(in_parts(pieces, 3)) == parts


def test_few_items_are_taken_ahead() -> None:
    taken = []

    def items() -> Any:
        for number in range(20):
            taken.append(number)
            yield number

    with ThreadPoolExecutor(2) as pool:
        results = map_ahead(pool, lambda number: number * number, items(), 3)
        assert next(results) == 0
        assert len(taken) == 4
        assert list(results) == [number * number for number in range(1, 20)]


def test_no_call_runs_on_after_a_stream_broke_off() -> None:
    begun, go_on = threading.Event(), threading.Event()
    ended = []

    def call(number: int) -> None:
        begun.set()
        go_on.wait()
        ended.append(number)

    def items() -> Any:
        yield 0
        begun.wait()
        threading.Timer(0.05, go_on.set).start()
        raise OSError("the source is gone")

    with ThreadPoolExecutor(2) as pool:
        with pytest.raises(OSError, match="gone"):
            list(map_ahead(pool, call, items(), 3))
        assert ended == [0]


def test_an_upload_that_is_gone_begins_anew(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.005)
    store = make_store(bucket)
    begun: list[int] = []
    client: Any = store.client  # type: ignore[attr-defined]
    complete = client.complete_multipart_upload

    def completed(**upload: Any) -> Any:
        if len(begun) == 1:  # another program aborts the upload
            del upload["MultipartUpload"]
            client.abort_multipart_upload(**upload)
            raise ClientError({"Error": {"Code": "NoSuchUpload"}}, "CompleteMultipartUpload")
        return complete(**upload)

    def content() -> Any:
        begun.append(len(begun))
        yield bytes(2 * s3.PART_BYTES)
        yield b"end"

    monkeypatch.setattr(client, "complete_multipart_upload", completed)
    store.put_stream("key", content)
    assert begun == [0, 1]
    assert store.get("key") == bytes(2 * s3.PART_BYTES) + b"end"
