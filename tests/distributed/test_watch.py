"""A rank that is lost, hung or has failed ends the job within seconds, and the error names the
rank.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dist_sae.distributed.local_ranks import rank_environments
from tests.distributed.watch_worker import (
    HUNG_SECONDS,
    LOST_SECONDS,
    MISSING_SECONDS,
    NCCL_JUDGES,
    rank,
)
from tests.forks import processes

pytestmark = pytest.mark.system

WORLD = 3
MARGIN_SECONDS = 20.0  # allowance for a busy machine


class Rank(NamedTuple):
    """One process of a job."""

    process: Any
    output: Path

    def reaches(self, where: int | str) -> None:
        until = time.monotonic() + MARGIN_SECONDS
        while f"\n{where}\n" not in self.said("out"):
            assert self.process.is_alive(), self.said("err")
            assert time.monotonic() < until
            time.sleep(0.02)

    def ends(self, seconds: float) -> tuple[int, str]:
        """Wait for the rank to end, and return its exit code and its last error line."""
        self.process.join(seconds + MARGIN_SECONDS)
        errors = [line for line in self.said("err").splitlines() if line.startswith("error: ")]
        return self.process.exitcode, errors[-1] if errors else ""

    def said(self, where: str) -> str:
        file = self.output.with_suffix(f".{where}")
        return file.read_text() if file.exists() else ""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., list[Rank]]]:
    """A function that starts a job. Its processes are killed at the end of the test."""
    ranks: list[Rank] = []

    environments = rank_environments(WORLD, WORLD)

    def job(what: str, present: tuple[int, ...] = (0, 1, 2)) -> list[Rank]:
        for number in present:
            output = tmp_path / f"rank-{len(ranks)}"
            process = processes.Process(
                target=rank, args=(what, str(output), environments[number]), daemon=True
            )
            process.start()
            ranks.append(Rank(process, output))
        return ranks[-len(present) :]

    yield job
    for one in ranks:
        one.process.kill()
        one.process.join()


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (1, "error: rank 1: did not join within 3 s"),
        (0, "error: rank 0 is not reachable at MASTER_ADDR:MASTER_"),
    ],
)
def test_a_rank_that_does_not_come_is_named(
    start: Callable[..., list[Rank]], missing: int, said: str
) -> None:
    for one in start("misses", tuple({0, 1, 2} - {missing})):
        code, error = one.ends(MISSING_SECONDS)
        assert code == 75
        assert error.startswith(said)
        assert "start again" in error


def test_a_rank_that_dies_before_the_groups_are_made_is_named(
    start: Callable[..., list[Rank]],
) -> None:
    """The other ranks wait for rank 1 while they create a process group, which has no timeout."""
    job = start("dies first")
    for other in (job[0], job[2]):
        code, error = other.ends(LOST_SECONDS)
        assert code == 75
        assert "rank 1 (" in error
        assert "is lost" in error


def test_a_rank_that_is_started_again_alone_does_not_take_part(
    start: Callable[..., list[Rank]],
) -> None:
    """The other ranks report the lost rank although its replacement is up.

    All ranks must restart together.
    """
    job = start("goes on")
    job[1].reaches(5)
    job[1].process.kill()
    job[1].process.join()
    again = start("misses", (1,))[0]
    for other in (job[0], job[2]):
        code, error = other.ends(LOST_SECONDS)
        assert code == 75
        assert "rank 1 (" in error
    code, error = again.ends(MISSING_SECONDS)
    assert code == 75
    assert "start" in error
    assert "\n0\n" not in again.said("out")


def test_ranks_that_wait_for_others_can_be_stopped(start: Callable[..., list[Rank]]) -> None:
    first, last = start("goes on", (0, 2))
    for one in (last, first):  # the first rank serves the TCP store, so it is stopped last
        one.reaches("ready")
        os.kill(one.process.pid, signal.SIGTERM)
        assert one.ends(0) == (
            75,
            "error: stopped before all ranks had joined; start again to continue",
        )


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_lost_rank_is_named(
    start: Callable[..., list[Rank]], number: signal.Signals, victim: int
) -> None:
    job = start("goes on")
    job[victim].reaches(5)
    os.kill(job[victim].process.pid, number)
    for other in {0, 1, 2} - {victim}:
        code, error = job[other].ends(LOST_SECONDS)
        assert code == 75
        assert f"rank {victim}" in error
        assert "start again" in error


@pytest.mark.parametrize("how", ["hangs", "hangs in a group"])
def test_a_hung_rank_is_named_and_tells_where_it_stands(
    start: Callable[..., list[Rank]], how: str
) -> None:
    """The other ranks wait at the same step, inside a collective that the hung rank has not
    entered.

    The watch must report the rank first, although torch's timeout for a collective is a sixth of
    `hung_seconds`. So torch's own handling of NCCL hangs and errors is off.
    """
    job = start(how)
    for one in job:
        code, error = one.ends(HUNG_SECONDS)
        assert code == 75
        assert error.startswith("error: rank 1 (")
        assert "hung at step 3" in error
        assert str(dict.fromkeys(NCCL_JUDGES, "0")) in one.said("out")
    assert "in work" in job[1].said("err")  # the hung rank's stack


def test_a_rank_that_fails_speaks_for_itself_and_ends_the_others(
    start: Callable[..., list[Rank]],
) -> None:
    job = start("fails")
    assert job[1].ends(0) == (2, "error: s3://bucket/unit: is damaged")
    for other in (job[0], job[2]):
        code, error = other.ends(LOST_SECONDS)
        assert code == 75
        assert error.startswith("error: rank 1 (")
        assert "s3://bucket/unit: is damaged" in error


def test_a_wish_to_stop_reaches_all(start: Callable[..., list[Rank]]) -> None:
    said = {one.ends(0) for one in start("stops")}
    assert len(said) == 1
    code, error = said.pop()
    assert code == 75
    assert error.startswith("error: stopped at step")


def test_waiting_is_not_hanging(start: Callable[..., list[Rank]]) -> None:
    for one in start("waits"):
        assert one.ends(2 * HUNG_SECONDS) == (0, "")
        assert "\n10\n" in one.said("out")
