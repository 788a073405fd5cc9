"""Documents are dealt by size: units, and above all streams, get equal numbers of rows."""

from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from dist_sae.data.deal import Layout, choose_layout, deal, hold_out
from dist_sae.data.orders import permutation

Rows = NDArray[np.int64]


def one_liners(n: int, seed: int = 0) -> Rows:
    return np.random.default_rng(seed).integers(5, 60, n)


def books_and_one_liners() -> Rows:
    return np.concatenate([one_liners(4000), np.random.default_rng(1).integers(2000, 9000, 40)])


def streams_of(rows: Rows, dealt: list[list[int]], streams: int) -> list[int]:
    return [sum(int(rows[unit].sum()) for unit in dealt[v::streams]) for v in range(streams)]


@pytest.mark.parametrize(
    ("rows", "unit_rows", "most"),
    [
        (np.full(1000, 32), 800, 1.05),
        (one_liners(4000), 2000, 1.03),
        (books_and_one_liners(), 4000, 2.3),  # books of up to 9,000 rows
        (np.random.default_rng(2).lognormal(5, 2, 2000).astype(np.int64) + 1, 30_000, 4.0),
        (np.array([100_000, *one_liners(20_000)]), 10_000, 10.0),  # one of ten units
    ],
    ids=["equal", "one-liners", "books", "lognormal", "giant"],
)
def test_streams_have_equal_rows_and_units_as_equal_as_documents_allow(
    rows: Rows, unit_rows: int, most: float
) -> None:
    """Streams get equal rows, and units nearly so.

    Dealing equal numbers of documents would leave 41 % of a heavy-tailed corpus unused.
    """
    streams, order = 4, permutation(len(rows), 0)
    targets = Layout(streams, 4, unit_rows, unit_rows).targets(int(rows.sum()) // streams)
    dealt = deal(rows, order, targets, streams)
    assert Counter(i for unit in dealt for i in unit) == Counter(range(len(rows)))
    assert all(dealt)
    of_streams = streams_of(rows, dealt, streams)
    assert streams * min(of_streams) >= 0.999 * rows.sum()
    of_units = [int(rows[unit].sum()) for unit in dealt]
    assert max(of_units) <= most * unit_rows


def test_which_documents_meet_is_random() -> None:
    """Two documents of equal length share a unit as often as by chance, wherever they are."""
    rows, targets = np.full(64, 10), np.full(4, 80)
    together = Counter(
        other
        for seed in range(400)
        for unit in deal(rows, permutation(64, seed), targets, 2)
        for other in unit
        if 0 in unit and other
    )
    assert sum(together.values()) == 400 * 7
    assert max(together.values()) < 80 > 2 * min(together.values())  # 44 expected, sd 6.3
    assert min(together.values()) > 20


def test_the_first_units_are_small_and_windows_double() -> None:
    """The first windows have 7 % of 900,000 rows, and the largest units have 4,096 rows."""
    layout = choose_layout(
        np.full(9000, 100),
        streams=None,
        window_units=4,
        unit_rows=None,
        trainers=2,
        batch_rows=2048,
    )
    assert layout == (8, 4, 4096, 2048)
    targets = layout.targets(112_500)
    assert targets[:5].tolist() == [2048] * 4 + [4096]
    assert abs(targets.sum() - 112_500) <= 2048


@pytest.mark.parametrize(
    ("rows", "given", "expected"),
    [
        (np.full(10**5, 10**4), {}, (8, 4, 65_536, 2048)),
        (np.full(10**5, 10**4), {"streams": 64}, (64, 4, 65_536, 512)),
        (np.full(100, 20), {}, (8, 4, 512, 512)),
        (np.full(10**4, 100), {"unit_rows": 16_384, "window_units": 2}, (8, 2, 16_384, 16_384)),
        # each of two books has a third of the rows, so two streams
        (np.array([30_000, 30_000, *one_liners(1000)]), {}, (2, 4, 2048, 2048)),
        (np.full(10**4, 100), {"trainers": 3, "batch_rows": 4080}, (6, 4, 4096, 2048)),
    ],
)
def test_the_layout_follows_the_corpus_where_nothing_is_given(
    rows: Rows, given: dict[str, int], expected: tuple[int, ...]
) -> None:
    settings = {"streams": None, "window_units": 4, "unit_rows": None}
    settings |= {"trainers": 1, "batch_rows": 4096} | given
    assert choose_layout(rows, **settings) == expected  # type: ignore[arg-type]


def test_held_out_is_a_share_of_the_rows_and_no_giant() -> None:
    rows = books_and_one_liners()
    for seed in range(20):
        train, held_out = hold_out(rows, permutation(len(rows), seed), 0.05)
        assert sorted([*train, *held_out]) == list(range(len(rows)))
        assert abs(rows[held_out].sum() / rows.sum() - 0.05) < 0.02
    train, held_out = hold_out(np.array([70, 90, 80]), np.arange(3), 0.05)
    assert held_out.tolist() == [0]  # every document has more rows than the held-out share


def test_no_unit_has_only_documents_that_give_no_rows() -> None:
    """Every unit gets at least one document with rows.

    In the first case a giant document fills its stream, so the stream's other unit would stay
    empty. One in four of the remaining documents has no rows.
    """
    rows = np.array([100, 3, 3, 3, 0])
    dealt = deal(rows, np.arange(5), np.array([10, 10]), streams=2)
    assert sorted(document for unit in dealt for document in unit) == [0, 1, 2, 3, 4]
    assert all(rows[unit].sum() > 0 for unit in dealt)
    train, heldout = hold_out(np.array([50, 0, 60]), np.arange(3), 0.05)
    assert (train.tolist(), heldout.tolist()) == ([1, 2], [0])
