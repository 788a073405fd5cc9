"""Ranks agree on whether to go on without meeting before each step."""

import json
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.forks import processes
from tests.training.agree_worker import REASON_AT, rank
from tests.training.trained import STEPS, final, run_file

pytestmark = pytest.mark.system


def last_words(folder: Path, activations: str, why: str) -> tuple[set[str], Mapping[str, int]]:
    """What the two ranks said at their end, and rank 0's exchanges over the control group."""
    path = run_file(folder, activations, processes={"trainers": 2})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for number in range(2):
        env = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks.append(processes.Process(target=rank, args=(path, why, env), daemon=True))
        ranks[-1].start()
    for process in ranks:
        process.join(300)
        process.kill()
    said = [json.loads((folder / f"said-{number}.json").read_text()) for number in range(2)]
    return {words for words, _ in said}, said[0][1]


def test_a_step_needs_no_exchange_to_agree(tmp_path: Path, activations: str) -> None:
    """Ranks meet before the first step, and when they save the last one."""
    words, exchanges = last_words(tmp_path, activations, "nothing")
    assert words == {"ended"}
    assert exchanges.keys() == {"0", str(STEPS)}
    assert final(tmp_path).step == STEPS


@pytest.mark.parametrize("why", ["stop", "data ends"])
def test_all_ranks_stop_at_the_step_at_which_one_must(
    tmp_path: Path, activations: str, why: str
) -> None:
    """It tells the others in the step that it has a batch for: they meet after it, and save."""
    words, exchanges = last_words(tmp_path, activations, why)
    assert words == {f"stopped at step {REASON_AT} of {STEPS}; start again to continue"}
    assert exchanges.keys() == {"0", str(REASON_AT)}
    assert final(tmp_path).step == REASON_AT
