"""Verification of an activation set: objects against their manifests, rows against the text."""

import hashlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import xxhash

from dist_sae.config import Run
from dist_sae.data.consumers import retired_below
from dist_sae.data.origin import UnitText
from dist_sae.data.plan import Plan, load_plan, pin_to_plan
from dist_sae.data.planned_text import PlannedText
from dist_sae.data.shard import (
    MANIFESTS,
    SiteShard,
    UnitManifest,
    decode_block,
    manifest_key,
    read_manifest,
)
from dist_sae.errors import CorruptObjectError, ObjectNotFoundError
from dist_sae.models import build_tokenizer
from dist_sae.storage import ObjectStore, open_store

logger = logging.getLogger(__name__)

_AT_ONCE = 4  # shards in memory


def verify(run: Run, *, text: bool = False) -> dict[str, Any]:
    """Read the whole activation set once and check it.

    Args:
        text: Whether to compare every row's token with the corpus, by its document and position.

    Returns:
        The numbers of `objects` and `bytes` checked, including bad objects; `missing_units`, which
        are not produced yet or lost; `retired_units`, whose shards were deleted after all runs had
        read them, and whose manifests are not checked; with `text`, `rows_compared_with_text`;
        `bad`, the number of bad objects; and `bad_objects`, their faults by key.

    Raises:
        PlanMismatchError: The store has no plan, or a plan that does not fit the run.
        CorpusError: The text has changed since the plan was made.
    """
    store = open_store(run.store.activations, run.store.s3)
    plan = load_plan(store, run)
    read_text = _text_reader(run, plan, store) if text else None
    retired = min(retired_below(store), len(plan.units))
    objects = size = rows = 0
    units: set[int] = set()
    bad: dict[str, str] = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for key, entry in MANIFESTS.entries(store):
            unit = int(key["number"])
            units.add(unit)
            if unit < retired:
                continue
            objects, size = objects + 1, size + entry.bytes
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
    return {
        "objects": objects,
        "bytes": size,
        "missing_units": len(plan.units) - len(units),
        "retired_units": retired,
        **({"rows_compared_with_text": rows} if text else {}),
        "bad": len(bad),
        "bad_objects": bad,
    }


def _text_reader(run: Run, plan: Plan, store: ObjectStore) -> Callable[[int], UnitText]:
    """Return a function that reads and tokenizes the text of a unit."""
    run = pin_to_plan(run, plan)
    tokenizer = build_tokenizer(run)
    text = PlannedText(run, plan, store)

    def read(unit: int) -> UnitText:
        return UnitText(
            text.read(unit),
            tokenizer,
            context_tokens=run.activations.context_tokens,
            bos=tokenizer.bos if run.activations.prepend_bos else None,
        )

    return read


def _manifest(store: ObjectStore, unit: int, plan: Plan) -> UnitManifest:
    manifest: UnitManifest = read_manifest(store, unit)
    if manifest.plan != plan.hash:
        raise CorruptObjectError(
            "was produced under a different plan", url=store.url, key=manifest_key(unit)
        )
    return manifest


def _fault(store: ObjectStore, text: UnitText | None, shard: SiteShard) -> str | None:
    try:
        data = store.get(shard.key)
    except ObjectNotFoundError:
        return "is missing"
    if len(data) != shard.bytes:
        return f"has {len(data)} bytes, but {shard.bytes} were written"
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        return "does not match its checksum"
    blocks = [data[block.offset : block.offset + block.bytes] for block in shard.blocks]
    for piece, block in zip(blocks, shard.blocks, strict=True):
        if xxhash.xxh3_128_hexdigest(piece) != block.xxh3:
            return "does not match its manifest's list of blocks"
    return text.rows_fault(map(decode_block, blocks)) if text else None
