"""Planned runs for producers with test doubles for the model."""

from pathlib import Path

import pytest

from dist_sae.config import Run
from dist_sae.producing.planner import plan
from dist_sae.storage import ObjectStore, open_store
from tests.producing.producers import TEXTS, UNITS, LetterSource, letters_run, with_source
from tests.runs import make_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = make_run(tmp_path)
    assert len(plan(run).units) == UNITS
    return run


@pytest.fixture
def store(run: Run) -> ObjectStore:
    return open_store(run.store.activations)


@pytest.fixture
def letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, ObjectStore]:
    run = letters_run(tmp_path, monkeypatch, TEXTS)
    with_source(monkeypatch, LetterSource())
    return run, open_store(run.store.activations)
