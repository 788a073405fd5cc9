"""What no dictionary changes, kept beside the activation set: `evaluation/<kind>-<digest>.json`.

Every dictionary that is trained on a set is measured against the same things. They are computed for
the first, and read for the others.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

from dist_sae import __version__
from dist_sae.errors import CorruptObjectError, ObjectNotFoundError, StoreError
from dist_sae.storage import ObjectStore
from dist_sae.storage.records import Record, read_record, seal

logger = logging.getLogger(__name__)


class Kept(Record):
    """A result, and all that it depends on."""

    schema_version: Literal[1] = 1
    of: dict[str, Any]
    result: dict[str, Any]


def kept(
    store: ObjectStore, kind: str, of: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """What `compute` returns, from the store if it is there.

    What is there is never changed. Another version of the package computes its own, since its code
    may be other. A damaged object is made anew; where the store takes none, the
    result is computed each time.

    Args:
        store: The activation set.
        kind: Begins the object's name.
        of: All that the result depends on beside the code, as JSON has it.
        compute: Makes the result, as JSON has it.
    """
    of = {**of, "dist_sae": __version__}
    key = f"evaluation/{kind}-{fingerprint(of)}.json"
    try:
        return read_record(Kept, store, key).result
    except ObjectNotFoundError:
        pass
    except CorruptObjectError as exc:
        logger.warning("%s; it is made anew", exc)
    made = Kept(of=of, result=dict(compute()))
    try:
        store.put(key, seal(made))
    except StoreError as exc:
        logger.warning("%s; it is computed again each time", exc)
    return made.result


def fingerprint(content: Any) -> str:
    """Identifies what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
