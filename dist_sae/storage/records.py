"""JSON objects of the store that carry their own checksum, and are read until it fits."""

import hashlib
import json
import logging
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from dist_sae.errors import CorruptObjectError
from dist_sae.storage.base import ObjectStore

logger = logging.getLogger(__name__)

READS = 3  # of bytes that do not match their checksum: the line may be at fault, not the object
_SEAL = "sha256"


class Record(BaseModel):
    """A JSON object, or part of one. Top-level ones have a field `schema_version`."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Some = TypeVar("Some", bound=Record)


def digest(record: Record) -> str:
    """Checksum of the record's content."""
    return _digest(record.model_dump(mode="json"))


def seal(record: Record) -> bytes:
    """The record as JSON, with the checksum of the rest as its last field."""
    content = record.model_dump(mode="json")
    return _canonical({**content, _SEAL: _digest(content)})


def unseal(model: type[Some], data: bytes, store: ObjectStore, key: str) -> Some:
    """What `seal` made bytes of.

    Raises:
        CorruptObjectError: It is damaged, or of a schema that this version does not know.
    """
    try:
        content = json.loads(data)
        known = model.model_fields["schema_version"].default
        if content["schema_version"] != known:
            raise CorruptObjectError(
                f"has schema version {content['schema_version']}, this program reads {known}; "
                f"use the version of dist-sae that wrote it",
                url=store.url,
                key=key,
            )
        if content.pop(_SEAL) != _digest(content):
            raise CorruptObjectError("does not match its checksum", url=store.url, key=key)
        return model.model_validate(content)
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as exc:
        reason = (str(exc) or type(exc).__name__).splitlines()[0]
        raise CorruptObjectError(f"is damaged: {reason}", url=store.url, key=key) from exc


def read_record(model: type[Some], store: ObjectStore, key: str) -> Some:
    """The record under a key, fetched again when it is damaged.

    Raises:
        ObjectNotFoundError: There is none.
        CorruptObjectError: It is damaged in the store, or of another schema.
    """
    for _ in range(READS - 1):
        try:
            return unseal(model, store.get(key), store, key)
        except CorruptObjectError as exc:
            logger.warning("%s; reading it again", exc)
    return unseal(model, store.get(key), store, key)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(content)).hexdigest()


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
