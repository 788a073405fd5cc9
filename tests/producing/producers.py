"""Producers with test doubles for the model."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dist_sae.producing.loop
import dist_sae.producing.planner
from dist_sae.config import Run
from dist_sae.data.shard import SiteRows, read_block, read_manifest
from dist_sae.data.work_queue import Worker
from dist_sae.producing.loop import produce
from dist_sae.producing.planner import plan
from dist_sae.storage import ObjectStore
from dist_sae.telemetry.exporter import Telemetry
from tests.runs import make_run
from tests.world import Letters, RowNumbers

UNITS = 17
SITES = ("resid_pre.0", "mlp_out.3")


class Hooked(RowNumbers):
    """A model that calls a function before each forward pass, with the number of earlier ones."""

    def __init__(self, before: Callable[[int], None]) -> None:
        self._before = before
        self._calls = 0

    def run(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        self._before(self._calls)
        self._calls += 1
        return super().run(tokens, mask)


def start(run: Run, worker: str, stopping: threading.Event | None = None) -> None:
    telemetry = Telemetry("world", "produce", None)
    produce(run, Worker(worker), stopping or threading.Event(), telemetry)


def with_source(monkeypatch: pytest.MonkeyPatch, source: RowNumbers) -> None:
    monkeypatch.setattr(dist_sae.producing.loop, "build_source", lambda *_: source)


def with_store(monkeypatch: pytest.MonkeyPatch, store: ObjectStore) -> None:
    monkeypatch.setattr(dist_sae.producing.loop, "open_store", lambda *_: store)


def rows_of(store: ObjectStore, unit: int, site: str = "synthetic") -> SiteRows:
    shard = read_manifest(store, unit).sites[site]
    blocks = [read_block(store, shard, number) for number in range(len(shard.blocks))]
    return SiteRows(*map(torch.cat, zip(*blocks, strict=True)))


def complete_units(store: ObjectStore) -> list[int]:
    """Return the existing units, and check that each is complete."""
    units = [int(key[6:14]) for key in store.keys("units/")]
    for unit in units:
        assert len(rows_of(store, unit).acts) == read_manifest(store, unit).rows
    return units


class LetterSource(RowNumbers):
    """A model with activations (token, position) at the first site, and minus those at the second.

    At the second site, the activations of "z" are huge.
    """

    def __init__(self, before: Callable[[int], None] = lambda _: None) -> None:
        self._before = before
        self._calls = 0

    def run(self, tokens: Tensor, _: Tensor) -> dict[str, Tensor]:
        self._before(self._calls)
        self._calls += 1
        offsets = torch.arange(tokens.shape[1]).expand(tokens.shape)
        acts = torch.stack([tokens, offsets], dim=-1).float()
        huge = 1 + 1e6 * (tokens == ord("z"))
        return {SITES[0]: acts, SITES[1]: -acts * huge[..., None]}


def letters_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], batch_tokens: int = 20
) -> Run:
    """Plan a run over a jsonl file, with tokenizer `Letters`. Contexts are BOS and 4 letters."""
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run = make_run(
        folder,
        model={"kind": "huggingface", "path": "none", "batch_tokens": batch_tokens},
        corpus={"kind": "files", "files": [str(corpus)]},
        activations={
            "sites": SITES,
            "context_tokens": 5,
            "streams": 2,
            "unit_rows": 40,
            "block_rows": 16,
            "exclude": {"first_positions": 2, "over_norm": 100.0},
        },
        train={"site": SITES[0], "batch_rows": 8, "rows": 8},
    )
    for module in (dist_sae.producing.planner, dist_sae.producing.loop):
        monkeypatch.setattr(module, "build_tokenizer", lambda *_: Letters())
    monkeypatch.setattr(dist_sae.producing.planner, "check_sites", lambda *_: {})
    plan(run)
    return run


TEXTS = ["abcdefgh" + "xyz"[n % 3] * (n % 6) for n in range(60)]


def stored_units(store: ObjectStore) -> list[int]:
    return [int(key[6:14]) for key in store.keys("units/")]
