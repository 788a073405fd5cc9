"""The history in the run's folder."""

from pathlib import Path

from dist_sae.storage import open_store
from dist_sae.telemetry.history import History, read_history


def test_steps_that_were_repeated_after_a_restart_count_once(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    first = History(store, "run", 0)
    for step in (10, 20, 30):
        first.append({"step": step, "fvu": 1.0})
        first.flush()
    second = History(store, "run", 20)  # the checkpoint was at step 20
    second.append({"step": 30, "fvu": 0.5})
    second.flush()
    records = read_history(store, "run")
    assert [(r["step"], r["fvu"]) for r in records] == [(10, 1.0), (20, 1.0), (30, 0.5)]
