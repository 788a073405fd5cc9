"""Errors about AWS credentials, classified as temporary or permanent; only for `s3_errors.py`.

Credentials come from services: instance metadata (EC2), a container's endpoint (ECS, EKS Pod
Identity), or STS for a web identity. When many pods start at once, these services are busy, so
their errors are retried in the same way as errors of the store itself. Missing credentials are
reported at once.
"""

import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

from botocore.exceptions import (
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)

from dist_sae.errors import AccessError, UnavailableError

_FIELDS = {"AccessKeyId", "SecretAccessKey", "Token", "Expiration"}  # in an endpoint's response
_STILL_EXPIRED = "refreshed credentials are still expired"
_METADATA = "http://169.254.169.254"
_METADATA_SECONDS = 1.0  # same as in botocore
_SERVICES = re.compile("AssumeRole|GetRoleCredentials|GetSessionToken|CreateToken|CreateOAuth2")


def is_busy(status: int) -> bool:
    """True for an HTTP status after which the same request may succeed later."""
    return status in (
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.TOO_EARLY,
        HTTPStatus.TOO_MANY_REQUESTS,
    ) or (
        status >= HTTPStatus.INTERNAL_SERVER_ERROR
        and status not in (HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.INSUFFICIENT_STORAGE)
    )


@contextmanager
def mapped(url: str, key: str | None) -> Iterator[None]:
    """Raise botocore's credential errors as ours; `map_service_error` handles errors from STS."""
    try:
        yield
    except CredentialRetrievalError as exc:
        if _is_temporary(str(exc)):
            raise UnavailableError(_line(exc), url=url, key=key) from exc
        raise AccessError(f"{_line(exc)}; check the AWS settings", url=url) from exc
    except (PartialCredentialsError, ProfileNotFound) as exc:
        raise AccessError(f"{_line(exc)}; check the AWS settings", url=url) from exc
    except NoCredentialsError as exc:
        if _metadata_is_busy():
            raise UnavailableError(
                "instance metadata currently returns no credentials", url=url, key=key
            ) from exc
        raise AccessError(
            "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE or a web identity",
            url=url,
        ) from exc
    except (RuntimeError, KeyError) as exc:  # from botocore: fields are missing or have expired
        if _STILL_EXPIRED not in str(exc) and str(exc).strip("'") not in _FIELDS:
            raise
        raise UnavailableError(
            f"the credentials service returned no valid credentials ({_line(exc)})",
            url=url,
            key=key,
        ) from exc
    except (FileNotFoundError, PermissionError) as exc:  # token file or credential_process
        if exc.filename is None:
            raise
        raise AccessError(
            f"{exc.filename}: {exc.strerror}; check the AWS settings", url=url
        ) from exc


def map_service_error(
    exc: ClientError, code: str, url: str, key: str | None, *, busy: bool
) -> AccessError | UnavailableError | None:
    """Map an error of a credentials service; return None if the error is the store's own.

    Two errors are temporary although their codes do not show it: an expired web identity token,
    which is renewed outside the program, and a token issuer that cannot be reached.

    Args:
        exc: Error to map.
        code: Code of the error.
        url: URL of the store.
        key: Key of the requested object.
        busy: True if the code alone shows that the service is busy.
    """
    if not _SERVICES.match(exc.operation_name):
        return None
    if (
        busy
        or code == "IDPCommunicationError"
        or (code == "InvalidIdentityToken" and "verification key" in str(exc))
        or (code.startswith("ExpiredToken") and exc.operation_name.endswith("WebIdentity"))
    ):
        return UnavailableError(f"no credentials yet: {_line(exc)}", url=url, key=key)
    return AccessError(f"no credentials: {_line(exc)}; check the AWS settings", url=url)


def _is_temporary(text: str) -> bool:
    """Return whether the credentials endpoint may respond later, judged by botocore's message."""
    if status := re.search(r"non 200 response (\d+)", text):
        return is_busy(int(status[1]))
    return (
        "container metadata" in text  # no response, or not JSON
        or "Credential refresh failed" in text  # the endpoint has given credentials before
    )


def _metadata_is_busy() -> bool:
    """Return whether instance metadata exists but fails, which botocore reports as no credentials.

    If nothing responds, the machine has no metadata.
    """
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", _METADATA).rstrip("/")
    headers = {"x-aws-ec2-metadata-token-ttl-seconds": "60"}
    status, token = _ask(f"{base}/latest/api/token", "PUT", headers)
    if status != HTTPStatus.REQUEST_TIMEOUT and is_busy(status):
        return True
    # because of its hop limit, the token may not reach a container; then try without one
    headers = {"x-aws-ec2-metadata-token": token} if status == HTTPStatus.OK else {}
    status, role = _ask(f"{base}/latest/meta-data/iam/security-credentials/", "GET", headers)
    return is_busy(status) or (
        status == HTTPStatus.OK and bool(role)
    )  # a role: metadata works again


def _ask(url: str, method: str, headers: dict[str, str]) -> tuple[int, str]:
    """Send a request; return (status, text): 408 without a response, 0 without a connection."""
    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=_METADATA_SECONDS) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as exc:
        return exc.code, ""
    except urllib.error.URLError:
        return 0, ""
    except (OSError, ValueError):
        return HTTPStatus.REQUEST_TIMEOUT, ""


def _line(exc: Exception) -> str:
    return " ".join(str(exc).split())
