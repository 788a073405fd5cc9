"""S3 requests that an endpoint refuses fail at once, with a one-line error."""

import datetime as dt
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    ReadTimeoutError,
)

from dist_sae.errors import (
    AccessError,
    ObjectNotFoundError,
    StoreError,
    StoreFullError,
    UnavailableError,
)
from dist_sae.storage import ObjectStore
from tests.conftest import Bucket
from tests.faults import XML, FaultProxy
from tests.servers import READER
from tests.storage.endpoints import METHODS, WRITES, error_message, make_store


@pytest.mark.parametrize("kind", ["moto", "rclone"])
def test_bucket_that_does_not_exist(kind: str, make_bucket: Callable[[str], Bucket]) -> None:
    store = make_store(make_bucket(kind)._replace(name="no-such-bucket"))
    assert error_message(AccessError, store, *METHODS) == (
        "s3://no-such-bucket/some/prefix: no such bucket; create it or correct the URL"
    )


@pytest.mark.system
def test_bucket_that_does_not_exist_on_a_server_that_makes_them(weed: Bucket) -> None:
    # seaweedfs creates the bucket at a PUT with an administrator's key, so only `get` is tested
    store = make_store(weed._replace(name="no-such-bucket"))
    assert "no such bucket" in error_message(AccessError, store, "get")


def test_bucket_name_that_cannot_be(bucket: Bucket) -> None:
    store = make_store(bucket._replace(name="my bucket!"))
    assert error_message(AccessError, store, *METHODS) == (
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
    assert hint in error_message(AccessError, make_store(bucket), *METHODS)


@pytest.mark.system
def test_key_that_may_only_read(weed: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(weed).put("a/b", b"content")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER.id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER.secret)
    store = make_store(weed)
    assert store.get("a/b") == b"content"
    assert store.size("none") is None
    assert list(store.keys()) == ["a/b"]
    assert error_message(AccessError, store, *WRITES) == (
        f"{store.url}: access denied; check the credentials' permissions on this bucket"
    )


def test_no_credentials(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for variable in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(variable, str(tmp_path / "none"))
    store = make_store(bucket)
    assert "no credentials found; set AWS_ACCESS_KEY_ID" in error_message(
        AccessError, store, *METHODS
    )
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "profile (nobody) could not be found" in error_message(
        AccessError, make_store(bucket), "get"
    )


@pytest.mark.system
def test_clock_that_is_off(weed: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    def later() -> dt.datetime:
        return dt.datetime.now(dt.UTC).replace(tzinfo=None) + dt.timedelta(hours=1)

    monkeypatch.setattr("botocore.auth.get_current_datetime", later)
    assert error_message(AccessError, make_store(weed), *METHODS).endswith(
        "this machine's clock is wrong; set it"
    )


@pytest.mark.parametrize(
    ("status", "code", "error", "hint"),
    [
        (400, b"ExpiredToken", AccessError, "the session token has expired; renew the credentials"),
        (400, b"InvalidToken", AccessError, "the session token is not valid"),
        (403, b"RequestTimeTooSkewed", AccessError, "this machine's clock is wrong; set it"),
        (403, b"AccessDenied", AccessError, "access denied; check the credentials' permissions"),
        (403, b"AllAccessDisabled", AccessError, "access denied; check the credentials"),
        (400, b"AuthorizationHeaderMalformed", AccessError, "set store.s3.region"),
        (403, b"AccountProblem", AccessError, "AccountProblem"),
        (
            403,
            b"InvalidObjectState",
            StoreError,
            "is archived (for example in Glacier); restore it",
        ),
        (400, b"KMS.DisabledException", AccessError, "the encryption key cannot be used"),
        (403, b"RequestExpired", AccessError, "this machine's clock is wrong; set it"),
        (400, b"ExpiredTokenException", AccessError, "the session token has expired"),
        (403, b"QuotaExceeded", StoreFullError, "no space left or over quota"),
        (403, b"XMinioAdminBucketQuotaExceeded", StoreFullError, "no space left or over quota"),
        (507, b"NobodyKnowsThisCode", StoreFullError, "no space left or over quota"),
        (507, b"XMinioStorageFull", StoreFullError, "no space left or over quota"),
        (400, b"EntityTooLarge", StoreError, "EntityTooLarge"),
    ],
)
def test_answers_that_waiting_does_not_mend(
    bucket: Bucket,
    status: int,
    code: bytes,
    error: type[StoreError],
    hint: str,
    warnings: list[str],
) -> None:
    with FaultProxy(
        bucket.endpoint_url, 0, {"error": 1.0}, answers=[(status, XML % code)]
    ) as proxy:
        store = make_store(bucket, proxy.endpoint_url)
        for name in METHODS:
            assert hint in error_message(error, store, name)
        assert not [said for said in warnings if "asking again" in said]
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

    for operation in ("put_object", "get_object"):
        monkeypatch.setattr(store.client, operation, fail)  # type: ignore[attr-defined]
    error_message(error, store, "put", "get")


@pytest.mark.parametrize("endpoint", ["http://", "http://no host", "http://127.0.0.1:99999"])
def test_endpoint_that_cannot_be(bucket: Bucket, endpoint: str) -> None:
    message = error_message(AccessError, make_store(bucket, endpoint), "get")
    assert endpoint in message
    assert message.endswith("check store.s3.endpoint_url")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
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
        assert error_message(
            AccessError, make_store(bucket, proxy.endpoint_url), "get", "put"
        ).endswith(
            f"the certificate of {proxy.endpoint_url} is not trusted; set store.s3.ca_bundle"
        )
        missing = make_store(bucket, proxy.endpoint_url, ca_bundle=str(tmp_path / "none"))
        assert error_message(AccessError, missing, "get").endswith(
            f"store.s3.ca_bundle {tmp_path / 'none'}: No such file or directory"
        )
        (tmp_path / "empty").touch()
        empty = make_store(bucket, proxy.endpoint_url, ca_bundle=str(tmp_path / "empty"))
        assert "store.s3.ca_bundle" in error_message(AccessError, empty, "get")
