"""Reports of a run that waits for data, and whose time the wait counts as."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from dist_sae.data.consumers import Consumers
from dist_sae.distributed.local_ranks import rank_environments
from dist_sae.storage import open_store
from tests.forks import HANG_SECONDS, Program
from tests.launch import start
from tests.training.trained import history, run_file


def await_wait(rank: Program, *, step: int) -> float:
    """Return the seconds that a rank reports to have waited, at `step` or later."""
    for line in rank.stdout:
        record = json.loads(line)
        if record["done"] >= step and record.get("waiting_seconds"):
            return float(record["waiting_seconds"])
    raise AssertionError("it did not wait")


@pytest.mark.system
def test_a_run_that_waits_for_longer_than_the_expiry_is_not_abandoned(
    tmp_path: Path, activations: str
) -> None:
    shutil.copytree(activations, tmp_path / "activations")
    (tmp_path / "activations/units/00000000.json").unlink()
    path = run_file(tmp_path, str(tmp_path / "activations"))
    expiry_hours = 6 / 3600
    expiry = ("--set", f"store.consumer_expiry_hours={expiry_hours}")
    trainer = start("train", str(path), *expiry)
    while await_wait(trainer, step=0) < 8:
        pass
    consumers = Consumers(open_store(str(tmp_path / "activations")), expiry_hours)
    assert [consumer.run for consumer in consumers.alive()] == ["world"]
    trainer.send_signal(signal.SIGTERM)
    said = trainer.communicate(timeout=HANG_SECONDS)
    assert trainer.returncode == 75, said


@pytest.mark.system
def test_while_one_rank_waits_for_its_data_all_ranks_wait_for_data(
    tmp_path: Path, activations: str
) -> None:
    """Unit 0 is missing at first.

    Then a unit of the second rank is missing, which also holds up the first rank.

    The ranks report the plan's number of steps.
    """
    units = Path(shutil.copytree(activations, tmp_path / "activations")) / "units"
    hidden = {unit: (units / f"{unit:08d}.json") for unit in (0, 15)}
    for unit, manifest in hidden.items():
        manifest.rename(tmp_path / str(unit))
    path = run_file(tmp_path, str(tmp_path / "activations"), train={"rows": "all", "max_passes": 1})
    first, second = (
        start("train", str(path), "--set", "processes.trainers=2", env=env)
        for env in rank_environments(2, 2)
    )
    begun = await_wait(first, step=0)
    (tmp_path / "0").rename(hidden[0])
    later = await_wait(second, step=1)
    (tmp_path / "15").rename(hidden[15])
    said = [process.communicate(timeout=HANG_SECONDS) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], said
    assert "are producers running?" not in said[0][1] + said[1][1]
    records = history(tmp_path)
    assert records[0]["phases"]["wait"] >= begun
    assert records[0]["phases"]["begin"] > 0
    held_up = max(records[1:], key=lambda record: float(record["phases"]["wait"]))
    # both phases are means over the ranks. If the first rank's wait counted as time in collectives,
    # the two would be about equal
    assert held_up["phases"]["wait"] > max(0.9 * later, 2 * held_up["phases"]["ranks"])
    for record in (records[0], held_up):  # the rate excludes the time of the stall
        stood = sum(record["phases"][phase] for phase in ("wait", "begin", "save"))
        rate = record["rows_per_second"] * record["seconds"] / (record["seconds"] - stood)
        assert record["worked_rows_per_second"] == pytest.approx(rate)
