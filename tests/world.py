"""Small activation sets whose rows identify themselves."""

import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import pytest
import torch
from torch import Tensor

import dist_sae.producing.loop
from dist_sae.checkpoint.layout import Checkpoints, Piece
from dist_sae.config import Run
from dist_sae.config.data import SYNTHETIC_SITE
from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.loader import Loader
from dist_sae.data.plan import Plan, load_plan
from dist_sae.data.shard import SiteRows, UnitManifest, manifest_key, write_shard
from dist_sae.data.streams import Stream, StreamCursor
from dist_sae.data.work_queue import Worker
from dist_sae.models import ActivationSource
from dist_sae.producing.planner import plan
from dist_sae.storage import Entry, ObjectStore, open_store
from dist_sae.storage.records import seal
from dist_sae.telemetry.exporter import Telemetry
from tests.runs import DOCUMENT_ROWS


class RowNumbers:
    """A model whose activations are (row number, document)."""

    def run(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        acts = torch.stack([tokens, tokens // DOCUMENT_ROWS], dim=-1).float()
        return {SYNTHETIC_SITE: acts.masked_fill(~mask[..., None], torch.nan)}


def fill(
    run: Run,
    source: ActivationSource,
    monkeypatch: pytest.MonkeyPatch,
    *,
    worker: str = "p0",
    stopping: threading.Event | None = None,
) -> Plan:
    """Plan, then run the real producer with a test double for the model."""
    made = plan(run)
    monkeypatch.setattr(dist_sae.producing.loop, "build_source", lambda *_: source)
    dist_sae.producing.loop.produce(
        run, Worker(worker), stopping or threading.Event(), Telemetry("world", "produce", None)
    )
    return made


def write_unit(
    store: ObjectStore, made: Plan, unit: int, acts: Mapping[str, Tensor], block_rows: int = 8
) -> None:
    """Write a unit as producers do, with these activations of its sites, [rows, d_site]."""
    shards = {}
    for site, of_site in acts.items():
        n = len(of_site)
        origin = [torch.arange(n, dtype=dtype) for dtype in (torch.int32, torch.int32, torch.int64)]
        rows = SiteRows(of_site, *origin)
        shards[site] = write_shard(store, unit, site, rows, block_rows, "fp32")
    n = len(next(iter(acts.values())))
    manifest = UnitManifest(
        plan=made.hash,
        unit=unit,
        producer="",
        documents=n,
        rows=n,
        excluded={},
        seconds={},
        sites=shards,
    )
    store.put(manifest_key(unit), seal(manifest))


def open_activation_set(
    run: Run, stopping: threading.Event | None = None, store: ObjectStore | None = None
) -> ActivationSet:
    store = store or open_store(run.store.activations)
    return ActivationSet(store, load_plan(store, run), run.sites, stopping or threading.Event())


def open_loader(
    activation_set: ActivationSet,
    steps: range,
    *,
    world: int = 1,
    rank: int = 0,
    rows: int = 64,
    passes: int = 1,
    cursors: Mapping[int, StreamCursor] | None = None,
) -> Loader:
    return Loader(
        activation_set,
        rank=rank,
        world=world,
        batch_rows=rows,
        steps=steps,
        max_passes=passes,
        cursors=cursors,
    )


def open_stream(
    activation_set: ActivationSet, number: int, pool: Executor, passes: int = 1
) -> Stream:
    return Stream(activation_set, number, 0, passes, pool, pool)


def take(stream: Stream, n: int) -> Tensor:
    """Take the next `n` rows of a stream."""
    acts = {site: torch.empty(n, width) for site, width in stream.widths().items()}
    stream.put(acts)
    return only(acts)


def batches(activation_set: ActivationSet, steps: range, **options: Any) -> list[Tensor]:
    """Read the activations of the batches of these steps."""
    with open_loader(activation_set, steps, **options) as loader:
        return [only(batch.acts) for batch in loader]


def joined(blocks: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Join the activations of a reader's only site."""
    return torch.cat([only(block) for block in blocks])


def only(acts: Mapping[str, Tensor]) -> Tensor:
    """Return the activations of the only site."""
    (of_site,) = acts.values()
    return of_site


def save(
    checkpoints: Checkpoints, step: int, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]
) -> None:
    """Write a checkpoint of whole tensors, as a single rank would."""
    pieces = (Piece(name, t, 0, len(t) if t.shape else 1) for name, t in tensors.items())
    checkpoints.commit(step, [checkpoints.write(step, pieces)], scalars)


def changed(data: bytes, **change: Any) -> bytes:
    """Change fields of a record, and seal it again."""
    content = json.loads(data) | change
    del content["sha256"]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return json.dumps(content | {"sha256": hashlib.sha256(text.encode()).hexdigest()}).encode()


class Wrapped:
    """A store that forwards every call. Tests override the methods that they watch or break."""

    def __init__(self, store: ObjectStore) -> None:
        self.inner = store

    @property
    def url(self) -> str:
        return self.inner.url

    def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        return self.inner.get(key, start, stop)

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        return self.inner.put(key, data, if_absent=if_absent)

    def put_stream(self, key: str, content: Callable[[], Iterable[bytes]]) -> None:
        self.inner.put_stream(key, content)

    def size(self, key: str) -> int | None:
        return self.inner.size(key)

    @property
    def exclusive(self) -> bool:
        return self.inner.exclusive

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        return self.inner.entries(prefix)

    def keys(self, prefix: str = "") -> Iterator[str]:
        return self.inner.keys(prefix)

    def folders(self, prefix: str) -> list[str]:
        return self.inner.folders(prefix)

    def delete(self, key: str) -> None:
        self.inner.delete(key)

    def delete_many(self, keys: Sequence[str]) -> None:
        self.inner.delete_many(keys)


class Letters:
    """Tokenizer whose tokens are the code points of letters. "!" has no token."""

    bos: int | None = 1
    special = frozenset({1, 2})

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(letter) for letter in text if letter != "!"] for text in texts]

    def text(self, tokens: Sequence[int]) -> list[str]:
        return [chr(token) for token in tokens]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Return whether tensors are equal bit by bit."""
    return all(itertools.starmap(torch.equal, zip(one, other, strict=True)))
