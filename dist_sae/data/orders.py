"""Random orders of the data, each a pure function of its seed.

They use raw Philox bits and a stable sort. Unlike `Generator.permutation`, these give the same
results in all NumPy versions, so a run that is resumed next year sees the order it started with.
"""

import numpy as np
from numpy.typing import NDArray


def permutation(n: int, *key: int) -> NDArray[np.int64]:
    """Return a random order of `range(n)`, determined by `key`."""
    return np.argsort(_bits(n, key), kind="stable")


def spread(groups: NDArray[np.int64], *key: int) -> NDArray[np.int64]:
    """Return a random order of rows in which each group's rows are evenly spaced.

    Row j (in random order) of a group of n gets the position (j + u) / n between 0 and 1, with u
    uniform per group. So the position of every row is uniform, and two rows of one document are at
    least about len(groups) / n rows apart. They share a batch less often than after a uniform
    shuffle of the same rows.

    Args:
        groups: Group (document) of each row, as any integers.
        key: Seed of the order.
    """
    shuffled = permutation(len(groups), *key, 0)
    by_group = shuffled[np.argsort(groups[shuffled], kind="stable")]
    _, starts, counts = np.unique(groups[by_group], return_index=True, return_counts=True)
    rank = np.arange(len(groups)) - np.repeat(starts, counts)
    offsets = np.repeat(_bits(len(counts), (*key, 1)) / 2.0**64, counts)
    return by_group[np.argsort((rank + offsets) / np.repeat(counts, counts), kind="stable")]


def _bits(n: int, key: tuple[int, ...]) -> NDArray[np.uint64]:
    # the length is included because SeedSequence ignores trailing zeros: (1, 2) equals (1, 2, 0)
    return np.random.Philox(np.random.SeedSequence((len(key), *key))).random_raw(n)
