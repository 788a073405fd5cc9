"""An S3 endpoint without ranges or conditional writes, whose clock is wrong."""

import functools
import http.server
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from dist_sae.errors import StoreError
from dist_sae.storage import ObjectStore, s3
from tests.conftest import Bucket
from tests.faults import XML
from tests.storage.endpoints import make_store


class OldEndpoint(http.server.BaseHTTPRequestHandler):
    """An endpoint without ranges or conditional writes, whose clock is in 2009."""

    protocol_version = "HTTP/1.1"

    def __init__(self, objects: dict[str, bytes], *arguments: Any) -> None:
        self.objects = objects
        super().__init__(*arguments)

    def do_GET(self) -> None:
        if "list-type" in self.path:
            listed = (
                b"<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>k</Key>"
                b"<Size>4</Size><LastModified>2009-01-01T00:00:00.000Z</LastModified></Contents>"
                b"</ListBucketResult>"
            )
            self._answer(200, listed)
        elif self.path in self.objects:
            self._answer(200, self.objects[self.path])
        else:
            self._answer(404, XML % b"NoSuchKey")

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "If-None-Match" in self.headers:
            self._answer(501, XML % b"NotImplemented")
        else:
            self.objects[self.path] = body
            self._answer(200, b"")

    def do_DELETE(self) -> None:
        self.objects.pop(self.path, None)
        self._answer(204, b"")

    def date_time_string(self, *_: object) -> str:
        return "Thu, 01 Jan 2009 00:01:30 GMT"

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def old_store(bucket: Bucket) -> Iterator[ObjectStore]:
    endpoint = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(OldEndpoint, {}))
    endpoint.daemon_threads = True
    endpoint.block_on_close = False
    threading.Thread(target=endpoint.serve_forever, args=(0.05,), daemon=True).start()
    yield make_store(bucket, f"http://127.0.0.1:{endpoint.server_port}")
    endpoint.shutdown()
    endpoint.server_close()


def test_endpoint_that_does_not_give_back_what_was_written_is_refused(
    old_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_sae.storage.s3.S3Store.get", lambda *_: b"")  # as from a stale cache
    with pytest.raises(StoreError, match="a read does not return what was just written"):
        old_store.put("key", b"first", if_absent=True)


def test_endpoint_without_conditions_gets_look_then_put(
    old_store: ObjectStore, warnings: list[str]
) -> None:
    assert not old_store.exclusive
    assert old_store.put("key", b"first", if_absent=True)
    assert not old_store.put("key", b"second", if_absent=True)
    assert old_store.get("key") == b"first"
    assert len(warnings) == 1
    assert "does not support If-None-Match" in warnings[0]


def test_endpoint_without_ranges_gives_the_right_bytes(
    old_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"0123456789"
    old_store.put("key", content)
    assert old_store.size("key") == 10
    assert old_store.size("none") is None
    for part_bytes in (3, 100):
        monkeypatch.setattr(s3, "PART_BYTES", part_bytes)
        for start, stop in [(0, None), (3, None), (0, 4), (3, 7), (8, 99), (10, 12), (99, None)]:
            assert old_store.get("key", start, stop) == content[start:stop]


def test_age_is_told_by_the_clock_of_the_endpoint(old_store: ObjectStore) -> None:
    (entry,) = old_store.entries()
    assert entry.age_seconds == 90
