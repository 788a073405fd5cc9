"""Programs that run from preloaded modules exit, and react to signals, like ordinary programs."""

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forks import HANG_SECONDS
from tests.runs import TINY, write_run

pytestmark = pytest.mark.system

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(preloaded: dict[str, Path]) -> Start:
    def start(name: str, *arguments: str, **options: object) -> "subprocess.Popen[str]":
        command = [str(preloaded[name]), *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **options)  # type: ignore[call-overload,no-any-return]

    return start


def test_a_program_has_its_arguments_folder_environment_and_exit_code(
    tmp_path: Path, start: Start
) -> None:
    write_run(tmp_path, TINY)
    process = start(
        "python", "-m", "dist_sae", "config", "show", "run.yaml", "--json", cwd=tmp_path
    )
    out, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0, err
    assert json.loads(out)["name"] == "tiny"
    process = start("dist-sae", "plan", "none.yaml")
    assert process.communicate(timeout=HANG_SECONDS)[1].startswith("error: none.yaml: ")
    assert process.returncode == 2


def test_another_program_is_the_interpreters(start: Start) -> None:
    process = start("python", "-c", "import sys; print(sys.argv); sys.exit(3)", "x")
    assert process.communicate(timeout=HANG_SECONDS)[0] == "['-c', 'x']\n"
    assert process.returncode == 3


@pytest.fixture
def waiting(tmp_path: Path, start: Start) -> "subprocess.Popen[str]":
    """A producer that waits for a plan."""
    path = write_run(tmp_path, TINY)
    process = start("dist-sae", "produce", str(path), "--wait")
    assert process.stderr is not None
    assert any("waiting for a plan" in line for line in process.stderr)
    return process


def test_signals_are_passed_on(waiting: "subprocess.Popen[str]") -> None:
    waiting.send_signal(signal.SIGTERM)
    waiting.communicate(timeout=HANG_SECONDS)
    assert waiting.returncode == 75


def test_a_program_that_is_killed_takes_its_fork_along(waiting: "subprocess.Popen[str]") -> None:
    waiting.kill()
    # returns only once the fork has closed its stdout too
    waiting.communicate(timeout=HANG_SECONDS)
    assert waiting.returncode == -signal.SIGKILL
