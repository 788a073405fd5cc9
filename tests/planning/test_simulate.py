"""A run in simulated time, slowed by few producers, preemption, lost nodes and a slow store."""

import json
from pathlib import Path

import pytest

from dist_sae.commands.cli import main
from dist_sae.planning.simulate import Fleet, Outcome, Simulation, plan_from_units
from tests.commands.test_cli import fail
from tests.runs import TINY, write_run

PLAN = plan_from_units((1000,) * 64, streams=4, window_units=2)
FLEET = Fleet(4, 100.0, step_seconds=1.0, batch_rows=100, rows=64_000, row_bytes=1000.0)
"""Each producer makes 10 rows/s, so four make 40. The trainers take 100."""


def simulated(**changes: float) -> Outcome:
    return Simulation(PLAN, FLEET._replace(**changes)).outcome  # type: ignore[arg-type]


def test_too_few_producers_hold_the_trainers_up() -> None:
    """64,000 rows take four producers 1,600 s, twelve producers 533 s, and the trainers 640 s.

    Producers draw from the lowest free units, so the first windows may be among the last ones
    ready.
    """
    few, many = simulated(), simulated(producers=12)
    assert few.rows == many.rows == 64_000
    assert 1600 * 0.9 < few.seconds < 1600 * 1.15
    assert 640 < many.seconds < 640 + 1.15 * 533 + 100
    assert few.producer_busy_share > 0.85
    assert few.lost_units == few.preemptions == few.repeated_seconds == 0


def test_preempted_producers_lose_units_and_others_make_them_again() -> None:
    quiet, preempted = simulated(), simulated(producer_hours=0.1)
    assert preempted.preemptions > 5
    assert preempted.lost_units > 0
    assert preempted.seconds > quiet.seconds + 100
    assert preempted.rows == quiet.rows


def test_a_lost_node_repeats_the_steps_since_the_last_checkpoint() -> None:
    """A checkpoint is saved every 50 s of steps, so a loss costs 120 s plus 0 to 50 s."""
    lost = simulated(producers=12, node_hours=0.05, save_every_steps=50)
    assert lost.lost_nodes > 0
    assert 120 <= lost.repeated_seconds / lost.lost_nodes <= 170
    quiet = simulated(producers=12)
    assert lost.seconds >= quiet.seconds + lost.repeated_seconds - 100


def test_a_store_with_a_fifth_of_its_bandwidth_limits_the_run() -> None:
    """Writing 64 MB at 125 kB/s takes 512 s, less than the 1,600 s of producing.

    At a fifth of the bandwidth it takes 2,560 s.
    """
    fast = simulated(write_bytes_per_second=1.25e5)
    slow = simulated(write_bytes_per_second=1.25e5, slowdown=5.0)
    assert fast.seconds < 1600 * 1.15
    assert slow.seconds > 2560


def test_reading_limits_the_run_as_well() -> None:
    slow = simulated(producers=12, read_bytes_per_second=5e4)
    assert slow.seconds > 64e6 / 5e4
    assert slow.waited_seconds > 500


def test_producers_wait_for_the_trainers() -> None:
    """8 producers make 80 rows/s and the trainers take 50, so the limit of 24 units ahead holds the
    producers up.
    """
    held = simulated(producers=8, step_seconds=2.0, max_ahead_units=24)
    assert held.producer_busy_share < 0.75
    assert held.rows == 64_000


@pytest.mark.system
def test_what_may_go_wrong_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path, TINY)
    assert "--simulate: needs the speed" in fail(capsys, "estimate", str(path), "--simulate")
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps({"rows_per_second": 1e3, "bare_rows_per_second": 2e3}))
    options = ["--bench", str(bench), "--accelerator", "h100", "--simulate", "--json"]
    assert main(["estimate", str(path), *options]) == 0
    told = json.loads(capsys.readouterr().out)["simulated"]
    assert len(told) == 6
    planned, twice = told["as planned"], told["2 producers"]
    assert planned["total_seconds"] > twice["total_seconds"]
