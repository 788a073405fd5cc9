"""Maintenance of an activation set: lists its contents and shards, and deletes orphaned shards."""

import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dist_sae.config import Run
from dist_sae.data.consumers import Consumers, kept_units, retired_below
from dist_sae.data.plan import load_plan
from dist_sae.data.shard import CLAIMS, SHARDS, existing_units, read_manifest
from dist_sae.errors import ConfigError, DataExhaustedError
from dist_sae.storage import open_store

logger = logging.getLogger(__name__)

_READERS = 16  # threads that read manifests


def ls(run: Run) -> dict[str, Any]:
    """Summarize the set: its units and bytes, the runs that read it, and the producers' claims.

    Raises:
        PlanMismatchError: The store has no plan, or a plan that does not fit the run.
    """
    store = open_store(run.store.activations, run.store.s3)
    plan = load_plan(store, run)
    consumers = Consumers(store, run.store.consumer_expiry_hours)
    units = list(existing_units(store))
    sizes: Counter[str] = Counter()
    for key, entry in SHARDS.entries(store):
        sizes[key["site"]] += entry.bytes
    return {
        "url": store.url,
        "plan": plan.hash,
        "train_units": f"{sum(u in plan.train_units for u in units)} of {plan.n_train_units}",
        "heldout_units": f"{sum(u in plan.heldout_units for u in units)} "
        f"of {len(plan.heldout_units)}",
        "retired_units": retired_below(store),
        "bytes": {site: float(size) for site, size in sorted(sizes.items())},
        "runs": {
            consumer.run: (
                f"reads unit {consumer.reached}, needs {consumer.needed} and later; "
                f"last reported {entry.age_seconds:.0f} s ago"
                + (" (abandoned)" if consumers.is_abandoned(entry) else "")
            )
            for consumer, entry in consumers.all()
        },
        "claims": {
            entry.key: f"renewed {entry.age_seconds:.0f} s ago"
            for _, entry in CLAIMS.entries(store)
        },
    }


def urls(run: Run, site: str, *, heldout: bool) -> list[str]:
    """List the shards of one site in plan order, as paths or s3:// URLs.

    A glob pattern cannot replace this list, because it would mix training and held-out shards and
    match orphaned ones.

    Args:
        heldout: Whether to list held-out units instead of training units.

    Raises:
        ConfigError: The activation set has no such site.
        DataExhaustedError: No such units exist.
        PlanMismatchError: The store has no plan, or a plan that does not fit the run.
    """
    store = open_store(run.store.activations, run.store.s3)
    plan = load_plan(store, run)
    wanted = plan.heldout_units if heldout else kept_units(store, plan)
    units = sorted(set(existing_units(store)) & set(wanted))
    if not units:
        what = "held-out" if heldout else "training"
        raise DataExhaustedError(f"{store.url}: no {what} units exist; run `dist-sae produce`")
    with ThreadPoolExecutor(_READERS) as pool:
        manifests = list(pool.map(lambda unit: read_manifest(store, unit), units))
    if site not in manifests[0].sites:
        sites = ", ".join(manifests[0].sites)
        raise ConfigError(f"--site {site}: {store.url} has only {sites}")
    logger.info("%d of %d units, %d rows", len(units), len(wanted), sum(m.rows for m in manifests))
    return [f"{store.url}/{manifest.sites[site].key}" for manifest in manifests]


def gc(run: Run, *, hours: float, delete: bool) -> dict[str, Any]:
    """Find shards that no manifest names, and delete them if `delete` is set.

    Such orphans remain if a producer dies within a unit, or if another producer finishes the unit
    first. A manifest is written after its shards, so a young shard may still be named by one.

    Args:
        hours: Minimum age of an orphaned shard.
        delete: Whether to delete the orphans or only list them.

    Raises:
        PlanMismatchError: The store has no plan, or a plan that does not fit the run.
    """
    store = open_store(run.store.activations, run.store.s3)
    load_plan(store, run)
    retired = retired_below(store)
    # list shards before manifests, or the shards of a unit finished in between would look orphaned
    old = {
        entry: int(key["unit"])
        for key, entry in SHARDS.entries(store)
        if entry.age_seconds >= 3600 * hours
    }
    units = set(existing_units(store))
    named: set[str] = set()
    for unit in sorted(set(old.values()) & units):
        if unit >= retired:
            named |= {shard.key for shard in read_manifest(store, unit).sites.values()}
    orphans = [entry for entry in old if entry.key not in named]
    if delete:
        store.delete_many([entry.key for entry in orphans])
    return {
        "orphans": len(orphans),
        "bytes": sum(entry.bytes for entry in orphans),
        "deleted": delete,
        "keys": {entry.key: float(entry.bytes) for entry in orphans},
    }
