"""What every section of a run file has in common."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class Section(BaseModel):
    """An immutable part of the run file; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _check_store_url(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    if separator and scheme not in ("file", "s3"):
        raise ValueError(f"unknown scheme {scheme!r}: use s3://bucket/prefix, file:///path or a path")
    if scheme == "s3" and separator and not rest.strip("/"):
        raise ValueError("names no bucket: use s3://bucket/prefix")
    if not url:
        raise ValueError("is empty: use s3://bucket/prefix, file:///path or a path")
    return url.rstrip("/")


StoreUrl = Annotated[str, AfterValidator(_check_store_url)]
"""`s3://bucket/prefix`, `file:///path`, or a path relative to the current directory."""
