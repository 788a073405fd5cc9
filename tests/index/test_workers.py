"""Workers that build an index together."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import dist_sae.index.merge
from dist_sae.config import Run
from dist_sae.data.work_queue import Worker
from dist_sae.dictionaries.normaliser import Normaliser, SiteNormalisers
from dist_sae.errors import Stopped
from dist_sae.index.build import index
from dist_sae.index.encode import Encoded, Encoder
from dist_sae.storage import open_store
from dist_sae.storage.local import LocalStore
from dist_sae.telemetry import liveness
from dist_sae.telemetry.exporter import Telemetry
from tests.conftest import Bucket
from tests.index.indexed import SCALE, add_checkpoint, files, make_index, produced
from tests.telemetry.scrape import series
from tests.world import open_activation_set

WAIT_SECONDS = 60.0


def named(run: Run, name: str) -> Run:
    return run.model_copy(update={"index": run.index.model_copy(update={"name": name})})


@pytest.mark.system
def test_two_workers_make_what_one_makes_and_neither_waits_for_ever(tmp_path: Path) -> None:
    """Two workers build the same index as one, and do not deadlock.

    Each worker encodes its next unit while it still writes its last one, for which the other waits.
    """
    run = produced(tmp_path)
    add_checkpoint(run)
    alone = make_index(named(run, "alone"))
    pages = [Telemetry(run.name, "index", None, rank) for rank in range(2)]

    def work(number: int) -> dict[str, Any]:
        worker = Worker(f"w{number}", number, 2)
        return index(named(run, "two"), worker, stopping, pages[number])

    stopping = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        try:
            results = [pool.submit(work, number) for number in range(2)]
            found = [result.result(WAIT_SECONDS) for result in results]
        finally:
            stopping.set()
    assert found[0] == found[1] == alone | {"index": found[0]["index"]}
    assert files(found[0]["index"]) == files(alone["index"])
    seen = [
        {name: value for (name, _), value in series(page.render().decode()).items()}
        for page in pages
    ]
    for page in seen:
        assert page["dist_sae_index_units"] == page["dist_sae_index_plan_units"] == alone["units"]
        assert page["dist_sae_index_buckets"] == page["dist_sae_index_plan_buckets"]
        # no claims left, or no series for a worker that got no item
        for items in ("units", "buckets"):
            assert page.get(f"dist_sae_index_claimed_{items}", 0) == 0
    assert sum(page["dist_sae_index_rows_total"] for page in seen) == alone["rows"]
    for stage in ("entries", "merged_entries"):
        assert sum(page[f"dist_sae_index_{stage}_total"] for page in seen) == alone["entries"]


def test_the_next_unit_is_read_while_the_last_block_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next unit is read while the last block is encoded, and gets the same codes.

    So the worker does not wait between units.
    """
    run = produced(tmp_path)
    sae, activations = add_checkpoint(run), open_activation_set(run)
    shards = [activations.shards(activations.manifest(unit))["synthetic"] for unit in (0, 1)]
    assert len(shards[0].blocks) > 3
    get, is_read, blocks = LocalStore.get, threading.Event(), 0

    def watched(self: LocalStore, key: str, start: int = 0, stop: int | None = None) -> bytes:
        if key == shards[1].key:
            is_read.set()
        return get(self, key, start, stop)

    def alive() -> None:
        nonlocal blocks
        blocks += 1
        assert not is_read.is_set() or blocks == len(shards[0].blocks)

    normaliser = Normaliser(SCALE, torch.full((16,), 0.25).double(), 1.0, 1)
    normalisers = SiteNormalisers(run.reads, run.writes, {run.site: normaliser})
    with monkeypatch.context() as patch, Encoder(sae, activations, normalisers) as encoder:
        patch.setattr(LocalStore, "get", watched)
        encoder.encode(0, alive, claim_next=lambda: 1)
        assert is_read.wait(WAIT_SECONDS)
        found = encoder.encode(1)
    with Encoder(sae, activations, normalisers) as encoder:
        assert same(found, encoder.encode(1))


def same(one: Encoded, other: Encoded) -> bool:
    def arrays(encoded: Encoded) -> list[Any]:
        return [*encoded.origin, encoded.latents, encoded.rows, encoded.acts]

    pairs = zip(arrays(one), arrays(other), strict=True)
    return one.sums == other.sums and all(np.array_equal(*pair) for pair in pairs)


@pytest.mark.system
def test_a_worker_that_stops_leaves_the_unit_that_it_has_claimed_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = produced(tmp_path)
    add_checkpoint(run)
    put, stopping, claims = LocalStore.put, threading.Event(), list[str]()

    def claimed(self: LocalStore, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        if "/claims/units/" in key:
            claims.append(key)
            if len(claims) == 2:
                stopping.set()
        return put(self, key, data, if_absent=if_absent)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "put", claimed)
        with pytest.raises(Stopped):
            index(run, Worker("w"), stopping, Telemetry(run.name, "index", None))
    made = Path(run.store.runs, run.name, "index/step-00000003")
    assert [path.name for path in made.glob("units/*.json")] == ["00000000.json"]
    assert claims[1].endswith("00000001.json")
    assert not list(made.rglob("claims/*/*.json"))
    expected = make_index(named(run, "calm"))
    assert files(make_index(run)["index"]) == files(expected["index"])


def test_a_bucket_that_takes_longer_than_a_hang_keeps_its_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket that takes longer than the hang timeout keeps its claim.

    Claims are renewed as long as the liveness probe passes, and each piece of work counts as a
    heartbeat.
    """
    run = produced(tmp_path)
    add_checkpoint(run)
    monkeypatch.setattr(dist_sae.index.merge, "MOST_ENTRIES", 700)
    now, faults = 1000.0, list[str | None]()
    monkeypatch.setattr(liveness, "time", SimpleNamespace(monotonic=lambda: now))
    telemetry = Telemetry(run.name, "index", None)
    put = LocalStore.put

    def slow(self: LocalStore, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        nonlocal now
        if "/postings/" in key:
            now += 0.7 * run.timeouts.hung_seconds
            faults.append(telemetry.liveness.probe_failure("/livez"))
        return put(self, key, data, if_absent=if_absent)

    monkeypatch.setattr(LocalStore, "put", slow)
    index(run, Worker("w"), threading.Event(), telemetry)
    assert len(faults) > 3
    assert not any(faults)


@pytest.mark.system
@pytest.mark.parametrize("name", ["seaweedfs", "rclone"])
def test_stores_of_all_kinds_hold_the_same_index(
    tmp_path: Path, make_bucket: Callable[[str], Bucket], name: str
) -> None:
    """The index is the same on all stores.

    rclone ignores conditions on writes, so there the workers divide the items by their numbers.
    """
    local = produced(tmp_path)
    add_checkpoint(local)
    expected = make_index(local)
    bucket = make_bucket(name)
    s3 = {"endpoint_url": bucket.endpoint_url}
    store = {**local.store.model_dump(mode="json"), "runs": f"s3://{bucket.name}/runs", "s3": s3}
    run = Run.model_validate({**local.model_dump(mode="json"), "store": store})
    add_checkpoint(run)
    runs = open_store(run.store.runs, run.store.s3)

    def work(number: int) -> dict[str, Any]:
        worker = Worker(f"w{number}", number, 2)
        telemetry = Telemetry(run.name, "index", None)
        return index(run, worker, threading.Event(), telemetry)

    with ThreadPoolExecutor(2) as pool:
        found = [result.result(WAIT_SECONDS) for result in [pool.submit(work, n) for n in (0, 1)]]
    same = {key: value for key, value in expected.items() if key != "index"}
    assert [{**result, **same} == result for result in found] == [True, True]
    prefix = f"{run.name}/index/step-00000003/"
    tables = {key.removeprefix(prefix) for key in runs.keys(prefix) if key.endswith(".parquet")}
    assert {key: runs.get(prefix + key) for key in tables} == files(expected["index"])
