"""`dist-sae store verify`: check every object of an activation set against its manifest."""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from dist_sae.config import Run
from dist_sae.data.plan import Plan, load_plan, parse
from dist_sae.data.shard import SiteShard, UnitManifest
from dist_sae.errors import CorruptObjectError, ObjectNotFoundError
from dist_sae.storage import ObjectStore, open_store


class Verification(NamedTuple):
    """What `verify` found."""

    url: str
    objects: int
    bytes: int
    bad: dict[str, str]
    """What is wrong with an object, by key."""

    def result(self) -> dict[str, Any]:
        """For programs: `bad` is their number, `bad_objects` says which and why."""
        return {
            "objects": self.objects,
            "bytes": self.bytes,
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
    objects = size = 0
    bad: dict[str, str] = {}
    for key in store.keys("units/"):
        data = store.get(key)
        objects, size = objects + 1, size + len(data)
        try:
            shards = list(_shards(store, key, data, plan))
        except CorruptObjectError as exc:
            bad[key] = str(exc).removeprefix(f"{exc.url}/{exc.key}: ")
            continue
        for shard in shards:
            objects += 1
            try:
                data = store.get(shard.key)
            except ObjectNotFoundError:
                bad[shard.key] = "is missing"
                continue
            size += len(data)
            if fault := _fault(shard, data):
                bad[shard.key] = fault
    return Verification(store.url, objects, size, bad)


def _shards(store: ObjectStore, key: str, data: bytes, plan: Plan) -> Iterator[SiteShard]:
    manifest = parse(UnitManifest, data, store, key)
    if manifest.plan != plan.hash:
        raise CorruptObjectError("belongs to another plan", url=store.url, key=key)
    yield from manifest.sites.values()


def _fault(shard: SiteShard, data: bytes) -> str | None:
    if len(data) != shard.bytes:
        return f"has {len(data)} bytes where {shard.bytes} were written"
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        return "does not match its checksum"
    for block in shard.blocks:
        piece = data[block.offset : block.offset + block.bytes]
        if hashlib.sha256(piece).hexdigest() != block.sha256:
            return "does not match its manifest's list of blocks"
    return None
