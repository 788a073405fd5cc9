"""An S3-compatible endpoint as an object store; the only module that talks to boto3."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,  # noqa: A004 - boto's own name
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    ResponseStreamingError,
)

from dist_sae.config.data import S3Config
from dist_sae.errors import (
    AccessError,
    ObjectNotFoundError,
    StoreError,
    StoreFullError,
    UnavailableError,
)

_NOT_FOUND = {"404", "NoSuchKey", "NotFound"}
_REFUSED = {
    "403": "access denied; check the credentials and their permissions on this bucket",
    "AccessDenied": "access denied; check the credentials' permissions on this bucket",
    "InvalidAccessKeyId": "the access key is unknown to the endpoint; check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY",
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
_BUSY = {"SlowDown", "ServiceUnavailable", "InternalError", "500", "502", "503", "504", "429"}
_EXISTS = {"PreconditionFailed", "412"}
_RACING = {"ConditionalRequestConflict", "409"}
_OUT_OF_RANGE = {"InvalidRange", "416"}
_ATTEMPTS = 5
_RACES = 100


class S3Store:
    """`s3://bucket/prefix`. The client is made on first use and dropped when pickled."""

    def __init__(self, url: str, config: S3Config) -> None:
        self._url = url
        self._config = config
        self._bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_client"}

    @property
    def url(self) -> str:
        return self._url

    def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        if stop is not None and stop <= start:
            if self.size(key) is None:
                raise ObjectNotFoundError("no such object", url=self.url, key=key)
            return b""
        last = "" if stop is None else stop - 1
        span = {} if (start, stop) == (0, None) else {"Range": f"bytes={start}-{last}"}
        with self._errors(key):
            return self._read(key, span)

    def _read(self, key: str, span: Mapping[str, str]) -> bytes:
        """GET, again when the connection breaks on the way: boto retries until the headers only."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                answer = self._client.get_object(
                    Bucket=self._bucket, Key=self._prefix + key, **span
                )
                data: bytes = answer["Body"].read()
            except ClientError as exc:
                if span and _code(exc) in _OUT_OF_RANGE:
                    return b""
                raise
            except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
                if attempt == _ATTEMPTS:
                    raise
            else:
                return data
        raise AssertionError  # the last attempt returns or raises

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        with self._errors(key):
            for _ in range(_RACES):
                try:
                    self._client.put_object(
                        Bucket=self._bucket, Key=self._prefix + key, Body=data, **condition
                    )
                except ClientError as exc:
                    if if_absent and _code(exc) in _EXISTS:
                        return False
                    if not (if_absent and _code(exc) in _RACING):
                        raise
                    # another writer was at it in this instant: ask again
                else:
                    return True
        raise UnavailableError(
            f"the endpoint answered {_RACES} times that others write it", url=self.url, key=key
        )

    def size(self, key: str) -> int | None:
        try:
            with self._errors(key):
                head = self._client.head_object(Bucket=self._bucket, Key=self._prefix + key)
        except ObjectNotFoundError:
            self._check_bucket()  # a HEAD cannot tell a missing key from a missing bucket
            return None
        return int(head["ContentLength"])

    def keys(self, prefix: str = "") -> Iterator[str]:
        with self._errors(prefix or None):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            for page in pages:
                for entry in page.get("Contents", ()):
                    yield entry["Key"][len(self._prefix) :]

    def delete(self, key: str) -> None:
        with self._errors(key):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)

    @cached_property
    def _client(self) -> Any:
        # Patience is for a run under way. A mistyped endpoint should be told at once: any answer
        # will do here, and what is wrong besides the call itself will hear.
        session = boto3.session.Session()
        with suppress(ClientError):
            self._connect(session, attempts=2).head_bucket(Bucket=self._bucket)
        return self._connect(session, attempts=_ATTEMPTS)

    def _connect(self, session: boto3.session.Session, *, attempts: int) -> Any:
        config = Config(
            retries={"mode": "standard", "max_attempts": attempts},
            connect_timeout=5,
            read_timeout=60,
            max_pool_connections=32,
            s3={"addressing_style": "path" if self._config.path_style else "virtual"},
            # many S3-compatible endpoints refuse boto's checksums; ours are in the manifests
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        return session.client(
            "s3",
            endpoint_url=self._config.endpoint_url,
            region_name=self._config.region or session.region_name or "us-east-1",
            config=config,
        )

    def _check_bucket(self) -> None:
        with self._errors(None):
            try:
                self._client.head_bucket(Bucket=self._bucket)
            except ClientError as exc:
                if _code(exc) in _NOT_FOUND:
                    raise AccessError(_REFUSED["NoSuchBucket"], url=self.url) from exc
                raise

    @contextmanager
    def _errors(self, key: str | None) -> Iterator[None]:
        try:
            yield
        except (CredentialRetrievalError, PartialCredentialsError, ProfileNotFound) as exc:
            raise AccessError(f"{_line(exc)}; check the AWS settings", url=self.url) from exc
        except NoCredentialsError as exc:
            raise AccessError(
                "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "AWS_PROFILE or a web identity",
                url=self.url,
            ) from exc
        except ClientError as exc:
            raise self._mapped(exc, key) from exc
        except ParamValidationError as exc:
            raise AccessError(_REFUSED["InvalidBucketName"], url=self.url) from exc
        except (ConnectionError, HTTPClientError, IncompleteReadError) as exc:
            endpoint = self._config.endpoint_url or "AWS"
            raise UnavailableError(
                f"{endpoint} does not answer ({type(exc).__name__}); "
                f"check store.s3.endpoint_url and the network",
                url=self.url,
                key=key,
            ) from exc
        except BotoCoreError as exc:
            raise StoreError(_line(exc), url=self.url, key=key) from exc

    def _mapped(self, exc: ClientError, key: str | None) -> StoreError:
        code = _code(exc)
        if code in _NOT_FOUND:
            return ObjectNotFoundError("no such object", url=self.url, key=key)
        if code in _REFUSED:
            return AccessError(_REFUSED[code], url=self.url)
        if code in _FULL:
            return StoreFullError("no space left or over quota", url=self.url, key=key)
        if code in _BUSY:
            return UnavailableError(f"the endpoint keeps answering {code}", url=self.url, key=key)
        return StoreError(_line(exc), url=self.url, key=key)


def _code(exc: ClientError) -> str:
    return str(exc.response.get("Error", {}).get("Code", ""))


def _line(exc: Exception) -> str:
    """An error of boto's on one line."""
    return " ".join(str(exc).split())
