"""What S3 endpoints and boto call an error, and what we call it: one mapping, for `s3.py` alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import urllib3.exceptions
from boto3.exceptions import Boto3Error
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,  # noqa: A004 - boto's own name
    CredentialRetrievalError,
    EndpointProviderError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
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

_NOT_FOUND = {"NoSuchKey"}
_REFUSED = {
    "401": "access denied; check the credentials",
    "403": "access denied; check the credentials and their permissions on this bucket",
    "AccessDenied": "access denied; check the credentials' permissions on this bucket",
    "InvalidAccessKeyId": "the access key is unknown to the endpoint; check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY",
    "InvalidToken": "the session token is not valid; check AWS_SESSION_TOKEN",
    "ExpiredToken": "the session token has expired; renew the credentials",
    "RequestTimeTooSkewed": "this machine's clock is off; set it",
    "PermanentRedirect": "the bucket is in another region; set store.s3.region",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set store.s3.region",
    "NoSuchBucket": "no such bucket; create it or correct the URL",
    "InvalidBucketName": "not a valid bucket name; correct the URL",
}
_FULL = {
    "QuotaExceeded",
    "InsufficientStorage",
    "507",
    "XMinioStorageFull",
    "XMinioAdminBucketQuotaExceeded",
}
_BUSY = {
    "SlowDown",
    "ServiceUnavailable",
    "InternalError",
    "RequestTimeout",
    "RequestLimitExceeded",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "500",
    "502",
    "503",
    "504",
    "429",
    "408",
    "404",  # of a proxy that lacks its server: a server would say what is missing
    "ConditionalRequestConflict",  # another writer is at it in this instant
    "409",
    "BadDigest",  # the bytes were damaged on their way
    "XAmzContentSHA256Mismatch",
    "IncompleteBody",
}


@contextmanager
def mapped(url: str, key: str | None, endpoint_url: str | None) -> Iterator[None]:
    """Raise boto's errors as ours, about an object of a store, or about the store."""
    try:
        yield
    except (CredentialRetrievalError, PartialCredentialsError, ProfileNotFound) as exc:
        raise AccessError(f"{line_of(exc)}; check the AWS settings", url=url) from exc
    except EndpointProviderError as exc:
        raise AccessError(f"{line_of(exc)}; check store.s3.endpoint_url", url=url) from exc
    except NoCredentialsError as exc:
        raise AccessError(
            "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE or a web identity",
            url=url,
        ) from exc
    except ClientError as exc:
        raise _mapped(exc, url, key) from exc
    except ParamValidationError as exc:
        raise AccessError(_REFUSED["InvalidBucketName"], url=url) from exc
    except (
        ConnectionError,
        HTTPClientError,
        IncompleteReadError,
        ResponseParserError,
        urllib3.exceptions.HTTPError,  # botocore lets through what breaks an answer's body
    ) as exc:
        if isinstance(exc, SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(exc):
            raise AccessError(
                f"the certificate of {endpoint_url} is not trusted; set store.s3.ca_bundle",
                url=url,
            ) from exc
        endpoint = endpoint_url or "AWS"
        raise UnavailableError(
            f"{endpoint} does not answer ({type(exc).__name__}); "
            f"check store.s3.endpoint_url and the network",
            url=url,
            key=key,
        ) from exc
    except (BotoCoreError, Boto3Error) as exc:
        raise StoreError(line_of(exc), url=url, key=key) from exc


def _mapped(exc: ClientError, url: str, key: str | None) -> StoreError:
    for answer in (code_of(exc), str(_status(exc))):
        if answer in _NOT_FOUND:
            return ObjectNotFoundError("no such object", url=url, key=key)
        if answer in _REFUSED:
            return AccessError(_REFUSED[answer], url=url)
        if answer in _FULL:
            return StoreFullError("no space left or over quota", url=url, key=key)
        if answer in _BUSY:
            return UnavailableError(f"the endpoint answers {answer}", url=url, key=key)
    if code_of(exc).isdigit():  # no S3 error, or one whose text was lost on the way
        return UnavailableError(
            f"the endpoint answers {code_of(exc)} without a reason", url=url, key=key
        )
    return StoreError(line_of(exc), url=url, key=key)


def code_of(exc: ClientError) -> str:
    """What the endpoint calls it; the HTTP status where boto does not understand what it says."""
    return str(exc.response.get("Error", {}).get("Code") or _status(exc))


def _status(exc: ClientError) -> int | None:
    status: int | None = exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status


def line_of(exc: Exception) -> str:
    """An error of boto's on one line."""
    return " ".join(str(exc).split())
