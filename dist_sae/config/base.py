"""Base class and field types for the sections of a run file."""

import os
import re
from dataclasses import dataclass
from typing import Annotated, Any, cast
from urllib.parse import unquote

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
)
from pydantic.config import JsonDict
from pydantic_core import core_schema


def _require_kind(schema: JsonDict) -> None:
    """Make `kind` required in the schema, since it selects the member of a union."""
    if "kind" in cast("JsonDict", schema.get("properties", {})):
        schema["required"] = ["kind", *cast("list[str]", schema.get("required", []))]


class Section(BaseModel):
    """An immutable section of the run file. Unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        json_schema_extra=_require_kind,
    )


@dataclass(frozen=True)
class Shape:
    """Required form of a string: a regular expression for the schema and a hint for the user."""

    pattern: str
    words: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "pattern": self.pattern}

    def _check(self, value: str) -> str:
        if not re.fullmatch(self.pattern, value, re.ASCII):
            raise ValueError(f"{self.words} (got {value!r})")
        return value


def _check_store_url(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    if not url:
        raise ValueError("is empty: use s3://bucket/prefix, file:///path or a path")
    if separator and scheme not in ("file", "s3"):
        raise ValueError(
            f"unknown scheme {scheme!r}: use s3://bucket/prefix, file:///path or a path"
        )
    if separator and scheme == "s3" and not rest.partition("/")[0]:
        raise ValueError(f"{url} has no bucket: use s3://bucket/prefix")
    if separator and scheme == "file" and not rest.startswith("/"):
        raise ValueError(f"{url} contains a host: use file:///path, with three slashes")
    if os.path.expanduser(url).startswith("~"):
        raise ValueError(f"{url} begins with the home folder of an unknown user")
    if url.rstrip("/") in ("", "file:"):
        raise ValueError("is the root of the file system: use a folder in it")
    return url.rstrip("/")


def folder_of(url: str) -> str | None:
    """Return the absolute path of a local store's folder, or None for S3.

    The path of a file:// URL may be percent-encoded. "#" and "?" are part of the path.
    """
    if url.startswith("s3://"):
        return None
    path = unquote(url.removeprefix("file://")) if url.startswith("file://") else url
    return os.path.abspath(os.path.expanduser(path))


StoreUrl = Annotated[str, AfterValidator(_check_store_url)]
"""`s3://bucket/prefix`, `file:///path`, or a path relative to the current directory."""
