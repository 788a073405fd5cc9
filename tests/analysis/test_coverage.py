"""`dist-sae analyse coverage` on a world whose features are known."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_sae.commands.cli import main
from dist_sae.config import Run
from dist_sae.config.data import SyntheticModel
from dist_sae.dictionaries.base import Dictionary
from dist_sae.models.synthetic import SyntheticSource
from dist_sae.report.outcome import read_outcome_table, read_outcomes
from dist_sae.storage import open_store
from tests.index.indexed import add_checkpoint, make_index, produced

FOUND = 20
"""Number of features that the dictionary contains: the most frequent of 48."""


def holds(run: Run, found: int) -> Dictionary:
    """Write a checkpoint with the first features at latents 3, 4, ... and random others."""

    def plant(sae: Dictionary) -> None:
        assert isinstance(run.model, SyntheticModel)
        sae.W_dec.data[3 : 3 + found] = SyntheticSource(run.model).directions[:found]
        # a second, less similar latent of the first feature must not take another feature's place
        sae.W_dec.data[40] = sae.W_dec.data[3] + 0.02 * torch.randn(16)

    return add_checkpoint(run, change=plant)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = produced(tmp_path_factory.mktemp("run"), model={"d_in": 16, "n_features": 48})
    holds(made, FOUND)
    make_index(made)
    return made


def place(run: Run) -> str:
    return f"{run.store.runs}/{run.name}"


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["analyse", "coverage", *words])
    return code, *capsys.readouterr()


def test_the_features_that_a_dictionary_has_are_found(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = asked(capsys, place(run), "--truth", "--json")
    assert code == 0
    numbers: dict[str, Any] = json.loads(out)["runs"]["world"]
    assert (numbers["recovered"], numbers["concepts"]) == (FOUND, 48)
    assert isinstance(run.model, SyntheticModel)
    p = SyntheticSource(run.model).probabilities
    assert p[FOUND + 1] < numbers["f50"]["value"] < p[FOUND - 2]
    store = open_store(run.store.runs)
    (outcome,) = read_outcomes(store, "world")
    table = read_outcome_table(store, outcome, "concepts").to_pylist()
    assert [row["latent"] for row in table] == [*range(3, 3 + FOUND), *[None] * (48 - FOUND)]


def test_a_random_dictionary_has_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = produced(tmp_path, model={"d_in": 16, "n_features": 48})
    holds(run, 0)
    make_index(run)
    _, out, _ = asked(capsys, place(run), "--truth")
    assert "world: 0 of 48 concepts (0%) have a latent of their own" in out
    assert "world: nothing found: no concept has a latent, so there is no curve" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--truth", "--frequency", "1e-6"], "a forecast needs dictionaries of 3 widths"),
        (["--truth", "--frequency", "2"], "--frequency 2: must be between 0 and 1"),
        (["--f1", "0.2"], "--f1 0.2: must be above 0.3"),
        (["--concepts", "metals"], "metals: is neither a built-in list"),
        (["--concepts", "cities"], "none of the 227 words occurs in the"),
    ],
)
def test_what_cannot_be_answered_is_one_line(
    run: Run, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    code, _, errors = asked(capsys, place(run), *options)
    lines = [line for line in errors.splitlines() if "error" in line]
    assert code == 2
    assert message in lines[-1]
    assert len(errors.strip().splitlines()) == 1


def test_an_index_without_postings_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = produced(tmp_path, index={"postings": "none"})
    add_checkpoint(run)
    code, _, errors = asked(capsys, place(run), "--truth")
    assert code == 2
    assert "no latent index" in errors
    make_index(run)
    code, _, errors = asked(capsys, place(run))
    assert code == 2
    assert "has no postings (index.postings: none)" in errors
