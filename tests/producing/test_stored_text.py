"""Units' texts are stored in the activation set, so producers read only their own units'."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from dist_sae.config import Run
from dist_sae.config.data import FilesCorpus
from dist_sae.data.corpus import Corpus
from dist_sae.data.plan import Plan, load_plan
from dist_sae.data.planned_text import TEXTS, PlannedText, store_texts
from dist_sae.errors import CorpusError, CorruptObjectError, PlanMismatchError, Stopped
from dist_sae.producing.planner import plan
from dist_sae.storage import open_store
from dist_sae.storage.s3 import S3Store
from tests.conftest import Bucket
from tests.producing.producers import TEXTS as LETTERS
from tests.producing.producers import (
    LetterSource,
    letters_run,
    rows_of,
    start,
    stored_units,
    with_source,
)

HALF = "\ud83d a pair that is cut"


def in_bucket(run: Run, bucket: Bucket, *, packed: bool = True) -> Run:
    """Return the same run with its text and its activations in a bucket."""
    assert isinstance(run.corpus, FilesCorpus)
    text = Path(run.corpus.files[0]).read_bytes()
    name = "corpus.jsonl.gz" if packed else "corpus.jsonl"
    body = gzip.compress(text) if packed else text
    bucket.client.put_object(Bucket=bucket.name, Key=name, Body=body)
    s3 = run.store.s3.model_copy(update={"endpoint_url": bucket.endpoint_url})
    place = {"activations": f"s3://{bucket.name}/set", "s3": s3}
    corpus = run.corpus.model_copy(update={"files": (f"s3://{bucket.name}/{name}",)})
    store = run.store.model_copy(update=place)
    return run.model_copy(update={"store": store, "corpus": corpus})


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys that are read from the bucket."""
    keys, get = list[str](), S3Store.get

    def noted(self: S3Store, key: str, first: int = 0, stop: int | None = None) -> bytes:
        keys.append(key)
        return get(self, key, first, stop)

    monkeypatch.setattr(S3Store, "get", noted)
    return keys


@pytest.mark.system
@pytest.mark.parametrize("packed", [True, False])
def test_a_producer_reads_the_texts_of_its_units_only(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bucket: Bucket,
    reads: list[str],
    *,
    packed: bool,
) -> None:
    """However often a producer is preempted, it reads only the texts of its units.

    Its rows are the same as those of a producer that reads the corpus files.
    """
    beside = letters_run(tmp_path, monkeypatch, LETTERS)
    run = in_bucket(beside, bucket, packed=packed)
    plan(run)
    store = open_store(run.store.activations, run.store.s3)
    made = load_plan(store, run)
    assert made.text_checksums is not None

    def preempt(calls: int) -> None:
        if calls > 16:
            raise Stopped("preempted")

    for _ in range(2):
        reads.clear()
        before = set(stored_units(store))
        with_source(monkeypatch, LetterSource(preempt))
        with pytest.raises(Stopped):
            start(run, "p")
        texts = [key for key in reads if key.startswith("set/texts/")]
        assert not [key for key in reads if key.startswith("corpus")]
        # the units that it produced, the one it left, and at most two that it had claimed ahead
        assert len(texts) <= len(set(stored_units(store)) - before) + 3 < len(made.units)
    with_source(monkeypatch, LetterSource())
    start(run, "p")
    start(beside, "p")
    there = open_store(beside.store.activations)
    for unit in range(len(made.units)):
        for site in made.sites:
            own, files = rows_of(store, unit, site), rows_of(there, unit, site)
            assert all(torch.equal(a, b) for a, b in zip(own, files, strict=True))


def small(folder: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, Plan]:
    run = in_bucket(letters_run(folder, monkeypatch, [HALF, *LETTERS]), bucket)
    return run, plan(run)


@pytest.mark.system
def test_texts_come_back_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: Bucket
) -> None:
    run, made = small(tmp_path, bucket, monkeypatch)
    store = open_store(run.store.activations, run.store.s3)
    stored = PlannedText(run, made, store)
    files = PlannedText(run, made.model_copy(update={"texts_stored": False}), store)
    for unit in range(len(made.units)):
        assert stored.read(unit) == files.read(unit)
    assert len({key[0] for key in TEXTS.keys(store)}) == len(made.units)


@pytest.mark.system
def test_planning_again_reads_the_text_only_if_it_looks_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: Bucket, reads: list[str]
) -> None:
    """Planning again reads the corpus only if it looks changed.

    So a run that was planned before it was submitted does not hold GPUs while the planner reads
    text.
    """
    run, made = small(tmp_path, bucket, monkeypatch)
    reads.clear()
    assert plan(run) == made
    assert reads
    assert "corpus.jsonl.gz" not in reads
    other = gzip.compress(json.dumps({"text": "another"}).encode())
    bucket.client.put_object(Bucket=bucket.name, Key="other.jsonl.gz", Body=other)
    moved = run.corpus.model_copy(update={"files": (f"s3://{bucket.name}/other.jsonl.gz",)})
    with pytest.raises(PlanMismatchError, match="corpus"):
        plan(run.model_copy(update={"corpus": moved}))


@pytest.mark.system
@pytest.mark.parametrize("damage", ["gone", "cut", "others"])
def test_damaged_texts_are_named_and_planning_again_mends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: Bucket, damage: str
) -> None:
    run, made = small(tmp_path, bucket, monkeypatch)
    store, checksums = open_store(run.store.activations, run.store.s3), made.text_checksums
    assert checksums is not None
    key = f"texts/{checksums[3]}.json"
    data = {"cut": store.get(key)[:-3], "others": json.dumps(["x", "y"]).encode()}
    store.delete(key) if damage == "gone" else store.put(key, data[damage])
    with pytest.raises(CorruptObjectError, match=f"{key}: .*; delete it and run `dist-sae plan`"):
        PlannedText(run, made, store).read(3)
    store.delete(key)
    assert plan(run) == made
    assert PlannedText(run, made, store).read(3)


def test_a_folder_beside_its_text_gets_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = letters_run(tmp_path, monkeypatch, LETTERS)
    store = open_store(run.store.activations)
    assert not load_plan(store, run).texts_stored
    assert not list(store.keys("texts/"))


def test_text_that_changes_while_it_is_stored_makes_no_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = letters_run(tmp_path, monkeypatch, LETTERS)
    store = open_store(run.store.activations)
    made = load_plan(store, run)
    assert isinstance(run.corpus, FilesCorpus)
    Path(run.corpus.files[0]).write_text(json.dumps({"text": "other"}) + "\n")
    with pytest.raises(CorpusError, match="changed since the plan was made"):
        store_texts(store, Corpus(run.corpus, run.store.s3), made)
