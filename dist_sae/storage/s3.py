"""An S3-compatible endpoint as an object store.

Large objects are transferred in parts, several at a time.
"""

import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property, partial
from itertools import chain, islice
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from dist_sae.config.data import S3Config
from dist_sae.errors import ObjectNotFoundError, StoreError, UnavailableError
from dist_sae.storage.base import Entry, Meter
from dist_sae.storage.parts import in_parts, map_ahead
from dist_sae.storage.s3_client import make_client
from dist_sae.storage.s3_errors import code_of
from dist_sae.storage.s3_retry import S3Retrier

logger = logging.getLogger(__name__)

# error codes of endpoints, or HTTP statuses if an endpoint sends no code
_EXISTS = {"PreconditionFailed", "412"}
_NOT_IMPLEMENTED = {"NotImplemented", "501"}
_NO_BATCHES = {*_NOT_IMPLEMENTED, "MethodNotAllowed", "405"}
_NO_UPLOAD = {"NoSuchUpload"}
_OUT_OF_RANGE = {"InvalidRange", "416"}

PART_BYTES = 16 * 2**20
"""Size of a part of a transfer."""
CONCURRENT_PARTS = 8
"""Number of parts of an object that are transferred at a time."""
MULTIPART_FROM_BYTES = 2 * PART_BYTES
"""Objects of at least this size are uploaded in parts."""
_DELETED_AT_ONCE = 1000  # limit of DeleteObjects
_PROBE_READS = 3
_RACERS = 4
_TRUNCATED = "the endpoint's response was truncated"


class ConditionNotImplementedError(Exception):
    """The endpoint does not implement If-None-Match."""


class BatchNotImplementedError(Exception):
    """The endpoint cannot delete several objects with one request."""


class UploadGoneError(Exception):
    """The endpoint no longer knows a multipart upload: it was aborted or is already complete."""


class S3Store:
    """Store at `s3://bucket/prefix`; creates its client on first use and drops it when pickled.

    Args:
        url: `s3://bucket/prefix`.
        config: Settings of the endpoint.
        meter: Receiver of counts and durations of requests.
        stopping: Event after which calls retry for only a few seconds.
    """

    def __init__(
        self,
        url: str,
        config: S3Config,
        meter: Meter | None = None,
        stopping: threading.Event | None = None,
    ) -> None:
        self._url = url
        self._config = config
        self._meter = meter
        self._retry = S3Retrier(url, config, meter, stopping or threading.Event(), self._renew)
        self._bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""

    def __reduce__(self) -> Any:
        return S3Store, (self._url, self._config)

    @property
    def url(self) -> str:
        return self._url

    @cached_property
    def exclusive(self) -> bool:
        key = f"probe-{uuid.uuid4().hex}"
        try:
            won = [self._put_if_absent(key, b"first"), self._put_if_absent(key, b"second")]
        except ConditionNotImplementedError:
            won = []
            self.put(key, b"first")
        # "first", or "second" if the condition was ignored; retried, as a read may be damaged
        if not any(self.get(key, 1, 3) in (b"ir", b"ec") for _ in range(_PROBE_READS)):
            raise StoreError(
                "a read does not return what was just written; use a store that is consistent",
                url=self.url,
                key=key,
            )
        self.delete(key)
        if won == [True, False]:
            with ThreadPoolExecutor(_RACERS) as pool:
                won = list(pool.map(lambda i: self._put_if_absent(key, b"%d" % i), range(_RACERS)))
            self.delete(key)
        if sum(won) == 1:
            logger.info("%s: supports If-None-Match; producers claim units", self.url)
            return True
        logger.warning(
            "%s: does not support If-None-Match; producers take units by number",
            self.url,
        )
        return False

    def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        if stop is not None and stop <= start:
            self._get_part(key, 0, 1)  # raises if the object does not exist
            return b""
        first_stop = start + PART_BYTES
        first, size = self._get_part(key, start, min(first_stop, stop or first_stop))
        end = min(size, size if stop is None else stop)
        starts = range(start + len(first), end, PART_BYTES)
        stops = [min(at + PART_BYTES, end) for at in starts]
        rest = self._pool.map(self._get_part, [key] * len(starts), starts, stops)
        return b"".join([first, *(part for part, _ in rest)])[: max(0, end - start)]

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        if if_absent and self.exclusive:
            return self._put_if_absent(key, data)
        if if_absent and self.size(key) is not None:
            return False

        self.put_stream(key, lambda: (data,))
        return True

    def put_stream(self, key: str, content: Callable[[], Iterable[bytes]]) -> None:
        def write() -> None:
            parts = in_parts(content(), PART_BYTES)
            first = b"".join(islice(parts, max(1, MULTIPART_FROM_BYTES // PART_BYTES)))
            if len(first) < MULTIPART_FROM_BYTES:
                self._put_whole(key, first)
            else:
                self._put_parts(key, chain(in_parts((first,), PART_BYTES), parts))

        self._retry(key, write)

    def size(self, key: str) -> int | None:
        # not HEAD: its error has no body, so a missing key and a missing bucket look the same
        try:
            return self._get_part(key, 0, 1)[1]
        except ObjectNotFoundError:
            return None

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        for page in self._pages(prefix):
            now = _clock(page)
            for entry in page.get("Contents", ()):
                age = (now - entry["LastModified"]).total_seconds()
                key, tag = entry["Key"][len(self._prefix) :], entry.get("ETag", "")
                yield Entry(key, entry["Size"], max(0.0, age), tag)

    def keys(self, prefix: str = "") -> Iterator[str]:
        for entry in self.entries(prefix):
            yield entry.key

    def folders(self, prefix: str) -> list[str]:
        found = {
            common["Prefix"][len(self._prefix) + len(prefix) :].rstrip("/")
            for page in self._pages(prefix, Delimiter="/")
            for common in page.get("CommonPrefixes", ())
        }
        return sorted(found)

    def delete(self, key: str) -> None:
        self._retry(key, lambda: self.client.delete_object(**self._where(key)))

    def delete_many(self, keys: Sequence[str]) -> None:
        for first in range(0, len(keys), _DELETED_AT_ONCE):
            batch = keys[first : first + _DELETED_AT_ONCE]
            try:
                self._retry(batch[0], partial(self._delete_batch, batch))
            except BatchNotImplementedError:
                list(self._pool.map(self.delete, batch))

    def _delete_batch(self, keys: Sequence[str]) -> None:
        objects = [{"Key": self._prefix + key} for key in keys]
        try:
            answer = self.client.delete_objects(
                Bucket=self._bucket, Delete={"Objects": objects, "Quiet": True}
            )
        except ClientError as exc:
            if code_of(exc) in _NO_BATCHES:
                raise BatchNotImplementedError from exc
            raise
        for error in answer.get("Errors", ()):  # raise what a DELETE of this key would raise
            raise ClientError({"Error": error}, "DeleteObjects")

    def _pages(self, prefix: str, **options: str) -> Iterator[Any]:
        """Yield the pages of a listing."""
        token: dict[str, str] = {}
        while True:
            page = self._retry(prefix or None, partial(self._list, prefix, {**options, **token}))
            yield page
            if not page["IsTruncated"]:
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _list(self, prefix: str, options: Mapping[str, str]) -> Any:
        page = self.client.list_objects_v2(
            Bucket=self._bucket, Prefix=self._prefix + prefix, **options
        )
        if "IsTruncated" not in page:  # boto parses an empty body as an empty list
            raise UnavailableError(_TRUNCATED, url=self.url, key=prefix or None)
        return page

    def _get_part(self, key: str, start: int, stop: int) -> tuple[bytes, int]:
        """Download bytes [start, stop) of an object; return them and the object's size.

        If the endpoint ignores ranges, everything from `start` on is returned.
        """

        def download() -> tuple[bytes, int]:
            try:
                answer = self.client.get_object(
                    **self._where(key), Range=f"bytes={start}-{stop - 1}"
                )
            except ClientError as exc:
                if code_of(exc) in _OUT_OF_RANGE:
                    return b"", 0
                raise
            data: bytes = answer["Body"].read()
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.get("ContentRange", ""))
            if span is None:
                return data[start:], len(data)
            first, size = (int(number) for number in span.groups())
            if (first, len(data)) != (start, min(stop, size) - start):
                raise UnavailableError(_TRUNCATED, url=self.url, key=key)
            return data, size

        return self._retry(key, download)

    def _put_whole(self, key: str, data: bytes) -> None:
        where = self._where(key)
        self._retry(key, lambda: self.client.put_object(**where, Body=data, **self._encryption))

    def _put_parts(self, key: str, bodies: Iterable[bytes]) -> None:
        where = self._where(key)
        upload = {**where, "UploadId": self._retry(key, partial(self._begin_upload, where))}

        def put_part(part: tuple[int, bytes]) -> dict[str, Any]:
            number, body = part

            def put() -> Any:
                with _upload_errors():
                    return self.client.upload_part(**upload, PartNumber=number, Body=body)

            return {"PartNumber": number, "ETag": self._retry(key, put)["ETag"]}

        def complete() -> None:
            with _upload_errors():
                self.client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})

        try:
            numbered = enumerate(bodies, 1)
            parts = list(map_ahead(self._pool, put_part, numbered, CONCURRENT_PARTS))
            self._retry(key, complete)
        except UploadGoneError as exc:
            raise UnavailableError("the upload is gone", url=self.url, key=key) from exc
        except BaseException:
            with suppress(ClientError, BotoCoreError):
                self.client.abort_multipart_upload(**upload)
            raise

    def _begin_upload(self, where: Mapping[str, str]) -> str:
        answer = self.client.create_multipart_upload(**where, **self._encryption)
        if "UploadId" not in answer:  # boto parses an empty body as a valid response
            raise UnavailableError(_TRUNCATED, url=self.url)
        return str(answer["UploadId"])

    def _put_if_absent(self, key: str, data: bytes) -> bool:
        attempts = 0

        def create() -> bool:
            nonlocal attempts
            attempts += 1
            try:
                self.client.put_object(
                    **self._where(key), Body=data, IfNoneMatch="*", **self._encryption
                )
            except ClientError as exc:
                if code_of(exc) in _NOT_IMPLEMENTED:
                    raise ConditionNotImplementedError from exc
                if code_of(exc) not in _EXISTS:
                    raise
                attempts += exc.response.get("ResponseMetadata", {}).get("RetryAttempts", 0)
                return False
            return True

        created = self._retry(key, create)
        if not created and attempts > 1:  # the response to a successful attempt may have been lost
            with suppress(ObjectNotFoundError):  # it was another writer's object, deleted since
                created = self.get(key) == data
        return created

    def _where(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(CONCURRENT_PARTS, "store")

    @cached_property
    def _encryption(self) -> Mapping[str, str]:
        """Settings of server-side encryption, as arguments of a PUT."""
        config = self._config
        given = {"ServerSideEncryption": config.encryption, "SSEKMSKeyId": config.kms_key_id}
        return {name: value for name, value in given.items() if value is not None}

    @cached_property
    def client(self) -> Any:
        """boto3 client, created at its first use."""
        client = make_client(self.url, self._config, 4 * CONCURRENT_PARTS)
        if self._meter:
            client.meta.events.register("request-created.s3", _start_clock)
            client.meta.events.register("needs-retry.s3", self._count_request)
        return client

    def _renew(self) -> None:
        """Drop the client: a client that found no credentials never looks for them again."""
        self.__dict__.pop("client", None)

    def _count_request(
        self, operation: Any, attempts: int, request_dict: Any, response: Any, **_: object
    ) -> None:
        """Record the status of one boto attempt and the time until its headers arrived."""
        assert self._meter is not None
        status = "none" if response is None else str(response[0].status_code)
        started = request_dict["context"].get("dist_sae_started")
        self._meter.add("dist_sae_store_requests_total", 1, operation=operation.name, status=status)
        if attempts > 1:
            self._meter.add("dist_sae_store_retries_total", 1)
        if started is not None:
            self._meter.observe(
                "dist_sae_store_request_seconds",
                time.monotonic() - started,
                operation=operation.name,
            )


@contextmanager
def _upload_errors() -> Iterator[None]:
    try:
        yield
    except ClientError as exc:
        if code_of(exc) in _NO_UPLOAD:
            raise UploadGoneError from exc
        raise


def _start_clock(request: Any, **_: object) -> None:
    request.context["dist_sae_started"] = time.monotonic()


def _clock(answer: Mapping[str, Any]) -> datetime:
    """Read the endpoint's clock from the Date header of a response."""
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    return parsedate_to_datetime(date) if date else datetime.now(UTC)
