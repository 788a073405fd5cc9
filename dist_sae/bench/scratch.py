"""Temporary location in a store, for measurements."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from dist_sae.config.data import S3Config
from dist_sae.storage import ObjectStore, open_store
from dist_sae.storage.local import LocalStore


@contextmanager
def scratch(url: str, s3: S3Config) -> Iterator[ObjectStore]:
    """Open a new location under `url`, and delete all of it at the end, also after an error."""
    store = open_store(f"{url}/bench-{uuid.uuid4().hex[:12]}", s3)
    try:
        yield store
    finally:
        for key in list(store.keys()):
            store.delete(key)
        if isinstance(store, LocalStore):
            shutil.rmtree(store.root, ignore_errors=True)
