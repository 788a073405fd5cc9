"""Many producers on one queue, in simulated time: PUT and GET take 30 ms, LIST 50 ms."""

import pytest

from tests.data.simulated import Clock, Fleet, Store


def test_a_thousand_producers_get_the_units_they_want_for_four_requests_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A unit takes 2.2 s, so 1,000 producers want 455 units a second. No unit is begun twice."""
    fleet = Fleet(monkeypatch, 1000, 20_000, 2.2, seconds=23.0, counted_from=5.4)
    assert fleet.busy_share >= 0.95
    assert fleet.requests <= 4 * fleet.units
    assert set(fleet.begun.values()) == {1}


def test_producers_that_are_held_back_do_not_list_all_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run reads 6 units a second, of the 136 that they could make; 100 units are ahead."""

    def limit(clock: Clock, store: Store) -> int:
        list(store.keys("consumers/"))
        store.size("consumers/a.json")
        return 100 + int(6 * clock.now)

    fleet = Fleet(monkeypatch, 300, 5_000, 2.2, seconds=30.0, counted_from=15.0, limit=limit)
    assert len(fleet.begun) >= 0.95 * (100 + 6 * 30)
    assert set(fleet.begun.values()) == {1}
    assert fleet.store.requests["list"] <= 300 * fleet.seconds
