"""Repair of an index, and deletion of objects that no record names."""

import itertools
import logging
from collections.abc import Iterable, Iterator

from dist_sae.errors import CorruptObjectError, ObjectNotFoundError
from dist_sae.index.layout import (
    TABLES,
    BucketRecord,
    IndexFolder,
    IndexManifest,
    Stored,
    UnitRecord,
    read_stored,
)
from dist_sae.index.records import bucket_records, unit_records
from dist_sae.storage import ObjectStore
from dist_sae.storage.keys import NumberedKeys
from dist_sae.storage.records import Record

logger = logging.getLogger(__name__)


def drop_damaged(
    store: ObjectStore, folder: IndexFolder, manifest: IndexManifest, retired: int
) -> list[str]:
    """Read every object of an index. Delete the damaged ones and the records that name them.

    Workers then rebuild these buckets and units. Codes are not read, because stage 2 checks them.

    Args:
        store: The store of runs.
        folder: The keys of the index.
        manifest: The manifest of the index.
        retired: Units below this number are deleted from the activation set.

    Returns:
        The faults, one line each.

    Raises:
        CorruptObjectError: A damaged object cannot be rebuilt, because it needs deleted units.
            Nothing is changed.
    """
    faults, doomed = list[str](), list[str]()
    needed = set[int]()
    for kind, keys, numbers in (
        (UnitRecord, folder.units, manifest.units),
        (BucketRecord, folder.buckets, range(manifest.n_buckets)),
    ):
        for number in numbers:
            found = list(_faults(store, folder, kind, keys, number))
            if found:
                faults += [fault for fault, _ in found]
                doomed += [*(key for _, key in found), keys.key(number)]
                needed |= {number} if kind is UnitRecord else set(manifest.units)
    check_not_retired(store, folder, needed, retired, faults)
    for fault in faults:
        logger.warning("rebuilding: %s", fault)
    for key in doomed:
        store.delete(key)
    return faults


def check_not_retired(
    store: ObjectStore, folder: IndexFolder, units: Iterable[int], retired: int, faults: list[str]
) -> None:
    """Check that these units of the index can be encoded again.

    Args:
        store: The store of runs.
        folder: The keys of the index.
        units: Units that must be encoded again.
        retired: Units below this number are deleted from the activation set.
        faults: The reasons why these units must be encoded again.

    Raises:
        CorruptObjectError: One of the units is deleted.
    """
    for unit in sorted(unit for unit in units if unit < retired):
        key = folder.units.key(unit)
        try:
            had_rows = not folder.read(store, UnitRecord, unit).deleted
        except (CorruptObjectError, ObjectNotFoundError):
            had_rows = True
        if had_rows:
            raise CorruptObjectError(
                f"cannot be rebuilt because unit {unit} has been deleted (store.retention): "
                f"{faults[0]}; the index was not changed, and another one (index.name) can be "
                f"built from the remaining units",
                url=store.url,
                key=key,
            )


def delete_unreferenced(store: ObjectStore, folder: IndexFolder, manifest: IndexManifest) -> None:
    """Delete the codes of a complete index, and objects that failed attempts have left behind."""
    # read one at a time, since a record takes 84 kB of memory for 64 buckets
    records: Iterable[Record] = itertools.chain(
        unit_records(store, folder, manifest), bucket_records(store, folder, manifest)
    )
    named = {part.key for record in records for part in _objects(record)}
    for name in ("codes", *TABLES):
        store.delete_many([k for k in store.keys(f"{folder.prefix}{name}/") if k not in named])


def _faults(
    store: ObjectStore, folder: IndexFolder, kind: type[Record], keys: NumberedKeys, number: int
) -> Iterator[tuple[str, str]]:
    """Yield each fault of a unit or bucket, with the key of the damaged object."""
    try:
        stored = list(_objects(folder.read(store, kind, number)))
    except ObjectNotFoundError:
        return  # the unit or bucket is not done yet
    except CorruptObjectError as exc:
        yield str(exc), keys.key(number)
        return
    for part in stored:
        try:
            read_stored(store, part)
        except CorruptObjectError as exc:
            yield str(exc), part.key


def _objects(record: Record) -> Iterator[Stored]:
    """Yield the tables that a unit or bucket consists of."""
    if isinstance(record, UnitRecord):
        parts = [record.origin]
    else:
        assert isinstance(record, BucketRecord)
        pieces = (piece.stored for piece in record.postings)
        parts = [record.latents, record.examples, record.pairs, *pieces]
    yield from (part for part in parts if part is not None)
