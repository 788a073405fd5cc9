"""A pod counts its starts without progress, and ends the run after too many in a row."""

from pathlib import Path

import pytest

from dist_sae.commands import cli
from dist_sae.config import load_run
from dist_sae.errors import (
    EXIT_CRASHED,
    EXIT_RESUMABLE,
    EXIT_USER,
    HubUnavailableError,
    LivesSpentError,
)
from dist_sae.storage import open_store
from dist_sae.storage.lives import JOB, Part, PodLife, this_life
from tests.launch import run
from tests.runs import write_run

RETRIES = 2


def life(store: str, index: int = 3, job: str = "job", part: Part = "trainer") -> PodLife:
    return PodLife(open_store(store), "world", part, index, job=job, retries=RETRIES)


def test_too_many_lives_without_progress_end_the_run(tmp_path: Path) -> None:
    for _ in range(1 + RETRIES):
        life(str(tmp_path)).begin()
    for _ in range(2):  # the limit stays reached
        with pytest.raises(LivesSpentError) as caught:
            life(str(tmp_path)).begin()
        assert caught.value.exit_code == EXIT_USER
    words = (
        "trainer 3: 3 starts in a row ended without a new checkpoint (cluster.trainer.retries 2)"
    )
    assert str(caught.value).startswith(words)
    life(str(tmp_path), index=4).begin()  # each pod has its own count
    life(str(tmp_path), part="producer").begin()
    life(str(tmp_path), job="after a resume").begin()


def test_progress_sets_the_count_back(tmp_path: Path) -> None:
    for _ in range(10):
        alive = life(str(tmp_path))
        alive.begin()
        alive.begin()  # a second call of the same life is not counted
        life(str(tmp_path)).begin()  # a life without progress
        third = life(str(tmp_path))
        third.begin()
        third.progressed()
        third.progressed()


def test_a_life_that_had_nothing_to_do_does_not_count(tmp_path: Path) -> None:
    for _ in range(10):
        life(str(tmp_path)).progressed()
    assert not list(tmp_path.iterdir())


def test_only_the_first_rank_of_a_pod_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, store = load_run(write_run(tmp_path)), open_store(str(tmp_path / "runs"))
    assert not isinstance(this_life(settings, "trainer", store), PodLife)  # not in a pod
    monkeypatch.setenv(JOB, "job")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    assert isinstance(this_life(settings, "trainer", store), PodLife)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not isinstance(this_life(settings, "trainer", store), PodLife)


def test_a_bug_ends_as_the_pod_that_counts_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bug exits with EXIT_CRASHED where the pod counts the life, and else with Python's code.

    Kubernetes counts crashes with Python's code but not EXIT_CRASHED, so that each crash counts
    only once.
    """

    def bug(_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("dist_sae.commands.shared.load_for_device", bug)
    monkeypatch.setenv(JOB, "job")
    monkeypatch.setenv("LOCAL_RANK", "1")  # only the first rank counts the life
    assert cli.main(["train", "run.yaml"]) == EXIT_CRASHED
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err
    monkeypatch.delenv(JOB)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "run.yaml"])


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (MemoryError(), True),
        (HubUnavailableError("no answer"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_of_a_planner_only_crashes_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, *, counts: bool
) -> None:
    """Only crashes of the planner count, including those that no code can catch.

    Each start is counted first. The count is reset if the planner is interrupted or the hub is
    unavailable.
    """

    def fail(*_: object) -> None:
        raise error

    path = str(write_run(tmp_path))
    monkeypatch.setattr("dist_sae.producing.planner.plan_and_forecast", fail)
    monkeypatch.setenv(JOB, "job")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    for _ in range(7):
        assert cli.main(["plan", path]) == (EXIT_CRASHED if counts else EXIT_RESUMABLE)
    assert cli.main(["plan", path]) == (EXIT_USER if counts else EXIT_RESUMABLE)


@pytest.mark.system
def test_programs_count_their_lives(tmp_path: Path) -> None:
    """Producer and trainer count their lives.

    Without lives left, they refuse to start. Otherwise a unit or a checkpoint counts as progress. A
    producer that finds all units done has nothing to do, so it does not count a life.
    """
    path, folder = write_run(tmp_path), tmp_path / "runs/world/lives"
    env = {JOB: "job", "JOB_COMPLETION_INDEX": "0"}
    parts: dict[str, Part] = {"produce": "producer", "train": "trainer"}
    run("plan", str(path))
    for program, part in parts.items():
        for _ in range(7):
            PodLife(
                open_store(str(tmp_path / "runs")), "world", part, 0, job="job", retries=6
            ).begin()
        said = run(program, str(path), "--local-ranks", "1", env=env, code=2)
        assert f"error: {part} 0: 7 starts in a row ended without a" in said
        again = env | {JOB: "after a resume"}
        run(program, str(path), "--local-ranks", "1", env=again)
        assert '"in_a_row":0' in (folder / f"{part}-0.json").read_text().replace(" ", "")
    run("produce", str(path), "--local-ranks", "1", env=env | {JOB: "idle"})
    assert "idle" not in (folder / "producer-0.json").read_text()
