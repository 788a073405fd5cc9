"""Cache of baselines in the activation set's store: `evaluation/<kind>-<digest>.json`.

Baselines do not depend on the dictionary. They are computed for the first dictionary that is
evaluated on a set, and read from the cache for all others.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

from dist_sae import __version__
from dist_sae.distributed.mesh import SINGLE_PROCESS, Mesh
from dist_sae.errors import CorruptObjectError, ObjectNotFoundError, StoreError
from dist_sae.storage import ObjectStore
from dist_sae.storage.records import Record, read_record, seal

logger = logging.getLogger(__name__)


class CachedResult(Record):
    """A result, and everything that it depends on."""

    schema_version: Literal[1] = 1
    of: dict[str, Any]
    result: dict[str, Any]


def cached(
    store: ObjectStore,
    kind: str,
    of: Mapping[str, Any],
    compute: Callable[[], Mapping[str, Any]],
    mesh: Mesh = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Read a result from the store, or compute and store it.

    A stored result is never changed. Another version of the package computes its own, because its
    code may differ. A damaged object is replaced. If the store cannot be written to, the result is
    computed each time.

    Args:
        store: The activation set's store.
        kind: Prefix of the object's name.
        of: Everything that the result depends on except the code, as JSON types.
        compute: Computes the result, as JSON types. Called on all ranks.
        mesh: The ranks. Only rank 0 reads and writes.
    """
    of = {**of, "dist_sae": __version__}
    key = f"evaluation/{kind}-{fingerprint(of)}.json"
    if found := mesh.on_first_rank(lambda: _read(store, key), CachedResult | None):
        return found.result
    made = CachedResult(of=of, result=dict(compute()))
    if mesh.is_first:
        try:
            store.put(key, seal(made))
        except StoreError as exc:
            logger.warning("%s; the result is not cached, and will be computed each time", exc)
    return made.result


def _read(store: ObjectStore, key: str) -> CachedResult | None:
    try:
        return read_record(CachedResult, store, key)
    except ObjectNotFoundError:
        return None
    except CorruptObjectError as exc:
        logger.warning("%s; computing it again", exc)
        return None


def fingerprint(content: Any) -> str:
    """Return a hash of any JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
