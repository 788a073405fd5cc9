"""Parts of a run that have their own Job stop when another part has failed for good."""

import threading
from pathlib import Path

import pytest

from dist_sae.commands import cli
from dist_sae.config import Run, load_run
from dist_sae.errors import (
    EXIT_USER,
    ModelError,
    PartFailedError,
    RankLostError,
    Stopped,
    UnavailableError,
)
from dist_sae.storage.failure import ATTEMPT, report_failure, stop_if_peer_failed
from tests.runs import write_run

SECONDS = 30.0


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv(ATTEMPT, "first")
    monkeypatch.setenv("POD_NAME", "world-trainer-0-abcde")
    return load_run(write_run(tmp_path))


def work(run: Run, error: Exception, look_seconds: float = 0.01) -> None:
    """Report another part's failure, wait to be stopped, and raise `error`."""
    stopping = threading.Event()
    with stop_if_peer_failed(run, stopping, look_seconds):
        report_failure(run, ModelError("the model is gone"))
        assert stopping.wait(SECONDS)
        raise error


@pytest.mark.parametrize("error", [Stopped("saved"), RankLostError("rank 1 is gone")])
def test_a_part_saves_and_ends_with_2_when_another_has_failed(run: Run, error: Exception) -> None:
    """A part saves and exits with code 2 when another part has failed.

    The same holds if it loses ranks of its own part, because these have stopped first.
    """
    with pytest.raises(PartFailedError) as caught:
        work(run, error)
    assert caught.value.exit_code == EXIT_USER
    assert "stopped because world-trainer-0-abcde failed (the model is gone)" in str(caught.value)


def test_a_part_that_begins_later_ends_at_once(run: Run) -> None:
    """A part that starts after a failure ends at once.

    Kueue may admit producers long after the trainers have failed.
    """
    report_failure(run, ModelError("the first cause"))
    report_failure(run, ModelError("what came of it"))
    with (
        pytest.raises(PartFailedError, match="the first cause"),
        stop_if_peer_failed(run, threading.Event()),
    ):
        pytest.fail("it began")


@pytest.mark.parametrize("command", ["produce", "train", "index", "evaluate"])
def test_every_part_looks_before_it_waits_for_others(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    for wait in ("await_plan", "await_end"):
        monkeypatch.setattr(f"dist_sae.training.waiting.{wait}", lambda *_: pytest.fail("it waits"))
    report_failure(run, ModelError("the model is gone"))
    assert cli.main([command, str(tmp_path / "run.yaml"), "--wait"]) == EXIT_USER
    assert (
        "stopped because world-trainer-0-abcde failed (the model is gone)"
        in capsys.readouterr().err
    )


def test_another_attempt_and_another_run_go_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report_failure(run, ModelError("the model is gone"))
    with stop_if_peer_failed(run.model_copy(update={"name": "other"}), threading.Event()):
        pass
    monkeypatch.setenv(ATTEMPT, "second")
    with stop_if_peer_failed(run, threading.Event()):
        pass
    # the record of the first attempt can be overwritten
    report_failure(run, ModelError("and again"))
    with pytest.raises(PartFailedError, match="and again"), stop_if_peer_failed(run, object()):  # type: ignore[arg-type]
        pass
    (tmp_path / "runs/world/failure.json").write_text("{")
    with stop_if_peer_failed(run, threading.Event()):
        pass


def test_errors_stay_as_they_are_while_nobody_has_failed(run: Run) -> None:
    with pytest.raises(Stopped), stop_if_peer_failed(run, threading.Event()):
        raise Stopped("saved")


def test_a_store_that_does_not_answer_costs_a_warning(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A store that does not respond costs a warning, and the part continues and checks again."""
    record = tmp_path / "runs/world/failure.json"
    stopping, warned = threading.Event(), threading.Event()

    def note(_: object) -> bool:
        warned.set()
        return True

    def work() -> None:
        with stop_if_peer_failed(run, stopping, 0.01):
            record.mkdir(parents=True)  # a folder in place of the record, which cannot be read
            assert warned.wait(SECONDS)
            report_failure(run, ModelError("not told"))
            record.rmdir()
            report_failure(run, ModelError("the model is gone"))
            assert stopping.wait(SECONDS)
            raise Stopped("saved")

    caplog.handler.addFilter(note)
    with pytest.raises(PartFailedError, match="the model is gone"):
        work()
    assert "cannot check whether another part has failed" in caplog.text
    assert "the other parts of the run could not be notified of this failure" in caplog.text


def test_only_the_first_rank_of_a_pod_looks_and_only_while_it_works(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stop_if_peer_failed(run, threading.Event()):
        (looking,) = (each for each in threading.enumerate() if each.name == "failure")
    looking.join(SECONDS)
    assert not looking.is_alive()
    report_failure(run, ModelError("the model is gone"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    with stop_if_peer_failed(run, threading.Event()):
        pass


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ModelError("no such model"), True),
        # the part that failed first has reported the cause
        (PartFailedError("stopped because a pod failed"), False),
        (UnavailableError("no answer", url="s3://a"), False),  # a later start may succeed
    ],
)
def test_what_fails_a_pod_for_good_is_told(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, *, told: bool
) -> None:
    """A permanent failure is reported by every command, even before it looks for GPUs."""

    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr("dist_sae.commands.shared.load_for_device", fail)
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == error.exit_code  # type: ignore[attr-defined]
    assert (tmp_path / "runs/world/failure.json").exists() == told
    # not in a pod, or in a pod of a JobSet, which stops all pods itself
    monkeypatch.delenv(ATTEMPT)
    (tmp_path / "runs/world/failure.json").unlink(missing_ok=True)
    cli.main(["train", str(tmp_path / "run.yaml")])
    assert not (tmp_path / "runs/world/failure.json").exists()
