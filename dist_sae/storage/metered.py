"""Wrapper that counts and times the operations of any store."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from dist_sae.errors import ObjectNotFoundError, StoreError
from dist_sae.storage.base import Entry, Meter, ObjectStore


class MeteredStore:
    """Forwards every call to a store and reports its count, time, bytes and errors."""

    def __init__(self, store: ObjectStore, meter: Meter) -> None:
        self._store = store
        self._meter = meter

    @property
    def url(self) -> str:
        return self._store.url

    @property
    def exclusive(self) -> bool:
        return self._store.exclusive

    def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        with self._timed("get"):
            data = self._store.get(key, start, stop)
        self._meter.add("dist_sae_store_bytes_total", len(data), direction="in")
        return data

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        with self._timed("put"):
            written = self._store.put(key, data, if_absent=if_absent)
        if written:
            self._meter.add("dist_sae_store_bytes_total", len(data), direction="out")
        return written

    def put_stream(self, key: str, content: Callable[[], Iterable[bytes]]) -> None:
        written = 0

        def counted() -> Iterator[bytes]:
            nonlocal written
            written = 0
            for piece in content():
                written += len(piece)
                yield piece

        with self._timed("put"):
            self._store.put_stream(key, counted)
        self._meter.add("dist_sae_store_bytes_total", written, direction="out")

    def size(self, key: str) -> int | None:
        with self._timed("size"):
            return self._store.size(key)

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        with self._timed("list"):
            found = list(self._store.entries(prefix))
        yield from found

    def keys(self, prefix: str = "") -> Iterator[str]:
        with self._timed("list"):
            found = list(self._store.keys(prefix))
        yield from found

    def folders(self, prefix: str) -> list[str]:
        with self._timed("list"):
            return self._store.folders(prefix)

    def delete(self, key: str) -> None:
        with self._timed("delete"):
            self._store.delete(key)

    def delete_many(self, keys: Sequence[str]) -> None:
        with self._timed("delete"):
            self._store.delete_many(keys)

    @contextmanager
    def _timed(self, operation: str) -> Iterator[None]:
        since = time.monotonic()
        try:
            yield
        except ObjectNotFoundError:  # a valid response, not a failure
            raise
        except StoreError as exc:
            self._meter.add("dist_sae_store_errors_total", 1, error=type(exc).__name__)
            raise
        finally:
            seconds = time.monotonic() - since
            self._meter.observe("dist_sae_store_operation_seconds", seconds, operation=operation)
