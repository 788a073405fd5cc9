"""An S3-compatible endpoint as an object store; the only module that talks to boto3."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,  # noqa: A004 - boto's own name
    HTTPClientError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
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
    "403": "access denied; check the credentials' permissions",
    "AccessDenied": "access denied; check the credentials' permissions on this bucket",
    "InvalidAccessKeyId": "the access key is unknown to the endpoint; check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the session token has expired; renew the credentials",
    "RequestTimeTooSkewed": "this machine's clock is off; set it",
    "NoSuchBucket": "no such bucket; create it or correct store.activations / store.runs",
    "InvalidBucketName": "not a valid bucket name; correct store.activations / store.runs",
}
_FULL = {"QuotaExceeded", "EntityTooLarge", "InsufficientStorage", "507"}
_BUSY = {"SlowDown", "ServiceUnavailable", "InternalError", "500", "502", "503", "504", "429"}
_EXISTS = {"PreconditionFailed", "412"}
_RACING = {"ConditionalRequestConflict", "409"}


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
            return b""
        span = {} if (start, stop) == (0, None) else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        with self._errors(key):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key, **span)
            data: bytes = answer["Body"].read()
            return data

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        with self._errors(key):
            while True:
                try:
                    self._client.put_object(
                        Bucket=self._bucket, Key=self._prefix + key, Body=data, **condition
                    )
                except ClientError as exc:
                    if if_absent and _code(exc) in _EXISTS:
                        return False
                    if if_absent and _code(exc) in _RACING:
                        continue  # another writer was at it in this instant: ask again
                    raise
                return True

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
        config = Config(
            retries={"mode": "standard", "max_attempts": 5},
            connect_timeout=5,
            read_timeout=60,
            max_pool_connections=32,
            s3={"addressing_style": "path" if self._config.path_style else "virtual"},
        )
        session = boto3.session.Session()
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
        except (NoCredentialsError, PartialCredentialsError, NoRegionError) as exc:
            raise AccessError(
                "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "AWS_PROFILE or a web identity",
                url=self.url,
            ) from exc
        except ClientError as exc:
            raise self._mapped(exc, key) from exc
        except (ConnectionError, HTTPClientError) as exc:
            endpoint = self._config.endpoint_url or "AWS"
            raise UnavailableError(
                f"{endpoint} does not answer ({type(exc).__name__}); check store.s3.endpoint_url and the network",
                url=self.url,
                key=key,
            ) from exc
        except BotoCoreError as exc:
            raise StoreError(str(exc), url=self.url, key=key) from exc

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
        return StoreError(f"{code}: {exc}", url=self.url, key=key)


def _code(exc: ClientError) -> str:
    return str(exc.response.get("Error", {}).get("Code", ""))
