"""Workers that make an index together."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dist_sae.config import Run
from dist_sae.data.work_queue import Worker
from dist_sae.index.build import index
from dist_sae.telemetry.exporter import Telemetry
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
