"""Mapping from errors of S3 endpoints and boto to the errors of `errors.py`."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import urllib3.exceptions
from boto3.exceptions import Boto3Error
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,  # noqa: A004 - boto's own name
    EndpointProviderError,
    HTTPClientError,
    IncompleteReadError,
    ParamValidationError,
    SSLError,
)
from botocore.parsers import ResponseParserError

from dist_sae.errors import (
    AccessError,
    ObjectNotFoundError,
    StoreError,
    StoreFullError,
    UnavailableError,
)
from dist_sae.storage import s3_credentials

# patterns, because implementations use different codes
_REFUSALS = {
    "NoSuchBucket": "no such bucket; create it or correct the URL",
    "InvalidBucketName": "not a valid bucket name; correct the URL",
    "AccessDenied": "access denied; check the credentials' permissions on this bucket",
    "401": "access denied; check the credentials",
    "403|AllAccessDisabled": "access denied; check the credentials and their permissions on this "
    "bucket",
    "InvalidAccessKeyId": "the access key is unknown to the endpoint; check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY",
    "InvalidToken": "the session token is not valid; check AWS_SESSION_TOKEN",
    "ExpiredToken|ExpiredTokenException|TokenRefreshRequired": "the session token has expired; "
    "renew the credentials",
    "RequestTimeTooSkewed|RequestExpired": "this machine's clock is wrong; set it",
    "301|PermanentRedirect|AuthorizationHeaderMalformed|IllegalLocationConstraintException": "the "
    "bucket is in another region; set store.s3.region",
    r"KMS\.(?!Internal|Thrott).*": "the encryption key cannot be used; check store.s3.kms_key_id "
    "and the bucket's key",
}
_KNOWN_ERRORS: tuple[tuple[str, type[StoreError], str], ...] = (
    ("NoSuchKey", ObjectNotFoundError, "no such object"),
    *((code, AccessError, message) for code, message in _REFUSALS.items()),
    (
        "InvalidObjectState",
        StoreError,
        "is archived (for example in Glacier); restore it, and exempt this prefix from the "
        "bucket's rules that archive objects",
    ),
    (
        ".*(Quota|InsufficientStorage|StorageFull|StorageCap).*|507",
        StoreFullError,
        "no space left or over quota",
    ),
)
_BUSY = re.compile(
    ".*(SlowDown|Thrott|TooManyRequests|RequestLimit|BandwidthLimit|ThroughputExceeded"
    "|Unavailable|Timeout|InternalError|InternalFailure|InternalServer|KMS.Internal"
    "|NotInitialized|OperationAborted|TransactionInProgress|TemporaryRedirect"
    "|ConditionalRequestConflict"  # another writer at the same instant
    "|BadDigest|ContentSHA256Mismatch|ChecksumMismatch|IncompleteBody).*"  # damaged in transit
)
_BUSY_STATUSES = {
    404,  # without a code that is listed above: from a proxy that has lost its server
    409,
}
_REFUSED_STATUSES = {401, 403}
_FULL_STATUS = 507


@contextmanager
def mapped(url: str, key: str | None, endpoint_url: str | None) -> Iterator[None]:
    """Raise boto's errors as ours, with the store and the key."""
    try:
        with s3_credentials.mapped(url, key):
            yield
    except EndpointProviderError as exc:
        raise AccessError(f"{line_of(exc)}; check store.s3.endpoint_url", url=url) from exc
    except ClientError as exc:
        raise _mapped(exc, url, key) from exc
    except ParamValidationError as exc:
        raise AccessError("not a valid bucket name; correct the URL", url=url) from exc
    except (
        ConnectionError,
        HTTPClientError,
        IncompleteReadError,
        ResponseParserError,
        urllib3.exceptions.HTTPError,  # botocore does not wrap errors while a body is read
    ) as exc:
        if isinstance(exc, SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(exc):
            raise AccessError(
                f"the certificate of {endpoint_url} is not trusted; set store.s3.ca_bundle",
                url=url,
            ) from exc
        endpoint = _unresponsive_endpoint(exc) or endpoint_url or "AWS"
        raise UnavailableError(
            f"{endpoint} does not respond ({type(exc).__name__}); "
            f"check store.s3.endpoint_url and the network",
            url=url,
            key=key,
        ) from exc
    except (BotoCoreError, Boto3Error) as exc:
        raise StoreError(line_of(exc), url=url, key=key) from exc


def _mapped(exc: ClientError, url: str, key: str | None) -> StoreError:
    code, status = code_of(exc), _status(exc) or 0
    busy = bool(_BUSY.fullmatch(code)) or s3_credentials.is_busy(status)
    if refusal := s3_credentials.map_service_error(exc, code, url, key, busy=busy):
        return refusal
    if "kms:" in str(exc):  # the name of the missing permission
        return AccessError(f"{line_of(exc)}; check store.s3.kms_key_id", url=url)
    for shape, error, message in _KNOWN_ERRORS:
        if re.fullmatch(shape, "507" if status == _FULL_STATUS else code):
            return error(message, url=url, key=None if error is AccessError else key)
    if busy or status in _BUSY_STATUSES or code.isdigit():  # a bare status: the body was lost
        return UnavailableError(f"the endpoint returned {code}", url=url, key=key)
    if status in _REFUSED_STATUSES:
        return AccessError(f"{line_of(exc)}; check the credentials and the account", url=url)
    return StoreError(line_of(exc), url=url, key=key)


def _unresponsive_endpoint(exc: Exception) -> str | None:
    """Return the endpoint that did not respond: the store's or a credentials service's."""
    url = urlsplit(getattr(exc, "kwargs", {}).get("endpoint_url") or "")
    return f"{url.scheme}://{url.netloc}" if url.netloc else None


def code_of(exc: ClientError) -> str:
    """Return the endpoint's error code, or the HTTP status if boto cannot parse the response."""
    return str(exc.response.get("Error", {}).get("Code") or _status(exc))


def _status(exc: ClientError) -> int | None:
    status: int | None = exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status


def line_of(exc: Exception) -> str:
    """Return a boto error's message on one line."""
    return " ".join(str(exc).split())
