"""Producers follow the plan: they read the planned text, and record all sites of the set."""

import json
import os
from pathlib import Path

import pytest

import dist_sae.producing.loop
from dist_sae.data.plan import PLAN_KEY, load_plan
from dist_sae.data.shard import read_manifest
from dist_sae.errors import CorpusError, PlanMismatchError
from dist_sae.storage import open_store
from tests.producing.producers import (
    SITES,
    TEXTS,
    LetterSource,
    letters_run,
    rows_of,
    start,
    stored_units,
    with_source,
)
from tests.world import changed


def test_text_that_changes_while_producing_gives_no_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text that changes during production gives no rows, even if the file's size and time stay."""

    def change(call: int) -> None:
        if call == 0:
            corpus.write_text(corpus.read_text().replace("abcdefgh", "ABCDEFGH"))
            os.utime(corpus, ns=(before.st_atime_ns, before.st_mtime_ns))

    run = letters_run(tmp_path, monkeypatch, TEXTS)
    corpus = tmp_path / "corpus.jsonl"
    before = corpus.stat()
    with_source(monkeypatch, LetterSource(change))
    with pytest.raises(CorpusError, match=r"corpus\.jsonl: changed since the plan was made"):
        start(run, "a")
    store = open_store(run.store.activations)
    stored = [rows_of(store, unit, SITES[0]).tokens for unit in stored_units(store)]
    assert all(int(tokens.min()) >= ord("a") for tokens in stored)


def test_another_model_under_the_same_path_gives_no_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none").mkdir()
    weights = tmp_path / "none" / "model.safetensors"
    weights.write_text("as planned")
    run = letters_run(tmp_path, monkeypatch, TEXTS)
    with_source(monkeypatch, LetterSource())
    weights.write_text("as trained on")
    with pytest.raises(PlanMismatchError, match=r"^model\.path none: is not the model that the pl"):
        start(run, "a")
    assert stored_units(open_store(run.store.activations)) == []


def test_a_plan_without_checksums_of_documents_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A plan without checksums of documents, as older versions made it, is logged once."""
    run = letters_run(tmp_path, monkeypatch, TEXTS)
    with_source(monkeypatch, LetterSource())
    store = open_store(run.store.activations)
    content = json.loads(store.get(PLAN_KEY))
    content["text_checksums"] = None
    store.put(PLAN_KEY, changed(json.dumps(content).encode()))
    start(run, "a")
    assert sum("no checksums of documents" in message for message in caplog.messages) == 1
    assert len(stored_units(store)) == len(load_plan(store, run).units)


def test_a_producer_whose_run_needs_one_site_makes_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = letters_run(tmp_path, monkeypatch, TEXTS)
    store = open_store(run.store.activations)
    asked: list[tuple[str, ...]] = []

    def build(_: object, sites: tuple[str, ...]) -> LetterSource:
        asked.append(sites)
        return LetterSource()

    monkeypatch.setattr(dist_sae.producing.loop, "build_source", build)
    activations = run.activations.model_copy(update={"sites": (SITES[0],)})
    start(run.model_copy(update={"activations": activations}), "a")
    assert asked == [tuple(SITES)]
    assert set(read_manifest(store, 0).sites) == set(SITES)
