"""Stores behind S3 endpoints, and the error messages of their methods."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from dist_sae.config.data import S3Config
from dist_sae.errors import EXIT_RESUMABLE, EXIT_USER, StoreError, UnavailableError
from dist_sae.storage import ObjectStore, open_store
from dist_sae.storage.base import Meter
from tests.conftest import Bucket

METHODS: dict[str, Callable[[ObjectStore], object]] = {
    "get": lambda store: store.get("a/b"),
    "put": lambda store: store.put("a/b", b""),
    "put_if_absent": lambda store: store.put("a/b", b"", if_absent=True),
    "size": lambda store: store.size("a/b"),
    "keys": lambda store: list(store.keys("a/b")),
    "delete": lambda store: store.delete("a/b"),
    "delete_many": lambda store: store.delete_many(["a/b"]),
}
WRITES = {"put", "put_if_absent", "delete", "delete_many"}
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
    """Open a store in the bucket through an endpoint; by default the bucket's own."""
    config = S3Config(
        endpoint_url=endpoint or bucket.endpoint_url, deadline_seconds=seconds, **settings
    )
    return open_store(f"s3://{bucket.name}/some/prefix", config, meter, stopping)


def error_message(error: type[StoreError], store: ObjectStore, *methods: str) -> str:
    """Call these methods, check that all raise this error, and return their common message."""
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
