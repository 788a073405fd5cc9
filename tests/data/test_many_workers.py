"""Many producers on one queue, in simulated time. A PUT or GET takes 30 ms, a LIST 50 ms."""

import pytest

from dist_sae.planning.simulate import Fleet, Simulation, plan_from_units


@pytest.mark.system
def test_a_thousand_producers_get_the_units_they_want_for_four_requests_each() -> None:
    """A queue serves 1,000 producers with four requests per unit, and no unit is begun twice.

    A unit takes 2.2 s, so 1,000 producers want 455 units a second.
    """
    plan = plan_from_units((1,) * 20_000, streams=8, window_units=4)
    simulated = Simulation(plan, Fleet(1000, 2.2), seconds=23.0, counted_from=5.4)
    outcome = simulated.outcome
    assert outcome.producer_busy_share >= 0.95
    assert outcome.requests <= 4 * simulated.busy_seconds / 2.2
    assert set(simulated.begun.values()) == {1}


def test_producers_that_are_held_back_do_not_list_all_the_time() -> None:
    """Producers that wait for a slow run do not flood the store with LIST requests.

    The producers could make 136 units a second, but the run reads only 5.5 units a second and at
    most 100 units may be ahead. The run trains on a unit for a sixth of a second, and after every
    second unit it reports, which takes 30 ms. It has found its first units within 5 s.
    """
    plan = plan_from_units((1,) * 5_000, streams=2, window_units=1)
    fleet = Fleet(300, 2.2, step_seconds=1 / 6, rows=5_000, max_ahead_units=100)
    simulated = Simulation(plan, fleet, seconds=30.0, counted_from=15.0)
    assert len(simulated.begun) >= 0.95 * (100 + 5.5 * 25)
    assert set(simulated.begun.values()) == {1}
    assert simulated.store.requests["list"] <= 300 * simulated.seconds
