"""Learning rates that are tried together before a run."""

import json
from pathlib import Path
from typing import Any

import pytest

from dist_sae.commands.cli import main
from tests.commands.test_cli import fail
from tests.training.trained import run_file


def tried(capsys: pytest.CaptureFixture[str], path: Path, *options: str) -> dict[str, Any]:
    assert main(["train", str(path), "--find-lr", "20", "--json", *options]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


@pytest.mark.system
def test_rates_around_the_runs_own_are_tried_and_none_is_taken(
    tmp_path: Path, activations: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nine rates a factor of two apart are tried. The run itself has no folder afterwards."""
    path = run_file(tmp_path, activations, train={"lr": 4e-3})
    found = tried(capsys, path)
    rates = {rate["lr"]: rate for rate in found["rates"]}
    assert list(rates) == pytest.approx([2.5e-4 * 2**n for n in range(9)], rel=1e-9)
    assert rates[found["best"]]["loss"] == min(rate["loss"] for rate in rates.values())
    first, *_, last = rates[found["best"]]["curve"]
    assert first > last == rates[found["best"]]["fvu"]
    names = {folder.name for folder in (tmp_path / "runs").iterdir()}
    assert "world" not in names
    assert {name for name in names if name.startswith("world-find-lr-lr")} == {
        f"world-find-lr-lr{rate:g}" for rate in rates
    }


def test_rates_that_diverge_are_an_answer(
    tmp_path: Path, activations: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_file(tmp_path, activations, train={"lr": 1e37, "clip_norm": None})
    found = tried(capsys, path)
    assert [rate["loss"] for rate in found["rates"]] == [None] * 9
    assert found["said"].startswith("all rates diverged; train.lr is unchanged")


def test_what_cannot_be_tried_is_refused(
    tmp_path: Path, activations: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(run_file(tmp_path, activations, sweep={"over": {"sae.k": [2, 3]}}))
    assert "name a job of the sweep" in fail(capsys, "train", path, "--find-lr")
    assert "too few; use at least 20" in fail(
        capsys, "train", path, "--job", "k2", "--find-lr", "3"
    )
