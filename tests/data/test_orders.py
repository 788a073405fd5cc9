import itertools

import numpy as np

from dist_sae.data.orders import permutation, spread


def test_permutation_is_the_same_in_every_version_of_numpy() -> None:
    """Golden values from numpy 2.4.6 (Philox, SeedSequence).

    If they changed, old runs could not be resumed.
    """
    assert permutation(10, 0).tolist() == [2, 0, 1, 4, 5, 6, 7, 8, 3, 9]
    assert permutation(10, 7, 1, 3, 2).tolist() == [3, 5, 2, 9, 0, 6, 7, 4, 8, 1]
    assert permutation(100_000, 5).tolist()[:6] == [38474, 94994, 61117, 47518, 83641, 74508]
    assert spread(np.array([3, 3, 3, 9, 9, 5]), 1, 4).tolist() == [4, 5, 0, 2, 3, 1]


def test_permutation_holds_every_number_once() -> None:
    assert sorted(permutation(1000, 3)) == list(range(1000))
    assert permutation(0, 3).tolist() == []


def test_permutation_differs_for_every_key() -> None:
    """Trailing zeros of a key count too: pass 0 must not equal "no pass"."""
    keys = [(0,), (0, 0), (0, 0, 0), (1,), (1, 0), (0, 1), (2**32,), (2**32 + 1,)]
    orders = {tuple(permutation(30, *key)) for key in keys}
    assert len(orders) == len(keys)


def test_spread_spaces_the_rows_of_a_document_evenly() -> None:
    """With 32 documents of 16 rows, successive rows of a document are exactly 32 places apart.

    Exactly one row of each other document is in between.
    """
    groups = np.repeat(np.arange(32), 16)
    ordered = groups[spread(groups, 11)]
    for document in range(32):
        assert set(np.diff(np.flatnonzero(ordered == document))) == {32}


def test_spread_spaces_documents_of_mixed_lengths() -> None:
    """Between two rows of a document of n rows are at least floor(m / n) rows of one of m rows."""
    sizes = np.array([1, 5, 40, 200, 3, 77, 120, 64])
    groups = np.repeat(np.arange(8), sizes)
    order = spread(groups, 12)
    assert sorted(order) == list(range(len(groups)))
    ordered = groups[order]
    for document in range(8):
        places = np.flatnonzero(ordered == document)
        least = sum(sizes // sizes[document])
        assert all(np.diff(places) >= least)


def test_spread_puts_every_row_at_every_place() -> None:
    """Every row is equally likely at every place.

    In 4000 orders of 6 documents x 4 rows, each row is 167 times at each place, sd 12.6.
    """
    groups = np.repeat(np.arange(6), 4)
    times = np.zeros((24, 24))
    for key in range(4000):
        times[spread(groups, key), np.arange(24)] += 1
    assert abs(times - 4000 / 24).max() < 5 * 12.6


def test_spread_is_uniform_along_the_way_for_unequal_documents() -> None:
    """The mean place of every row is (n - 1) / 2 = 17.5, sd 10.4 / sqrt(4000) = .16."""
    groups = np.repeat(np.arange(3), (2, 9, 25))
    mean = np.mean([np.argsort(spread(groups, key)) for key in range(4000)], axis=0)
    assert abs(mean - 17.5).max() < 5 * 0.17


def test_spread_keeps_no_order_within_a_document() -> None:
    """All 3! orders of a document's rows occur, and either document can come first."""
    groups = np.repeat(np.arange(2), 3)
    orders = {tuple(row for row in spread(groups, key) if row < 3) for key in range(60)}
    assert orders == set(itertools.permutations(range(3)))
    first = {int(groups[spread(groups, key)[0]]) for key in range(20)}
    assert first == {0, 1}
