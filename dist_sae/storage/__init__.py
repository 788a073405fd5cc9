"""Object stores on a local disk or an S3-compatible endpoint."""

import threading

from dist_sae.config.data import S3Config
from dist_sae.storage.base import UNMETERED, Entry, Meter, ObjectStore
from dist_sae.storage.local import LocalStore
from dist_sae.storage.metered import MeteredStore

__all__ = ["UNMETERED", "Entry", "Meter", "ObjectStore", "open_store"]


def open_store(
    url: str,
    s3: S3Config | None = None,
    meter: Meter | None = None,
    stopping: threading.Event | None = None,
) -> ObjectStore:
    """Open the store at `file:///path`, a path or `s3://bucket/prefix`, without connecting yet.

    Args:
        url: URL or path of the store.
        s3: Settings of the S3-compatible endpoint.
        meter: Receiver of counts of operations, bytes, seconds, errors and S3 requests.
        stopping: Event after which calls retry for only a few seconds.
    """
    store: ObjectStore
    if url.startswith("s3://"):
        from dist_sae.storage.s3 import S3Store  # boto3 takes 0.7 s to import

        store = S3Store(url, s3 or S3Config(), meter, stopping)
    else:
        store = LocalStore(url)
    return store if meter is None else MeteredStore(store, meter)
