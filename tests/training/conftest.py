"""Undisturbed runs, trained once per pytest worker."""

from pathlib import Path

import pytest

from tests.launch import produce, train
from tests.runs import write_run
from tests.training.trained import SHARDED, run_file


@pytest.fixture(scope="session")
def activations(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("activations")
    produce(write_run(folder))
    return str(folder / "activations")


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory, activations: str) -> Path:
    """Folder of a run that was trained without interruption."""
    folder = tmp_path_factory.mktemp("calm")
    path = write_run(folder, store={"activations": activations, "runs": str(folder / "runs")})
    train(path)
    return folder


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory, activations: str) -> Path:
    """Folder of the same run on two ranks, each with half of the dictionary."""
    folder = tmp_path_factory.mktemp("sharded")
    train(run_file(folder, activations), *SHARDED, world=2)
    return folder
