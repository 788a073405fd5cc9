"""JSON objects that contain their own checksum; a read that does not match it is repeated."""

import hashlib
import json
import logging
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo

from dist_sae.errors import CorruptObjectError
from dist_sae.storage.base import ObjectStore

logger = logging.getLogger(__name__)

READS = 3  # attempts: a checksum mismatch may come from the network, not the object
_SEAL = "sha256"


class Record(BaseModel):
    """A JSON object or part of one; a top-level record has a field `schema_version`."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _check_key(key: str, info: ValidationInfo) -> str:
    folder = (info.context or {}).get("within", "")
    if not key.startswith(folder) or {"", ".", ".."} & {*key.split("/")}:
        raise ValueError(f"names {key}, which is not in {folder or 'the store'}")
    return key


Key = Annotated[str, AfterValidator(_check_key)]
"""Key of an object that a record names. It must be in the folder that `read_record` gets as
`within`. Otherwise anyone who can write the record could choose what is read or deleted elsewhere.
"""
Some = TypeVar("Some", bound=Record)


def digest(record: Record) -> str:
    """Compute the checksum of a record's content."""
    return _digest(record.model_dump(mode="json"))


def seal(record: Record) -> bytes:
    """Serialize a record as JSON, with an extra field for the checksum of the other fields."""
    content = record.model_dump(mode="json")
    return _canonical({**content, _SEAL: _digest(content)})


def unseal(
    model: type[Some],
    data: bytes,
    store: ObjectStore,
    key: str,
    remedy: str = "",
    within: str = "",
) -> Some:
    """Parse the bytes that `seal` wrote.

    Args:
        model: Class of the record.
        data: Bytes to parse.
        store: Store that the bytes are from, for messages.
        key: Key that the bytes are from, for messages.
        remedy: What a user can do about a damaged object.
        within: Folder that must contain every `Key` of the record.

    Raises:
        CorruptObjectError: The bytes are damaged, their schema version is unknown, or a key is
            outside of `within`.
    """
    then = remedy and f"; {remedy}"
    try:
        content = json.loads(data)
        known = model.model_fields["schema_version"].default
        if content["schema_version"] != known:
            raise CorruptObjectError(
                f"has schema version {content['schema_version']}, but this program reads {known}; "
                f"use the version of dist-sae that wrote it",
                url=store.url,
                key=key,
            )
        if content.pop(_SEAL) != _digest(content):
            raise CorruptObjectError(f"does not match its checksum{then}", url=store.url, key=key)
        return model.model_validate(content, context={"within": within})
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        first = exc.errors()[0] if isinstance(exc, ValidationError) else None
        reason = (str(exc) or type(exc).__name__).splitlines()[0]
        if first:
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise CorruptObjectError(f"is damaged: {reason}{then}", url=store.url, key=key) from exc


def read_record(
    model: type[Some], store: ObjectStore, key: str, remedy: str = "", within: str = ""
) -> Some:
    """Read a record; retry if it arrives damaged.

    Args:
        model: Class of the record.
        store: Store to read from.
        key: Key of the record.
        remedy: What a user can do about a damaged record.
        within: Folder that must contain every `Key` of the record.

    Raises:
        ObjectNotFoundError: No object exists under the key.
        CorruptObjectError: The record is damaged in the store, has an unknown schema version, or
            names a key outside of `within`.
    """
    for _ in range(READS - 1):
        try:
            return unseal(model, store.get(key), store, key, remedy, within)
        except CorruptObjectError as exc:
            logger.warning("%s; reading it again", exc)
    return unseal(model, store.get(key), store, key, remedy, within)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(content)).hexdigest()


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
