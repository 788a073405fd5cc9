"""`dist-sae store verify|ls|urls|gc`: the activation set, against its plan and manifests."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import xxhash

from dist_sae.config import Run
from dist_sae.data.consumers import Consumers, kept_units, retired_below
from dist_sae.data.corpus import Corpus
from dist_sae.data.origin import UnitText
from dist_sae.data.plan import Plan, as_planned, load_plan, read_unit
from dist_sae.data.shard import (
    MANIFESTS,
    SHARDS,
    SiteShard,
    UnitManifest,
    decode_block,
    existing_units,
    manifest_key,
    read_manifest,
)
from dist_sae.data.work_queue import CLAIMS
from dist_sae.errors import (
    ConfigError,
    CorruptObjectError,
    DataExhaustedError,
    ObjectNotFoundError,
)
from dist_sae.models import build_tokenizer
from dist_sae.storage import ObjectStore, open_store

logger = logging.getLogger(__name__)

_AT_ONCE = 4  # shards in memory
_READERS = 16  # of manifests


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
    text_rows: int | None = None
    """Rows that were compared with the text; None if it was not asked for."""

    def result(self) -> dict[str, Any]:
        """For programs: `bad` is their number, `bad_objects` says which and why."""
        text = {} if self.text_rows is None else {"rows_compared_with_text": self.text_rows}
        return {
            "objects": self.objects,
            "bytes": self.bytes,
            "missing_units": self.missing_units,
            "retired_units": self.retired_units,
            **text,
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


def verify(run: Run, *, text: bool = False) -> Verification:
    """Read the whole activation set once.

    Args:
        run: The run.
        text: Read the corpus, too: every row must have the token of its document and position.

    Raises:
        PlanMismatchError: The store holds no plan, or another one.
        CorpusError: The text is not what was planned.
    """
    store = open_store(run.store.activations, run.store.s3)
    plan = load_plan(store, run)
    read_text = _text_reader(run, plan) if text else None
    retired = min(retired_below(store), len(plan.units))
    objects = size = rows = 0
    units: set[int] = set()
    bad: dict[str, str] = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for key, entry in MANIFESTS.entries(store):
            objects, size = objects + 1, size + entry.bytes
            unit = int(key["unit"])
            units.add(unit)
            if unit < retired:
                continue
            try:
                manifest = _manifest(store, unit, plan)
            except CorruptObjectError as exc:
                bad[entry.key] = str(exc).removeprefix(f"{exc.url}/{exc.key}: ")
                continue
            unit_text = read_text(unit) if read_text else None
            if unit_text and (fault := unit_text.manifest_fault(manifest)):
                bad[entry.key] = fault
            shards = list(manifest.sites.values())
            objects, size = objects + len(shards), size + sum(shard.bytes for shard in shards)
            rows += manifest.rows
            faults = pool.map(partial(_fault, store, unit_text), shards)
            bad |= {s.key: fault for s, fault in zip(shards, faults, strict=True) if fault}
    missing = len(plan.units) - len(units)
    return Verification(store.url, objects, size, missing, retired, bad, rows if text else None)


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


def urls(run: Run, site: str, *, heldout: bool) -> list[str]:
    """Shards of one site in the order of the plan: paths, or s3:// URLs.

    A pattern of their names would match those of the other part, and what dead producers left.

    Args:
        run: The run.
        site: The site.
        heldout: The held-out units' instead of those to train on.

    Raises:
        ConfigError: The activation set has no such site.
        DataExhaustedError: There are no such units.
        PlanMismatchError: The store holds no plan, or another one.
    """
    store = open_store(run.store.activations, run.store.s3)
    plan = load_plan(store, run)
    wanted = plan.heldout_units if heldout else kept_units(store, plan)
    units = sorted(set(existing_units(store)) & set(wanted))
    if not units:
        what = "held-out" if heldout else "training"
        raise DataExhaustedError(f"{store.url}: no {what} units are there; run `dist-sae produce`")
    with ThreadPoolExecutor(_READERS) as pool:
        manifests = list(pool.map(lambda unit: read_manifest(store, unit), units))
    if site not in manifests[0].sites:
        there = ", ".join(manifests[0].sites)
        raise ConfigError(f"--site {site}: {store.url} has {there}")
    logger.info("%d of %d units, %d rows", len(units), len(wanted), sum(m.rows for m in manifests))
    return [f"{store.url}/{manifest.sites[site].key}" for manifest in manifests]


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
        if entry.age_seconds >= 3600 * hours
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


def _text_reader(run: Run, plan: Plan) -> Callable[[int], UnitText]:
    """Reads the text of a unit."""
    run = as_planned(run, plan)
    tokenizer = build_tokenizer(run)
    corpus = Corpus(run.corpus, run.store.s3)

    def read(unit: int) -> UnitText:
        return UnitText(
            read_unit(corpus, plan, unit),
            tokenizer,
            context_tokens=run.activations.context_tokens,
            bos=tokenizer.bos if run.activations.prepend_bos else None,
        )

    return read


def _manifest(store: ObjectStore, unit: int, plan: Plan) -> UnitManifest:
    manifest: UnitManifest = read_manifest(store, unit)
    if manifest.plan != plan.hash:
        raise CorruptObjectError("belongs to another plan", url=store.url, key=manifest_key(unit))
    return manifest


def _fault(store: ObjectStore, text: UnitText | None, shard: SiteShard) -> str | None:
    try:
        data = store.get(shard.key)
    except ObjectNotFoundError:
        return "is missing"
    if len(data) != shard.bytes:
        return f"has {len(data)} bytes where {shard.bytes} were written"
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        return "does not match its checksum"
    blocks = [data[block.offset : block.offset + block.bytes] for block in shard.blocks]
    for piece, block in zip(blocks, shard.blocks, strict=True):
        if xxhash.xxh3_128_hexdigest(piece) != block.xxh3:
            return "does not match its manifest's list of blocks"
    return text.rows_fault(map(decode_block, blocks)) if text else None
