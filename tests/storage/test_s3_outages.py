"""Waiting for S3 endpoints that do not respond, up to a deadline."""

import http.server
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from botocore.exceptions import IncompleteReadError
from botocore.response import StreamingBody

from dist_sae import retry
from dist_sae.errors import UnavailableError
from tests.conftest import Bucket
from tests.faults import XML, FaultProxy
from tests.storage.endpoints import METHODS, error_message, make_store


@pytest.fixture
def nowhere() -> Iterator[str]:
    """URL of an endpoint that refuses connections, on a reserved port."""
    with http.server.socketserver.socket.socket() as closed:  # type: ignore[attr-defined]
        closed.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{closed.getsockname()[1]}"


@pytest.mark.system
@pytest.mark.usefixtures("short_pauses")  # else boto's pauses alone may take three seconds
def test_endpoint_that_is_down_is_asked_until_the_deadline(
    bucket: Bucket, nowhere: str, warnings: list[str]
) -> None:
    store = make_store(bucket, nowhere, seconds=3)
    since = time.monotonic()
    message = error_message(UnavailableError, store, "get")
    assert 3 <= time.monotonic() - since < 10
    assert message == (
        f"{store.url}/a/b: {nowhere} does not respond (EndpointConnectionError); "
        f"check store.s3.endpoint_url and the network"
    )
    assert len(warnings) == 1  # warns at the first failure, then every half minute
    assert warnings[0].startswith(f"{message}; retrying for up to ")


def test_endpoint_that_goes_down_in_the_middle_is_waited_for(
    bucket: Bucket, warnings: list[str]
) -> None:
    with FaultProxy(bucket.endpoint_url, 0, {}) as proxy:
        store = make_store(bucket, proxy.endpoint_url)
        store.put("key", b"content")
        assert not warnings
        proxy.rates = {"reset": 1.0}
        with ThreadPoolExecutor(1) as pool:
            getting = pool.submit(store.get, "key")
            while not warnings:
                time.sleep(0.01)
            assert not getting.done()
            proxy.rates = {}
            assert getting.result() == b"content"
    assert len(warnings) == 1
    assert "retrying for up to 20 s" in warnings[0]


def test_no_call_is_patient_any_more_when_the_program_is_to_stop(
    bucket: Bucket, nowhere: str, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "STOPPING_RETRY_SECONDS", 1.0)
    stopping = threading.Event()
    store = make_store(bucket, nowhere, seconds=600, stopping=stopping)
    with ThreadPoolExecutor(1) as pool:
        getting = pool.submit(store.get, "key")
        while not warnings:
            time.sleep(0.01)
        stopping.set()
        with pytest.raises(UnavailableError):
            getting.result(timeout=10)


@pytest.mark.system
@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize(
    ("status", "body"),
    [
        (503, XML % b"SlowDown"),
        (500, XML % b"NobodyKnowsThisCode"),
        (429, XML % b"TooManyRequests"),
        (409, XML % b"ConditionalRequestConflict"),
        (400, XML % b"RequestTimeout"),
        (400, XML % b"XAmzContentSHA256Mismatch"),
        (400, XML % b"ThrottlingException"),
        (400, XML % b"KMS.ThrottlingException"),
        (403, XML % b"SlowDownRead"),
        (403, XML % b"RequestThrottled"),
        (409, XML % b"OperationAborted"),
        (503, b"<html><body>upstream connect error</body></html>"),
        (502, b"<html><body>Bad Gateway</body></html>"),
        (504, b""),
        (404, b"<html><body>default backend</body></html>"),
        (404, b""),
    ],
    ids=str,
)
def test_answers_that_waiting_mends(
    bucket: Bucket, status: int, body: bytes, warnings: list[str]
) -> None:
    with FaultProxy(bucket.endpoint_url, 0, {"error": 1.0}, answers=[(status, body)]) as proxy:
        store = make_store(bucket, proxy.endpoint_url, seconds=0.05)
        assert "the endpoint returned" in error_message(UnavailableError, store, "get", "size")
        for name in sorted(METHODS.keys() - {"get", "size"}):
            error_message(UnavailableError, store, name)
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(list, make_store(bucket, proxy.endpoint_url).keys(""))
            while not warnings:
                time.sleep(0.01)
            proxy.rates = {}
            assert asking.result() is not None


@pytest.mark.system
@pytest.mark.usefixtures("short_pauses")
def test_connection_that_breaks_on_the_way_is_made_again(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(bucket, seconds=2)
    store.put("key", b"content")
    left = 5
    read = StreamingBody.read

    def break_off(body: StreamingBody, *arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            body.close()
            raise IncompleteReadError(actual_bytes=1, expected_bytes=7)
        return read(body, *arguments)

    monkeypatch.setattr(StreamingBody, "read", break_off)
    assert store.get("key") == b"content"
    left = 10**9
    with pytest.raises(UnavailableError):
        store.get("key")
