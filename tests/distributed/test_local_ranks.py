"""The ranks of one pod: how the pod ends when a rank ends. Each rank is a line of shell."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from dist_sae.distributed import local_ranks, supervisor
from dist_sae.distributed.local_ranks import rank_environments, run_ranks
from dist_sae.errors import ConfigError

OTHER_IS_UP = "until [ -e up ]; do sleep 0.01; done;"


def heeds(code: int) -> str:
    """Return a rank that ends with this exit code on SIGTERM."""
    return f"trap 'exit {code}' TERM; : > up; while :; do sleep 0.01; done"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """A function that runs two ranks and returns the pod's exit code."""

    def run(first: str, second: str, stopping: threading.Event | None = None) -> int:
        program = tmp_path / "python"
        choice = f"if [ $RANK = 0 ]; then\n{first}\nelse\n{second}\nfi"
        program.write_text(f'#!/bin/sh\necho "$RANK $*" >> said\n{choice}\n')
        program.chmod(0o755)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "executable", str(program))
        monkeypatch.setattr(supervisor, "POLL_SECONDS", 0.01)
        environments = rank_environments(2, 2)
        return run_ranks(["train", "run.yaml"], environments, stopping or threading.Event())

    return run


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        ("exit 0", "exit 0", 0),
        (f"{OTHER_IS_UP} exit 75", heeds(75), 75),
        (f"{OTHER_IS_UP} exit 1", heeds(75), 1),
        (f"{OTHER_IS_UP} exit 2", heeds(75), 2),
        (f"{OTHER_IS_UP} exit 1", heeds(2), 2),  # a user's mistake explains the other failures
        (f"{OTHER_IS_UP} kill -9 $$", heeds(75), 137),
        (f"{OTHER_IS_UP} kill -9 $$", heeds(1), 137),  # the first failure, not its consequence
        (
            "exit 75",
            "exec sleep 60",
            75,
        ),  # SIGTERM came before the rank had a handler, so it has nothing to save
    ],
)
def test_a_pod_ends_as_its_ranks_do(
    run: Callable[..., int], first: str, second: str, code: int
) -> None:
    assert run(first, second) == code


def test_a_rank_that_does_not_end_when_another_has_crashed_is_killed(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_ranks, "FAILED_GRACE_SECONDS", 0.1)
    deaf = "trap '' TERM; : > up; while :; do sleep 0.01; done"
    assert run(f"{OTHER_IS_UP} exit 1", deaf) == 1


def test_all_ranks_are_told_to_stop(run: Callable[..., int], tmp_path: Path) -> None:
    class WhenUp(threading.Event):
        def is_set(self) -> bool:
            return all((tmp_path / f"up{rank}").exists() for rank in range(2))

    heeding = heeds(75).replace("up", "up$RANK")
    assert run(heeding, heeding, WhenUp()) == 75
    said = sorted((tmp_path / "said").read_text().splitlines())
    assert said == [
        "0 -m dist_sae train run.yaml --port-offset 1",
        "1 -m dist_sae train run.yaml --port-offset 2",
    ]


def test_ranks_stop_when_the_parent_is_killed(tmp_path: Path) -> None:
    said = tmp_path / "said"
    rank = f"""
import signal, threading
from dist_sae.distributed.supervisor import follow_parent
signal.signal(signal.SIGTERM, lambda *_: open({str(said)!r}, "w").write("stopped") and exit(75))
follow_parent()
print("up", flush=True)
threading.Event().wait()
"""
    parent = f"""
import sys, threading
from dist_sae.distributed.supervisor import start, supervise
command = [sys.executable, "-c", {rank!r}]
supervise([lambda: start(command, {{}})], threading.Event(), failed_grace_seconds=1)
"""
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.kill()
    # the rank has ended, because nothing has the pipe open for writing
    assert process.stdout.read() == ""
    assert said.read_text() == "stopped"
    process.communicate()


def test_ranks_know_their_numbers_and_where_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    assert rank_environments(2, 4) == [
        {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4"},
        {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"},
    ]
    # all ranks are in one pod, so they need no other pod's address
    first, second = rank_environments(2, 2)
    assert (first["RANK"], second["RANK"]) == ("0", "1")
    assert first["MASTER_ADDR"] == second["MASTER_ADDR"] == "127.0.0.1"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    outgoing = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    # outside the ephemeral ports, so no outgoing connection takes it before it is opened
    assert int(first["MASTER_PORT"]) < int(outgoing[0])
    monkeypatch.delenv("JOB_COMPLETION_INDEX")
    with pytest.raises(ConfigError, match="JOB_COMPLETION_INDEX: not set, although 4 ranks"):
        rank_environments(2, 4)
    with pytest.raises(ConfigError, match="--local-ranks 2: does not divide the 3 ranks"):
        rank_environments(2, 3)


def test_ranks_that_began_are_ended_when_another_cannot_begin() -> None:
    def fail() -> NoReturn:
        raise OSError("no more processes")

    first: list[subprocess.Popen[bytes]] = []

    def begin() -> "subprocess.Popen[bytes]":
        first.append(supervisor.start(["sleep", "100"], {}))
        return first[0]

    with pytest.raises(OSError, match="no more processes"):
        supervisor.supervise([begin, fail], threading.Event(), failed_grace_seconds=1)
    assert first[0].returncode == -signal.SIGKILL
