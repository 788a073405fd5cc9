"""Ranks of large jobs stay below the usual limit on open files."""

from pathlib import Path

import pytest

from dist_sae.distributed.local_ranks import rank_environments
from tests.distributed.connect_worker import FEW_FILES, rank
from tests.forks import processes

pytestmark = pytest.mark.system

WORLD = 8


def test_ranks_connect_only_to_those_with_whom_they_exchange(tmp_path: Path) -> None:
    """A rank connects only to its neighbors.

    Connecting to every other rank in each of 4 groups would take 28 sockets, and 4 that listen.

    A ring has 2 neighbors, and a tree log2(8). The TCP store has one connection for the groups.
    Rank 0 serves the store to all ranks, so only rank 0 raises its limit on open files.
    """
    ranks = []
    for env in rank_environments(WORLD, WORLD):
        ranks.append(processes.Process(target=rank, args=(tmp_path, env), daemon=True))
        ranks[-1].start()
    for process in ranks:
        process.join(120)
        process.kill()
    found = [tuple(map(int, (tmp_path / str(n)).read_text().split())) for n in range(WORLD)]
    groups, listening, of_the_store = 2, 4, 2
    for sockets, _ in found[1:]:
        assert sockets <= groups * (2 + 3) + listening + of_the_store, found
    assert [files for _, files in found] == [1024 + 3 * WORLD] + (WORLD - 1) * [FEW_FILES]
