"""Credentials services that are busy, or that have no credentials."""

import datetime as dt
import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.utils import ContainerMetadataFetcher

from dist_sae.config.data import S3Config
from dist_sae.errors import AccessError, UnavailableError
from dist_sae.storage import ObjectStore, open_store
from tests.conftest import Bucket
from tests.servers import OWNER

EXPIRY = dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)
FIELDS = {
    "AccessKeyId": OWNER.id,
    "SecretAccessKey": OWNER.secret,
    "Token": "token",
    "Expiration": EXPIRY.strftime("%Y-%m-%dT%H:%M:%SZ"),
}
STS = f"""<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>
<AccessKeyId>{OWNER.id}</AccessKeyId><SecretAccessKey>{OWNER.secret}</SecretAccessKey>
<SessionToken>token</SessionToken><Expiration>{FIELDS["Expiration"]}</Expiration></Credentials>
</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"""


class Service(http.server.ThreadingHTTPServer):
    """A server that plays instance metadata, a container's endpoint and STS.

    Its first responses are `bad`, a list of (status, text). Status 0 closes the connection.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bad: list[tuple[int, str]] = []
        self.asked = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Service

    def do_GET(self) -> None:
        self.server.asked += 1
        self.rfile.read(int(self.headers.get("Content-Length", "0")))
        status, text = self.server.bad.pop(0) if self.server.bad else (200, self._good())
        if not status:
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    do_PUT = do_POST = do_GET  # noqa: N815 - as the base class has them

    def _good(self) -> str:
        if self.path.endswith(("token", "security-credentials/")):
            return "name"
        return STS if self.path == "/" else json.dumps(FIELDS)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(ContainerMetadataFetcher, "SLEEP_TIME", 0.01)
    with Service() as service:
        threading.Thread(target=service.serve_forever, args=(0.05,), daemon=True).start()
        yield service
        service.shutdown()


@pytest.fixture(params=["metadata", "container", "web identity"])
def source(
    request: pytest.FixtureRequest,
    bucket: Bucket,
    service: Service,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> str:
    """Name of the only service that gives the process credentials."""
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.delenv(variable)
    for variable in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(variable, str(tmp_path / "none"))
    (tmp_path / "token").write_text("a token")
    settings = {
        "metadata": {"AWS_EC2_METADATA_SERVICE_ENDPOINT": service.url},
        "container": {"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{service.url}/credentials"},
        "web identity": {
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token"),
            "AWS_ROLE_ARN": "arn:aws:iam::1:role/r",
            "AWS_ENDPOINT_URL_STS": service.url,
            "AWS_REGION": "us-east-1",
        },
    }
    source: str = request.param
    for variable, value in settings[source].items():
        monkeypatch.setenv(variable, value)
    return source


def make_store(bucket: Bucket, seconds: float) -> ObjectStore:
    config = S3Config(endpoint_url=bucket.endpoint_url, deadline_seconds=seconds)
    return open_store(f"s3://{bucket.name}/prefix", config)


def sts(code: str, message: str = "said") -> str:
    error = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return f"<ErrorResponse>{error}</ErrorResponse>"


@pytest.mark.system
@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize(
    "bad", [(429, sts("Throttling")), (500, sts("InternalFailure")), (0, ""), (200, "<html>")]
)
def test_a_busy_service_is_asked_until_it_answers(
    source: str, bucket: Bucket, service: Service, bad: tuple[int, str]
) -> None:
    # the same as if the service were absent or another one
    if source != "container" and bad[0] in (0, 200):
        bad = (503, sts("ServiceUnavailable"))
    service.bad = [bad] * 12
    store = make_store(bucket, seconds=30)
    assert store.put("key", b"content")
    assert not service.bad


@pytest.mark.usefixtures("short_pauses")
def test_a_service_that_stays_busy_makes_the_program_resumable(
    source: str, bucket: Bucket, service: Service
) -> None:
    service.bad = [(503, sts("ServiceUnavailable"))] * 10_000
    with pytest.raises(UnavailableError, match=r"credentials|metadata") as caught:
        make_store(bucket, seconds=0.3).put("key", b"content")
    assert caught.value.exit_code == 75


def test_a_service_that_has_none_is_an_error_at_once(
    source: str, bucket: Bucket, service: Service
) -> None:
    service.bad = [(403, sts("AccessDenied"))] * 10_000
    since = time.monotonic()
    with pytest.raises(AccessError, match="credentials") as caught:
        make_store(bucket, seconds=600).put("key", b"content")
    assert time.monotonic() - since < 60
    assert "on this bucket" not in str(caught.value)


@pytest.mark.parametrize("source", ["web identity"], indirect=True)
@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("IDPCommunicationError", "said"),
        ("InvalidIdentityToken", "Couldn't retrieve verification key from your identity provider"),
        ("ExpiredTokenException", "Token expired"),
    ],
)
def test_a_web_identity_whose_issuer_is_away_or_token_is_old_is_waited_for(
    source: str, bucket: Bucket, service: Service, code: str, message: str
) -> None:
    service.bad = [(400, sts(code, message))] * 5
    assert make_store(bucket, seconds=30).put("key", b"content")


@pytest.mark.parametrize("source", ["container"], indirect=True)
@pytest.mark.usefixtures("short_pauses")
def test_credentials_that_are_handed_out_expired_or_not_at_all_are_waited_for(
    source: str, bucket: Bucket, service: Service
) -> None:
    old = json.dumps(FIELDS | {"Expiration": "2020-01-01T00:00:00Z"})
    service.bad = [(200, old)] * 4 + [(200, json.dumps({"Message": "not yet"}))] * 2
    assert make_store(bucket, seconds=30).put("key", b"content")


@pytest.mark.parametrize("source", ["web identity"], indirect=True)
def test_a_tokens_file_that_is_missing_is_named(
    source: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/none/token")
    with pytest.raises(AccessError, match="/none/token: No such file"):
        make_store(bucket, seconds=600).put("key", b"content")
