"""Producers produce each unit once, work in parallel, and report their progress."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import dist_sae.data.work_queue
import dist_sae.logs
import dist_sae.producing.loop
from dist_sae.config import Run
from dist_sae.data.shard import read_manifest
from dist_sae.data.work_queue import Worker
from dist_sae.producing.loop import produce
from dist_sae.storage import ObjectStore, open_store
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.telemetry.metric import STAGES
from tests.producing.producers import (
    UNITS,
    Hooked,
    complete_units,
    rows_of,
    start,
    stored_units,
    with_source,
    with_store,
)
from tests.runs import DOCUMENT_ROWS, make_run
from tests.telemetry.scrape import values
from tests.world import RowNumbers, Wrapped, batches, fill, open_activation_set, same


def test_progress_counts_rows_within_a_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progress counts the rows of finished units and the rows of the current unit.

    The run has 17 units of one batch each.
    """
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(
        dist_sae.logs,
        "progress",
        lambda _role, done, total, **numbers: said.append({"done": done, "of": total} | numbers),
    )
    monkeypatch.setattr(dist_sae.logs.RateLimitedProgress, "take_turn", lambda _: True)
    made = fill(make_run(tmp_path), RowNumbers(), monkeypatch)
    said = [record for record in said if "units" in record]
    assert {record["of"] for record in said} == {sum(made.rows_of_units)} == {128 * 16}
    assert said[0] | {"done": 0, "at_hand": 0, "units": 0, "doing": "loading the model"} == said[0]
    assert any(record["at_hand"] for record in said)
    reached = [record["done"] + record["at_hand"] for record in said]
    assert reached == sorted(reached)
    assert (said[-1]["done"], said[-1]["at_hand"], said[-1]["units"]) == (2048, 0, 17)


def test_every_row_is_stored_once_with_where_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    fill(run, RowNumbers(), monkeypatch)
    store = open_store(run.store.activations)
    assert complete_units(store) == list(range(UNITS))
    seen = []
    for unit in range(UNITS):
        rows = rows_of(store, unit)
        assert rows.acts[:, 0].tolist() == rows.tokens.tolist()
        assert (rows.tokens % DOCUMENT_ROWS).tolist() == rows.positions.tolist()
        assert (rows.tokens // DOCUMENT_ROWS).tolist() == rows.documents.tolist()
        ordered = rows.tokens.tolist()
        assert ordered != sorted(ordered)
        seen += ordered
    assert sorted(seen) == list(range(128 * DOCUMENT_ROWS))


@pytest.mark.system
def test_two_producers_share_the_units(
    run: Run, store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two producers share the units, and each unit is written once.

    Neither begins before both have claimed a unit.
    """
    both = threading.Barrier(2)

    def build(*_: object) -> Hooked:
        return Hooked(lambda calls: (both.wait(60), None)[1] if calls == 0 else None)

    monkeypatch.setattr(dist_sae.producing.loop, "build_source", build)
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(start, run, worker) for worker in ("a", "b")]:
            done.result(timeout=120)
    assert complete_units(store) == list(range(UNITS))
    assert len(list(store.keys("shards/"))) == UNITS
    assert {read_manifest(store, unit).producer for unit in range(UNITS)} == {"a", "b"}
    assert list(store.keys("claims/")) == []

    alone = make_run(tmp_path / "alone")
    fill(alone, RowNumbers(), monkeypatch)
    assert same(
        batches(open_activation_set(run), range(20)), batches(open_activation_set(alone), range(20))
    )


def test_a_finished_set_is_left_alone_and_no_model_is_loaded(
    run: Run, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_source(monkeypatch, RowNumbers())
    start(run, "a")
    before = {key: store.get(key) for key in store.keys("")}
    monkeypatch.delattr(dist_sae.producing.loop, "build_source")
    start(run, "b")
    assert {key: store.get(key) for key in store.keys("")} == before


def test_the_model_is_compared_before_a_unit_is_claimed(
    run: Run, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is compared with the plan before a unit is claimed.

    The comparison reads all weights, which may take longer than a claim's lease. It is skipped if
    all units exist.
    """
    claims: list[list[str]] = []
    monkeypatch.setattr(
        dist_sae.producing.loop,
        "check_model",
        lambda *_: claims.append(list(store.keys("claims/"))),
    )
    with_source(monkeypatch, RowNumbers())
    for name in ("a", "b"):
        start(run, name)
    assert claims == [[]]


def test_claims_live_while_the_model_is_loaded(
    run: Run, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claims are renewed while the model loads, which may take longer than their lease."""
    monkeypatch.setattr(dist_sae.data.work_queue, "LEASE_SECONDS", 0.1)
    renewed = threading.Event()

    class Watched(Wrapped):
        def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
            if key == "claims/00000000.json" and not if_absent:
                renewed.set()
            return super().put(key, data, if_absent=if_absent)

    def build(*_: object) -> RowNumbers:
        assert renewed.wait(60)
        return RowNumbers()

    with_store(monkeypatch, Watched(store))
    monkeypatch.setattr(dist_sae.producing.loop, "build_source", build)
    start(run, "slow")
    assert complete_units(store) == list(range(UNITS))
    assert list(store.keys("claims/")) == []


def test_metrics_count_rows_and_units(letters: tuple[Run, ObjectStore]) -> None:
    run, store = letters
    telemetry = Telemetry("world", "produce", None)
    produce(run, Worker("a"), threading.Event(), telemetry)
    manifests = [read_manifest(store, unit) for unit in stored_units(store)]
    found = values(telemetry.render().decode())
    assert found["dist_sae_produce_units_total",] == len(manifests)
    assert found["dist_sae_produce_ready_units",] == len(manifests)
    assert found["dist_sae_produce_plan_units",] == len(manifests)
    assert found["dist_sae_produce_producers",] == run.processes.producers == 1
    assert found["dist_sae_produce_claimed_units",] == 0
    assert found["dist_sae_produce_rows_total",] == sum(m.rows for m in manifests)
    for reason in ("padding", "special_token", "first_position", "over_norm"):
        counted = found["dist_sae_produce_excluded_rows_total", reason]
        assert counted == sum(m.excluded[reason] for m in manifests)
    tokens = sum(m.rows + sum(m.excluded.values()) - m.excluded["padding"] for m in manifests)
    assert found["dist_sae_produce_tokens_total",] == tokens
    for stage in STAGES:
        assert found["dist_sae_produce_seconds_total", stage] > 0
    shards = sum(site.bytes for m in manifests for site in m.sites.values())
    assert found["dist_sae_store_bytes_total", "out"] > shards
    assert found["dist_sae_store_operation_seconds_count", "put"] >= 2 * len(manifests)
