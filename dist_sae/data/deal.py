"""Assignment of documents to units that balances the rows of streams and of their units.

Equal streams matter most, because rows beyond the shortest stream are not trained on.

Documents are grouped by length into size classes (powers of two). Classes of longer documents are
dealt first, and the documents of a class in a seeded random order. Each document goes to the stream
with the fewest rows, and within that stream to the least full unit. So which documents share a unit
is random. Streams differ by less than a short document, unless one document alone is longer than a
stream.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_STREAMS = 8  # default; a long document, the ranks or the batch may require another number
_MOST_UNIT_ROWS = 65_536
_LEAST_UNIT_ROWS = 512
_WINDOWS = 8  # minimum windows per stream, which limits the size of units
_FIRST_ROWS = 65_536  # rows in the first windows of all streams, which training waits for


class Layout(NamedTuple):
    """Streams, windows and unit sizes of an activation set."""

    streams: int
    window_units: int
    unit_rows: int
    """Approximate rows of a unit; of the largest units if the first ones are smaller."""
    first_unit_rows: int
    """Rows of a unit in a stream's first window. They double window by window to `unit_rows`."""

    def targets(self, rows: int) -> NDArray[np.int64]:
        """Return the target rows of each unit of a stream that has `rows` rows."""
        targets = list[int]()
        size = self.first_unit_rows
        while size < self.unit_rows and sum(targets) + self.window_units * size < rows:
            targets += [size] * self.window_units
            size = min(self.unit_rows, 2 * size)
        left = max(1, round((rows - sum(targets)) / size))
        return np.array(targets + [size] * left)


def choose_layout(
    rows: NDArray[np.int64],
    *,
    streams: int | None,
    window_units: int,
    unit_rows: int | None,
    trainers: int,
    batch_rows: int,
) -> Layout:
    """Choose the layout for a corpus; values that are not None are used as they are.

    Args:
        rows: Rows of each document to train on.
        streams: Number of streams. None chooses a multiple of `trainers` that divides `batch_rows`
            and for which the longest document is at most one stream's share.
        window_units: Units of one stream that are mixed.
        unit_rows: Rows of every unit. None makes each window a small share of the corpus.
        trainers: Ranks of the trainer.
        batch_rows: Rows of a global batch.
    """
    total, giving = int(rows.sum()), int(np.count_nonzero(rows))
    if streams is None:
        fitting = [
            v
            for v in range(trainers, max(_STREAMS, trainers) + 1, trainers)
            if batch_rows % v == 0 and v <= giving and int(rows.max(initial=0)) * v <= total
        ]
        streams = max(fitting, default=trainers)
    if unit_rows is not None:
        return Layout(streams, window_units, unit_rows, unit_rows)
    at_once = streams * window_units
    unit_rows = _power_of_two(total / (at_once * _WINDOWS), _LEAST_UNIT_ROWS, _MOST_UNIT_ROWS)
    first = _power_of_two(_FIRST_ROWS / at_once, _LEAST_UNIT_ROWS, unit_rows)
    return Layout(streams, window_units, unit_rows, first)


def hold_out(
    rows: NDArray[np.int64], order: NDArray[np.int64], share: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split documents into training and held-out ones, with about `share` of the rows held out.

    The last documents of `order` are held out, except any that alone exceeds the wanted share. If
    every document does, only the shortest is held out.
    """
    if not share:
        return order, order[:0]
    wanted = share * rows[order].sum()
    lengths = np.where(rows[order] <= wanted, rows[order], 0)[::-1]
    taken = ((lengths > 0) & (np.cumsum(lengths) - lengths / 2 <= wanted))[::-1]
    if not taken.any():
        giving = np.flatnonzero(rows[order])  # a document without rows is useless for evaluation
        shortest = giving[np.argmin(rows[order][giving])] if len(giving) else 0
        taken[shortest] = True
    return order[~taken], order[taken]


def deal(
    rows: NDArray[np.int64], order: NDArray[np.int64], targets: NDArray[np.int64], streams: int
) -> list[list[int]]:
    """Assign documents to units; unit u belongs to stream u mod `streams`.

    Args:
        rows: Rows of every document of the corpus.
        order: Documents to assign, in random order; at least one per unit.
        targets: Target rows of each unit of a stream.
        streams: Number of streams.

    Returns:
        The documents of each unit, in ascending order.
    """
    dealt: list[list[int]] = [[] for _ in range(len(targets) * streams)]
    loads = np.zeros((streams, len(targets)))
    stream_loads = np.zeros(streams)
    size_class = np.frexp(rows[order])[1]
    for document in order[np.argsort(-size_class, kind="stable")]:
        size = int(rows[document])
        v = int(np.argmin(stream_loads))
        j = int(np.argmin((loads[v] + size) / targets))
        loads[v, j] += size
        stream_loads[v] += size
        dealt[j * streams + v].append(int(document))
    _fill_empty(dealt, rows)
    return [sorted(unit) for unit in dealt]  # so that files are read from front to back


def _fill_empty(dealt: list[list[int]], rows: NDArray[np.int64]) -> None:
    """Move a short document to each unit that would otherwise have no rows."""

    def giving(unit: list[int]) -> list[int]:
        return [document for document in unit if rows[document]]

    donors = sorted(dealt, key=lambda unit: len(giving(unit)), reverse=True)
    for empty in (unit for unit in dealt if not giving(unit)):
        donor = next((unit for unit in donors if len(giving(unit)) > 1), None)
        if donor is None:  # fewer documents have rows than there are units
            return
        shortest = giving(donor)[-1]  # dealt last, so of the unit's shortest size class
        donor.remove(shortest)
        empty.append(shortest)


def _power_of_two(wanted: float, least: int, most: int) -> int:
    return int(min(most, max(least, 2 ** round(np.log2(max(1.0, wanted))))))
