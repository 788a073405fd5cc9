"""`dist-sae store verify`: check every object of an activation set against its manifest."""

import hashlib
import logging
from typing import Any

from dist_sae.config import Run
from dist_sae.data.plan import load_plan
from dist_sae.data.shard import read_manifest
from dist_sae.errors import CorruptObjectError, ObjectNotFoundError
from dist_sae.storage import open_store

logger = logging.getLogger(__name__)


def verify(run: Run) -> dict[str, Any]:
    """Read everything once.

    Returns:
        `objects` and `bytes` read, and `bad`: what is missing or damaged, by key.

    Raises:
        CorruptObjectError: Something is bad; the message names all of it.
    """
    store = open_store(run.store.activations, run.store.s3)
    plan = load_plan(store, run)
    objects, size, bad = 0, 0, []
    for key in store.keys("units/"):
        manifest = read_manifest(store, int(key[6:14]))
        objects += 1
        if manifest.plan != plan.hash:
            bad.append(key)
        for shard in manifest.sites.values():
            try:
                data = store.get(shard.key)
            except ObjectNotFoundError:
                bad.append(shard.key)
                continue
            objects, size = objects + 1, size + len(data)
            if hashlib.sha256(data).hexdigest() != shard.sha256:
                bad.append(shard.key)
    if bad:
        raise CorruptObjectError(
            f"{len(bad)} of {objects} objects are missing or damaged: {', '.join(bad)}; "
            f"delete their units' manifests and produce them again",
            url=store.url,
        )
    return {"objects": objects, "bytes": size, "bad": 0}
