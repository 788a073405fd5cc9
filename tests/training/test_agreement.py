"""Ranks agree on whether to continue without an exchange in each step, and a slow rank is named."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from dist_sae.distributed.local_ranks import rank_environments
from dist_sae.telemetry.metric import PHASES
from tests.forks import processes
from tests.training.agree_worker import REASON_AT, rank
from tests.training.trained import STEPS, final, history, run_file

pytestmark = pytest.mark.system


def last_words(
    folder: Path, activations: str, why: str
) -> tuple[set[str], Mapping[str, int], list[str]]:
    """Return both ranks' last messages, rank 0's exchanges over the control group, and its page."""
    train = {"log_every_steps": 20}
    path = run_file(folder, activations, processes={"trainers": 2}, train=train)
    ranks = []
    for number, env in enumerate(rank_environments(2, 2)):
        env["DIST_SAE_NODE"] = f"node-{number}"
        ranks.append(processes.Process(target=rank, args=(path, why, env), daemon=True))
        ranks[-1].start()
    for process in ranks:
        process.join(300)
        process.kill()
    said = [json.loads((folder / f"said-{number}.json").read_text()) for number in range(2)]
    return {words for words, *_ in said}, said[0][1], said[0][2].splitlines()


def test_a_step_needs_no_exchange_to_agree(tmp_path: Path, activations: str) -> None:
    """Ranks exchange messages only before the first step, and when they save after the last one."""
    words, exchanges, _ = last_words(tmp_path, activations, "nothing")
    assert words == {"ended"}
    assert exchanges.keys() == {"0", str(STEPS)}
    assert final(tmp_path).step == STEPS


@pytest.mark.parametrize("why", ["stop", "data ends"])
def test_all_ranks_stop_at_the_step_at_which_one_must(
    tmp_path: Path, activations: str, why: str
) -> None:
    """The rank that must stop tells the others during a step that it has a batch for.

    All ranks then agree after that step, and save.
    """
    words, exchanges, _ = last_words(tmp_path, activations, why)
    assert words == {f"stopped at step {REASON_AT} of {STEPS}; start again to continue"}
    assert exchanges.keys() == {"0", str(REASON_AT)}
    assert final(tmp_path).step == REASON_AT


def test_a_slow_rank_is_named_with_its_node(tmp_path: Path, activations: str) -> None:
    """Rank 0 names the slow rank of all ranks.

    The other rank's time is spent waiting in collectives.
    """
    words, _, page = last_words(tmp_path, activations, "slow")
    assert words == {"ended"}
    (slowest,) = [line for line in page if line.startswith("dist_sae_train_slowest_ratio{")]
    assert 'slowest="1"' in slowest
    assert " on node-1" in slowest
    shares = {
        line.split('phase="')[1].split('"')[0]: float(line.split()[-1])
        for line in page
        if line.startswith("dist_sae_train_phase_share{")
    }
    assert shares.keys() == set(PHASES)
    assert sum(shares.values()) == pytest.approx(1)
    phases = history(tmp_path)[-1]["phases"]
    assert shares["ranks"] == pytest.approx(phases["ranks"] / sum(phases.values()))
