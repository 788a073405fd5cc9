"""Workers that make an index together."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dist_sae.config import Run
from dist_sae.data.work_queue import Worker
from dist_sae.index.build import index
from dist_sae.storage import open_store
from dist_sae.telemetry.exporter import Telemetry
from tests.conftest import Bucket
from tests.index.indexed import add_checkpoint, files, make_index, produced
from tests.telemetry.scrape import series

WAIT_SECONDS = 60.0


def named(run: Run, name: str) -> Run:
    return run.model_copy(update={"index": run.index.model_copy(update={"name": name})})


def test_two_workers_make_what_one_makes_and_neither_waits_for_ever(tmp_path: Path) -> None:
    """Each encodes the next unit while it still writes the last one, which the other waits for."""
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
        for items in ("units", "buckets"):  # of which another may have been faster to take all
            assert page.get(f"dist_sae_index_claimed_{items}", 0) == 0
    assert sum(page["dist_sae_index_rows_total"] for page in seen) == alone["rows"]
    for stage in ("entries", "merged_entries"):
        assert sum(page[f"dist_sae_index_{stage}_total"] for page in seen) == alone["entries"]


@pytest.mark.system
@pytest.mark.parametrize("name", ["seaweedfs", "rclone"])
def test_stores_of_all_kinds_hold_the_same_index(
    tmp_path: Path, make_bucket: Callable[[str], Bucket], name: str
) -> None:
    """rclone ignores conditions on writes: workers share the items out by their numbers."""
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
