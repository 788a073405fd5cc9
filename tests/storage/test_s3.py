"""Faults of S3 endpoints, and the messages that users see."""

import datetime as dt
import functools
import http.server
import itertools
import logging
import ssl
import subprocess
import threading
import time
from collections import Counter
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
    EXIT_RESUMABLE,
    EXIT_USER,
    AccessError,
    ObjectNotFoundError,
    StoreError,
    StoreFullError,
    UnavailableError,
)
from dist_sae.storage import ObjectStore, open_store, s3
from dist_sae.storage.base import Meter
from tests.conftest import Bucket
from tests.faults import XML, FaultProxy
from tests.servers import READER

METHODS: dict[str, Callable[[ObjectStore], object]] = {
    "get": lambda store: store.get("a/b"),
    "put": lambda store: store.put("a/b", b""),
    "put_if_absent": lambda store: store.put("a/b", b"", if_absent=True),
    "size": lambda store: store.size("a/b"),
    "keys": lambda store: list(store.keys("a/b")),
    "delete": lambda store: store.delete("a/b"),
}
WRITES = {"put", "put_if_absent", "delete"}
SECONDS = 0.2


def make_store(
    bucket: Bucket,
    endpoint: str | None = None,
    *,
    seconds: float = 20.0,
    meter: Meter | None = None,
    stopping: threading.Event | None = None,
    **settings: Any,
) -> ObjectStore:
    """Open the bucket through an endpoint, by default its own."""
    config = S3Config(
        endpoint_url=endpoint or bucket.endpoint_url, deadline_seconds=seconds, **settings
    )
    return open_store(f"s3://{bucket.name}/some/prefix", config, meter, stopping)


@pytest.fixture
def store(bucket: Bucket) -> ObjectStore:
    return make_store(bucket, seconds=SECONDS)


@pytest.fixture
def weed(make_bucket: Callable[[str], Bucket]) -> Bucket:
    return make_bucket("seaweedfs")


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """Collect what the store logs during the test."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    s3.logger.addHandler(handler)
    yield said
    s3.logger.removeHandler(handler)


def told(error: type[StoreError], store: ObjectStore, *methods: str) -> str:
    """Join the messages of these calls into one line."""
    said = set()
    for name in methods:
        with pytest.raises(StoreError) as caught:
            METHODS[name](store)
        assert type(caught.value) is error
        assert caught.value.url == store.url
        assert caught.value.exit_code == (
            EXIT_RESUMABLE if error is UnavailableError else EXIT_USER
        )
        said.add(str(caught.value))
    (message,) = said
    assert "\n" not in message
    return message


# --- buckets, pages, arguments


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
    assert parts["ETag"].endswith('-1"')  # it did go in parts


class Recorder:
    """Meter that keeps totals."""

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
        "retries_total": 4,  # two of boto's, one of ours, one of boto's
    }


# --- bad input: one clear line, at once


@pytest.mark.parametrize("kind", ["moto", "rclone"])
def test_bucket_that_does_not_exist(kind: str, make_bucket: Callable[[str], Bucket]) -> None:
    store = make_store(make_bucket(kind)._replace(name="no-such-bucket"))
    assert told(AccessError, store, *METHODS) == (
        "s3://no-such-bucket/some/prefix: no such bucket; create it or correct the URL"
    )


@pytest.mark.system
def test_bucket_that_does_not_exist_on_a_server_that_makes_them(weed: Bucket) -> None:
    # a PUT with an administrator's key creates the bucket there
    store = make_store(weed._replace(name="no-such-bucket"))
    assert "no such bucket" in told(AccessError, store, "get")


def test_bucket_name_that_cannot_be(bucket: Bucket) -> None:
    store = make_store(bucket._replace(name="my bucket!"))
    assert told(AccessError, store, *METHODS) == (
        "s3://my bucket!/some/prefix: not a valid bucket name; correct the URL"
    )


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        (
            ("AWS_SECRET_ACCESS_KEY", "wrong"),
            "the secret key is wrong; check AWS_SECRET_ACCESS_KEY",
        ),
        (("AWS_ACCESS_KEY_ID", "stranger"), "the access key is unknown to the endpoint"),
    ],
)
@pytest.mark.parametrize("kind", ["seaweedfs", "rclone"])
def test_wrong_key(
    kind: str,
    make_bucket: Callable[[str], Bucket],
    monkeypatch: pytest.MonkeyPatch,
    key: tuple[str, str],
    hint: str,
) -> None:
    bucket = make_bucket(kind)
    monkeypatch.setenv(*key)
    assert hint in told(AccessError, make_store(bucket), *METHODS)


@pytest.mark.system
def test_key_that_may_only_read(weed: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(weed).put("a/b", b"content")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER.id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER.secret)
    store = make_store(weed)
    assert store.get("a/b") == b"content"
    assert store.size("none") is None
    assert list(store.keys()) == ["a/b"]
    assert told(AccessError, store, *WRITES) == (
        f"{store.url}: access denied; check the credentials' permissions on this bucket"
    )


def test_no_credentials(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for variable in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(variable, str(tmp_path / "none"))
    store = make_store(bucket)
    assert "no credentials found; set AWS_ACCESS_KEY_ID" in told(AccessError, store, *METHODS)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "profile (nobody) could not be found" in told(AccessError, make_store(bucket), "get")


@pytest.mark.system
def test_clock_that_is_off(weed: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    def later() -> dt.datetime:
        return dt.datetime.now(dt.UTC).replace(tzinfo=None) + dt.timedelta(hours=1)

    monkeypatch.setattr("botocore.auth.get_current_datetime", later)
    assert told(AccessError, make_store(weed), *METHODS).endswith(
        "this machine's clock is off; set it"
    )


@pytest.mark.parametrize(
    ("status", "code", "error", "hint"),
    [
        (400, b"ExpiredToken", AccessError, "the session token has expired; renew the credentials"),
        (400, b"InvalidToken", AccessError, "the session token is not valid"),
        (403, b"RequestTimeTooSkewed", AccessError, "this machine's clock is off; set it"),
        (403, b"AccessDenied", AccessError, "access denied; check the credentials' permissions"),
        (403, b"AllAccessDisabled", AccessError, "access denied; check the credentials"),
        (400, b"AuthorizationHeaderMalformed", AccessError, "set store.s3.region"),
        (403, b"AccountProblem", AccessError, "AccountProblem"),
        (403, b"InvalidObjectState", StoreError, "is archived (Glacier or the like): restore it"),
        (400, b"KMS.DisabledException", AccessError, "the encryption key cannot be used"),
        (403, b"RequestExpired", AccessError, "this machine's clock is off; set it"),
        (400, b"ExpiredTokenException", AccessError, "the session token has expired"),
        (403, b"QuotaExceeded", StoreFullError, "no space left or over quota"),
        (403, b"XMinioAdminBucketQuotaExceeded", StoreFullError, "no space left or over quota"),
        (507, b"NobodyKnowsThisCode", StoreFullError, "no space left or over quota"),
        (507, b"XMinioStorageFull", StoreFullError, "no space left or over quota"),
        (400, b"EntityTooLarge", StoreError, "EntityTooLarge"),
    ],
)
def test_answers_that_waiting_does_not_mend(
    bucket: Bucket, status: int, code: bytes, error: type[StoreError], hint: str
) -> None:
    with FaultProxy(
        bucket.endpoint_url, 0, {"error": 1.0}, answers=[(status, XML % code)]
    ) as proxy:
        store = make_store(bucket, proxy.endpoint_url)
        since = time.monotonic()
        for name in METHODS:
            assert hint in told(error, store, name)
        assert time.monotonic() - since < 10
        assert proxy.injected["error"] == sum(proxy.requests.values())


@pytest.mark.parametrize(
    ("exception", "error"),
    [
        (NoCredentialsError(), AccessError),
        (CredentialRetrievalError(provider="sso", error_msg="expired"), AccessError),
        (ReadTimeoutError(endpoint_url="http://x"), UnavailableError),
        (BotoCoreError(), StoreError),
        (ClientError({"Error": {"Code": "NoSuchKey"}}, "Operation"), ObjectNotFoundError),
        (ClientError({"Error": {"Message": "said\nit"}}, "Operation"), StoreError),
    ],
)
def test_errors_of_boto_become_errors_of_ours(
    store: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
    exception: Exception,
    error: type[StoreError],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise exception

    monkeypatch.setattr("botocore.client.BaseClient._make_api_call", fail)
    told(error, store, "put", "get")


@pytest.mark.parametrize("endpoint", ["http://", "http://no host", "http://127.0.0.1:99999"])
def test_endpoint_that_cannot_be(bucket: Bucket, endpoint: str) -> None:
    message = told(AccessError, make_store(bucket, endpoint), "get")
    assert endpoint in message
    assert message.endswith("check store.s3.endpoint_url")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        [*command.split(), "-out", cert, "-keyout", key, *subject], check=True, capture_output=True
    )
    return cert, key


def test_certificate_is_trusted_by_the_bundle_only(
    bucket: Bucket, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*certificate)
    with FaultProxy(bucket.endpoint_url, 0, {}, tls=tls) as proxy:
        store = make_store(bucket, proxy.endpoint_url, ca_bundle=str(certificate[0]))
        store.put("key", b"content", if_absent=True)
        assert store.get("key") == b"content"
        assert told(AccessError, make_store(bucket, proxy.endpoint_url), "get", "put").endswith(
            f"the certificate of {proxy.endpoint_url} is not trusted; set store.s3.ca_bundle"
        )
        missing = make_store(bucket, proxy.endpoint_url, ca_bundle=str(tmp_path / "none"))
        assert told(AccessError, missing, "get").endswith(
            f"store.s3.ca_bundle {tmp_path / 'none'}: No such file or directory"
        )
        (tmp_path / "empty").touch()
        empty = make_store(bucket, proxy.endpoint_url, ca_bundle=str(tmp_path / "empty"))
        assert "store.s3.ca_bundle" in told(AccessError, empty, "get")


# --- endpoints that do not answer


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An endpoint that refuses connections, on a reserved port."""
    with http.server.socketserver.socket.socket() as closed:  # type: ignore[attr-defined]
        closed.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{closed.getsockname()[1]}"


@pytest.mark.usefixtures("short_pauses")  # else boto alone may take the three seconds
def test_endpoint_that_is_down_is_asked_until_the_deadline(
    bucket: Bucket, nowhere: str, warnings: list[str]
) -> None:
    store = make_store(bucket, nowhere, seconds=3)
    since = time.monotonic()
    message = told(UnavailableError, store, "get")
    assert 3 <= time.monotonic() - since < 10
    assert message == (
        f"{store.url}/a/b: {nowhere} does not answer (EndpointConnectionError); "
        f"check store.s3.endpoint_url and the network"
    )
    assert len(warnings) == 1  # at the first failure, then every half minute
    assert warnings[0].startswith(f"{message}; asking again for up to ")


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("name", METHODS)
def test_every_method_waits_for_an_endpoint_that_is_down(
    bucket: Bucket, nowhere: str, name: str
) -> None:
    told(UnavailableError, make_store(bucket, nowhere, seconds=SECONDS), name)


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
    assert "asking again for up to 20 s" in warnings[0]


def test_no_call_is_patient_any_more_when_the_program_is_to_stop(
    bucket: Bucket, nowhere: str, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "LAST_PATIENCE_SECONDS", 1.0)
    stopping = threading.Event()
    store = make_store(bucket, nowhere, seconds=600, stopping=stopping)
    with ThreadPoolExecutor(1) as pool:
        getting = pool.submit(store.get, "key")
        while not warnings:
            time.sleep(0.01)
        stopping.set()
        with pytest.raises(UnavailableError):
            getting.result(timeout=10)


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
        assert "the endpoint answers" in told(UnavailableError, store, "get", "size")
        for name in sorted(METHODS.keys() - {"get", "size"}):
            told(UnavailableError, store, name)
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(list, make_store(bucket, proxy.endpoint_url).keys(""))
            while not warnings:
                time.sleep(0.01)
            proxy.rates = {}
            assert asking.result() is not None


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


# --- conditional writes


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("lost", [1, 4])
@pytest.mark.parametrize("fault", ["reset_after", "error_after"])
@pytest.mark.parametrize("kind", ["moto", "seaweedfs"])
def test_put_if_absent_whose_answer_is_lost_has_won(
    kind: str, make_bucket: Callable[[str], Bucket], fault: str, lost: int
) -> None:
    bucket = make_bucket(kind)

    def only(method: str, _: str) -> bool:
        return method == "PUT"

    # boto asks three times before we do
    with FaultProxy(
        bucket.endpoint_url, 0, {fault: 1.0}, only=only, most_per_request=lost
    ) as proxy:
        store = make_store(bucket, proxy.endpoint_url)
        vars(store)["exclusive"] = True
        assert store.put("key", b"mine", if_absent=True)
        assert proxy.injected[fault] == lost
        assert store.put("key", b"other", if_absent=False)
        assert not store.put("key", b"mine", if_absent=True)


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.system
def test_put_if_absent_does_not_win_what_was_there_when_it_asked_again(
    weed: Bucket,
) -> None:
    with FaultProxy(weed.endpoint_url, 0, {}) as proxy:
        store = make_store(weed, proxy.endpoint_url)
        assert store.put("key", b"theirs", if_absent=True)
        proxy.rates = {"reset_after": 0.5}
        assert not any(store.put("key", b"mine %d" % i, if_absent=True) for i in range(20))
        assert proxy.injected["reset_after"] > 5
    assert (
        weed.client.get_object(Bucket=weed.name, Key="some/prefix/key")["Body"].read() == b"theirs"
    )


@pytest.mark.usefixtures("short_pauses")
def test_put_if_absent_that_lost_to_an_object_gone_since_has_lost(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(bucket)
    assert store.exclusive
    answers = itertools.chain(
        ["ConditionalRequestConflict"], itertools.repeat("PreconditionFailed")
    )
    call = type(store._client)._make_api_call  # type: ignore[attr-defined]

    def answer(client: Any, operation: str, arguments: Any) -> Any:
        if operation == "PutObject":
            raise ClientError({"Error": {"Code": next(answers)}}, operation)
        return call(client, operation, arguments)

    monkeypatch.setattr("botocore.client.BaseClient._make_api_call", answer)
    assert not store.put("key", b"", if_absent=True)


class OldEndpoint(http.server.BaseHTTPRequestHandler):
    """Endpoint without ranges or conditions, whose clock says 2009."""

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
    monkeypatch.setattr("dist_sae.storage.s3.S3Store.get", lambda *_: b"")  # of an old listing
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
    assert "does not honour If-None-Match" in warnings[0]


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
