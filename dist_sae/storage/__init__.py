"""Immutable objects under keys, on a local disk or an S3-compatible endpoint."""

from dist_sae.config.data import S3Config
from dist_sae.storage.base import ObjectStore
from dist_sae.storage.local import LocalStore

__all__ = ["ObjectStore", "open_store"]


def open_store(url: str, s3: S3Config | None = None) -> ObjectStore:
    """The store behind `file:///path`, a path or `s3://bucket/prefix`. Opens no connection."""
    if url.startswith("s3://"):
        from dist_sae.storage.s3 import S3Store  # boto3 takes .7 s to import

        return S3Store(url, s3 or S3Config())
    return LocalStore(url)
