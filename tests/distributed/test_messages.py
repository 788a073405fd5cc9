"""Ranks exchange JSON, so a message from another rank is never executed."""

import json
from pathlib import Path
from typing import Any

import pytest

from dist_sae.distributed.local_ranks import rank_environments
from tests.distributed.messages_worker import rank
from tests.forks import processes

pytestmark = pytest.mark.system


def on_two_ranks(what: str, folder: Path) -> list[Any]:
    started = []
    for env in rank_environments(2, 2):
        started.append(processes.Process(target=rank, args=(what, folder, env), daemon=True))
        started[-1].start()
    for process in started:
        process.join(120)
        assert process.exitcode == 0 or (what == "attacked" and process is started[1])
        process.kill()
    return [
        json.loads((folder / str(number)).read_text()) for number in range(2 - (what != "talk"))
    ]


def test_messages_arrive_as_they_were_sent(tmp_path: Path) -> None:
    for found, unpickled in on_two_ranks("talk", tmp_path):
        assert found == [True, repr({"fvu": float("inf"), "site": ["a", None, 0]})]
        assert unpickled == []


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    ((said, unpickled),) = on_two_ranks("attacked", tmp_path)
    assert "rank 1 sent an invalid message" in said
    assert unpickled == []
    assert not (tmp_path / "reached").exists()
