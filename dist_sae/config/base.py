"""What every section of a run file has in common."""

from typing import Annotated

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
    if url.rstrip("/") in ("", "file:"):
        raise ValueError("is the root of the file system: name a folder in it")
    return url.rstrip("/")


StoreUrl = Annotated[str, AfterValidator(_check_store_url)]
"""`s3://bucket/prefix`, `file:///path`, or a path relative to the current directory."""
