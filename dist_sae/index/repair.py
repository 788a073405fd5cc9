"""Upkeep of an index: damaged objects are found, and objects that nothing names are deleted."""

import logging
from collections.abc import Iterator

from dist_sae.errors import CorruptObjectError, ObjectNotFoundError
from dist_sae.index.layout import (
    TABLES,
    BucketRecord,
    IndexFolder,
    IndexManifest,
    Stored,
    UnitRecord,
    bucket_records,
    read_stored,
    unit_records,
)
from dist_sae.storage import ObjectStore
from dist_sae.storage.own import NumberedKeys
from dist_sae.storage.records import Record, read_record

logger = logging.getLogger(__name__)


def drop_damaged(store: ObjectStore, folder: IndexFolder, manifest: IndexManifest) -> list[str]:
    """Read every object of an index; delete the damaged ones, with the manifests that name them.

    Workers then make these buckets and units again. Codes are not read: stage 2 checks them.

    Returns:
        The faults, one line each.
    """
    faults = list[str]()
    for kind, keys, numbers in (
        (UnitRecord, folder.units, manifest.units),
        (BucketRecord, folder.buckets, range(manifest.n_buckets)),
    ):
        for number in numbers:
            faults += _check(store, kind, keys, number)
    for fault in faults:
        logger.warning("%s; it is made again", fault)
    return faults


def delete_unnamed(store: ObjectStore, folder: IndexFolder, manifest: IndexManifest) -> None:
    """Delete the codes of a complete index, and what dead attempts have left."""
    records: list[Record] = list(unit_records(store, folder, manifest))
    records += bucket_records(store, folder, manifest)
    named = {part.key for record in records for part in _objects(record)}
    for name in ("codes", *TABLES):
        for key in list(store.keys(f"{folder.prefix}{name}/")):
            if key not in named:
                store.delete(key)


def _check(
    store: ObjectStore, kind: type[Record], keys: NumberedKeys, number: int
) -> Iterator[str]:
    try:
        stored = list(_objects(read_record(kind, store, keys.key(number))))
    except ObjectNotFoundError:
        return  # not made yet
    except CorruptObjectError as exc:
        yield str(exc)
        store.delete(keys.key(number))
        return
    for part in stored:
        try:
            read_stored(store, part)
        except CorruptObjectError as exc:
            yield str(exc)
            store.delete(part.key)
            store.delete(keys.key(number))


def _objects(record: Record) -> Iterator[Stored]:
    """The objects that a unit or a bucket consists of."""
    if isinstance(record, UnitRecord):
        parts = [record.origin]
    else:
        assert isinstance(record, BucketRecord)
        pieces = (piece.stored for piece in record.postings)
        parts = [record.latents, record.examples, record.pairs, *pieces]
    yield from (part for part in parts if part is not None)
