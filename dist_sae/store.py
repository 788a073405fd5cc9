"""`dist-sae store verify|ls|gc`: the activation set as a whole, against its plan and manifests."""

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import xxhash

from dist_sae.config import Run
from dist_sae.data.claims import CLAIMS
from dist_sae.data.consumers import Consumers, retired_below
from dist_sae.data.plan import Plan, load_plan
from dist_sae.data.shard import (
    MANIFESTS,
    SHARDS,
    SiteShard,
    UnitManifest,
    existing_units,
    manifest_key,
    read_manifest,
)
from dist_sae.errors import CorruptObjectError, ObjectNotFoundError
from dist_sae.storage import ObjectStore, open_store

_AT_ONCE = 4  # shards in memory


class Verification(NamedTuple):
    """What `verify` found."""

    url: str
    objects: int
    bytes: int
    missing_units: int
    """Of the plan; not produced yet, or lost."""
    retired_units: int
    """Consumed, their shards deleted."""
    bad: dict[str, str]
    """What is wrong with an object, by key."""

    def result(self) -> dict[str, Any]:
        """For programs: `bad` is their number, `bad_objects` says which and why."""
        return {
            "objects": self.objects,
            "bytes": self.bytes,
            "missing_units": self.missing_units,
            "retired_units": self.retired_units,
            "bad": len(self.bad),
            "bad_objects": self.bad,
        }

    def raise_if_bad(self) -> None:
        """One line for every bad object, as a `CorruptObjectError`."""
        if self.bad:
            lines = [f"{key}: {fault}" for key, fault in self.bad.items()]
            remedy = (
                f"{len(self.bad)} of {self.objects} objects are bad; "
                f"delete the manifests (units/) of their units and produce them again"
            )
            raise CorruptObjectError("\n".join([remedy, *lines]), url=self.url)


def verify(run: Run) -> Verification:
    """Read the whole activation set once.

    Raises:
        PlanMismatchError: The store holds no plan, or another one.
    """
    store = open_store(run.store.activations, run.store.s3)
    plan = load_plan(store, run)
    retired = min(retired_below(store), len(plan.units))
    objects = size = 0
    units: set[int] = set()
    bad: dict[str, str] = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for key, entry in MANIFESTS.entries(store):
            objects, size = objects + 1, size + entry.bytes
            unit = int(key["unit"])
            units.add(unit)
            try:
                shards = _shards(store, unit, plan) if unit >= retired else []
            except CorruptObjectError as exc:
                bad[entry.key] = str(exc).removeprefix(f"{exc.url}/{exc.key}: ")
                continue
            objects, size = objects + len(shards), size + sum(shard.bytes for shard in shards)
            faults = pool.map(lambda shard: _fault(store, shard), shards)
            bad |= {s.key: fault for s, fault in zip(shards, faults, strict=True) if fault}
    return Verification(store.url, objects, size, len(plan.units) - len(units), retired, bad)


def ls(run: Run) -> dict[str, Any]:
    """What is there: units, bytes, the runs that read it, the claims of producers.

    Raises:
        PlanMismatchError: The store holds no plan, or another one.
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
                f"last heard of {entry.age_seconds:.0f} s ago"
                + (" (abandoned)" if consumers.is_abandoned(entry) else "")
            )
            for consumer, entry in consumers.all()
        },
        "claims": {
            entry.key: f"renewed {entry.age_seconds:.0f} s ago"
            for _, entry in CLAIMS.entries(store)
        },
    }


def gc(run: Run, *, hours: float, delete: bool) -> dict[str, Any]:
    """Find, and delete if asked, shards that no manifest names.

    Producers that died in the middle of a unit leave them, or that were slower than another. A
    shard gets its manifest after it, so a young one may only be waiting for it.

    Args:
        run: The run.
        hours: Younger shards are left alone.
        delete: Delete what was found.

    Raises:
        PlanMismatchError: The store holds no plan, or another one.
    """
    store = open_store(run.store.activations, run.store.s3)
    load_plan(store, run)
    retired = retired_below(store)
    # listed before the manifests are read: a shard that gets its manifest meanwhile has one then
    old = {
        entry: int(key["unit"])
        for key, entry in SHARDS.entries(store)
        if entry.age_seconds > 3600 * hours
    }
    units = set(existing_units(store))
    named: set[str] = set()
    for unit in sorted(set(old.values()) & units):
        if unit >= retired:
            named |= {shard.key for shard in read_manifest(store, unit).sites.values()}
    orphans = [entry for entry in old if entry.key not in named]
    for entry in orphans if delete else ():
        store.delete(entry.key)
    return {
        "orphans": len(orphans),
        "bytes": sum(entry.bytes for entry in orphans),
        "deleted": delete,
        "keys": {entry.key: float(entry.bytes) for entry in orphans},
    }


def _shards(store: ObjectStore, unit: int, plan: Plan) -> list[SiteShard]:
    manifest: UnitManifest = read_manifest(store, unit)
    if manifest.plan != plan.hash:
        raise CorruptObjectError("belongs to another plan", url=store.url, key=manifest_key(unit))
    return list(manifest.sites.values())


def _fault(store: ObjectStore, shard: SiteShard) -> str | None:
    try:
        data = store.get(shard.key)
    except ObjectNotFoundError:
        return "is missing"
    if len(data) != shard.bytes:
        return f"has {len(data)} bytes where {shard.bytes} were written"
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        return "does not match its checksum"
    for block in shard.blocks:
        piece = data[block.offset : block.offset + block.bytes]
        if xxhash.xxh3_128_hexdigest(piece) != block.xxh3:
            return "does not match its manifest's list of blocks"
    return None
