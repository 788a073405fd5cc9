"""JSON objects that carry their own checksum; a read that does not match is repeated."""

import hashlib
import json
import logging
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from dist_sae.errors import CorruptObjectError
from dist_sae.storage.base import ObjectStore

logger = logging.getLogger(__name__)

READS = 3  # attempts: a checksum mismatch may come from the network, not the object
_SEAL = "sha256"


class Record(BaseModel):
    """A JSON object or part of one; a top-level record has a field `schema_version`."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Some = TypeVar("Some", bound=Record)


def digest(record: Record) -> str:
    """Compute the checksum of a record's content."""
    return _digest(record.model_dump(mode="json"))


def seal(record: Record) -> bytes:
    """Serialise a record as JSON, with the checksum of the other fields as its last field."""
    content = record.model_dump(mode="json")
    return _canonical({**content, _SEAL: _digest(content)})


def unseal(model: type[Some], data: bytes, store: ObjectStore, key: str, remedy: str = "") -> Some:
    """Parse the bytes that `seal` wrote.

    Args:
        model: Their kind.
        data: The bytes.
        store: Where they are from, for messages.
        key: Their key.
        remedy: What a user can do about a damaged object.

    Raises:
        CorruptObjectError: The bytes are damaged, or their schema version is unknown.
    """
    then = remedy and f"; {remedy}"
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
            raise CorruptObjectError(f"does not match its checksum{then}", url=store.url, key=key)
        return model.model_validate(content)
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as exc:
        reason = (str(exc) or type(exc).__name__).splitlines()[0]
        raise CorruptObjectError(f"is damaged: {reason}{then}", url=store.url, key=key) from exc


def read_record(model: type[Some], store: ObjectStore, key: str, remedy: str = "") -> Some:
    """Read a record, and read it again if it arrives damaged.

    Args:
        model: Its kind.
        store: Where it is.
        key: Its key.
        remedy: What a user can do about a damaged one.

    Raises:
        ObjectNotFoundError: There is no object under the key.
        CorruptObjectError: The record is damaged in the store, or has another schema version.
    """
    for _ in range(READS - 1):
        try:
            return unseal(model, store.get(key), store, key, remedy)
        except CorruptObjectError as exc:
            logger.warning("%s; reading it again", exc)
    return unseal(model, store.get(key), store, key, remedy)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(content)).hexdigest()


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
