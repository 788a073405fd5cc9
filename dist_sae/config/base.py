"""What every section of a run file has in common."""

import os
from typing import Annotated
from urllib.parse import unquote

from pydantic import AfterValidator, BaseModel, ConfigDict


class Section(BaseModel):
    """An immutable part of the run file; unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


def _check_store_url(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    if not url:
        raise ValueError("is empty: use s3://bucket/prefix, file:///path or a path")
    if separator and scheme not in ("file", "s3"):
        raise ValueError(
            f"unknown scheme {scheme!r}: use s3://bucket/prefix, file:///path or a path"
        )
    if separator and scheme == "s3" and not rest.partition("/")[0]:
        raise ValueError(f"{url} names no bucket: use s3://bucket/prefix")
    if separator and scheme == "file" and not rest.startswith("/"):
        raise ValueError(f"{url} names a host: use file:///path, with three slashes")
    if os.path.expanduser(url).startswith("~"):
        raise ValueError(f"{url} begins with the home of a user who is not known here")
    if url.rstrip("/") in ("", "file:"):
        raise ValueError("is the root of the file system: name a folder in it")
    return url.rstrip("/")


def folder_of(url: str) -> str | None:
    """The absolute path of the folder that a store's URL names; None on S3.

    A file:// URL is a path, percent-encoded or not: "#" and "?" are letters of it.
    """
    if url.startswith("s3://"):
        return None
    path = unquote(url.removeprefix("file://")) if url.startswith("file://") else url
    return os.path.abspath(os.path.expanduser(path))


StoreUrl = Annotated[str, AfterValidator(_check_store_url)]
"""`s3://bucket/prefix`, `file:///path`, or a path relative to the current directory."""
