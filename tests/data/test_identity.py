"""A plan is identified by its settings, text and model, wherever text and model are stored."""

import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest

import dist_sae.data.corpus_files
import dist_sae.producing.planner
from dist_sae.config import Run
from dist_sae.config.data import HuggingFaceModel, S3Config
from dist_sae.config.fingerprint import PLAN_SECTIONS, changes, run_fingerprint
from dist_sae.data.corpus import Corpus
from dist_sae.data.identity import model_content
from dist_sae.data.make_plan import make_plan
from dist_sae.data.plan import (
    PLAN_KEY,
    Plan,
    check_model,
    load_plan,
    pin_to_plan,
    publish_plan,
)
from dist_sae.errors import PlanMismatchError
from dist_sae.kubernetes.stored import StoredRun
from dist_sae.producing.planner import plan
from dist_sae.storage import open_store
from tests.runs import make_run
from tests.world import Letters, changed

SITES = ["resid_post.0", "resid_post.1"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home and current folder, with two text files and a model's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {i}\n\n" for i in range(100)))
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
        (tmp_path / "model" / name).write_text(name)
    return tmp_path


def run_of(folder: Path, files: list[str], path: str = "model", **activations: Any) -> Run:
    return make_run(
        folder,
        model={"kind": "huggingface", "path": path},
        corpus={"kind": "files", "files": files},
        activations={"sites": SITES, **activations},
        train={"site": SITES[0]},
    )


def make(run: Run) -> Plan:
    index = Corpus(run.corpus, S3Config()).index()
    return make_plan(run, index, np.full(len(index.spans), 16), model_content(run.model))


def test_another_spelling_or_place_of_the_same_text_and_model_is_the_same_plan(home: Path) -> None:
    run = run_of(home, ["a.txt", "b.txt"])
    store = open_store(run.store.activations)
    made = publish_plan(store, make(run))
    (home / "link").symlink_to(home / "model")
    (home / "new").mkdir()
    for source in ("a.txt", "b.txt"):
        (home / "new" / f"the {source}").write_bytes((home / source).read_bytes())
    for files, path in (
        (["./a.txt", str(home / "b.txt")], "link"),
        (["~/b.txt", "~/a.txt"], "~/model"),
        (["new/*.txt"], str(home / "model")),
    ):
        other = run_of(home, files, path)
        assert load_plan(store, other) == made
        assert publish_plan(store, make(other)) == made
        check_model(other, made)
    (home / "model").rename(home / "moved")
    moved = run_of(home, ["a.txt", "b.txt"], "moved")
    assert load_plan(store, moved) == made
    check_model(moved, made)


def test_other_text_is_another_plan(home: Path) -> None:
    run = run_of(home, ["a.txt", "b.txt"])
    store = open_store(run.store.activations)
    publish_plan(store, make(run))
    (home / "c.txt").write_text("something else")
    for files in (["a.txt"], ["a.txt", "c.txt"], ["a.txt", "b.txt", "c.txt"], ["none.txt"]):
        with pytest.raises(PlanMismatchError, match=r"corpus\.files: .*'a\.txt'"):
            load_plan(store, run_of(home, files))
    more = run_of(home, ["*.txt"])
    with pytest.raises(PlanMismatchError, match=f"the corpus files have changed: {home}/c.txt is"):
        publish_plan(store, make(more))
    (home / "b.txt").write_text((home / "a.txt").read_text())
    with pytest.raises(PlanMismatchError, match=f"the corpus files have changed: {home}/b.txt has"):
        publish_plan(store, make(run))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_another_model_under_the_same_name_is_refused(home: Path, name: str) -> None:
    run = run_of(home, ["a.txt"])
    store = open_store(run.store.activations)
    made = publish_plan(store, make(run))
    (home / "model" / "README.md").write_text("decides nothing")
    check_model(run, made)
    (home / "model" / name).write_text("another")
    with pytest.raises(PlanMismatchError, match=f"is not the model .* \\({name} differ\\)"):
        check_model(run, made)
    with pytest.raises(PlanMismatchError, match=f"the model has changed: {name}"):
        publish_plan(store, make(run))


def test_another_model_elsewhere_is_refused_by_programs_that_need_none(home: Path) -> None:
    run = run_of(home, ["a.txt"])
    store = open_store(run.store.activations)
    publish_plan(store, make(run))
    (home / "other").mkdir()
    (home / "other" / "config.json").write_text("another")
    for path in ("other", "none"):
        with pytest.raises(PlanMismatchError, match=rf"model\.path: model -> {path}"):
            load_plan(store, run_of(home, ["a.txt"], path))


def test_a_run_may_need_fewer_sites_than_the_set_has(home: Path) -> None:
    run = run_of(home, ["a.txt"])
    store = open_store(run.store.activations)
    made = publish_plan(store, make(run))
    one = run_of(home, ["a.txt"], sites=SITES[:1])
    assert load_plan(store, one) == made == publish_plan(store, make(one))
    # producers make all sites of the plan
    assert pin_to_plan(one, made).activations.sites == tuple(SITES)
    assert pin_to_plan(one, made).site == one.site
    more = run_of(home, ["a.txt"], sites=[*SITES, "resid_post.2"])
    with pytest.raises(PlanMismatchError, match=r"activations\.sites: resid_post\.2 was not rec"):
        load_plan(store, more)


def test_a_run_goes_on_with_text_and_model_elsewhere(home: Path) -> None:
    run = run_of(home, ["a.txt"])
    moved = run_of(home, ["b.txt"], "moved", sites=SITES[:1])
    assert changes(run_fingerprint(run), moved, but=PLAN_SECTIONS) == []
    assert len(changes(run_fingerprint(run), moved)) == 3
    other = moved.model_copy(update={"train": moved.train.model_copy(update={"site": SITES[1]})})
    assert changes(run_fingerprint(run), other, but=PLAN_SECTIONS) == [
        f"train.site: {SITES[0]} -> {SITES[1]}"
    ]


def test_a_plan_of_an_earlier_version_is_the_same_plan(home: Path) -> None:
    """A plan of an earlier version, without content checksums and a later key, keeps its hash."""
    run = run_of(home, ["a.txt", "b.txt"])
    store = open_store(run.store.activations)
    made = publish_plan(store, make(run))
    content = json.loads(store.get(PLAN_KEY))
    assert set(content) - {"sha256"} == set(Plan.model_fields) - {"corpus_commit", "texts_stored"}
    for new in ("text_checksums", "model_content"):
        del content[new]
    for file in content["files"]:
        del file["bytes"]
    del content["settings"]["activations"]["block_rows"]  # an absent key has its default value
    run = run_of(home, ["a.txt", "b.txt"], block_rows=4096)
    store.put(PLAN_KEY, json.dumps(content).encode())
    store.put(PLAN_KEY, changed(store.get(PLAN_KEY)))
    old = load_plan(store, run)
    assert old.hash == json.loads(store.get(PLAN_KEY))["sha256"] != made.hash
    assert old.text_checksums is None
    check_model(run, old)
    assert publish_plan(store, make(run)) == old
    assert load_plan(store, run_of(home, ["b.txt", "./a.txt"], "~/model", block_rows=4096)) == old
    with pytest.raises(PlanMismatchError, match=r"block_rows: 4096 -> 32"):
        load_plan(store, run_of(home, ["a.txt", "b.txt"]))
    (home / "b.txt").write_text("other")
    with pytest.raises(PlanMismatchError, match=f"{home}/b.txt has changed"):
        publish_plan(store, make(run))


def test_what_the_hub_had_when_the_plan_was_made_stays(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Producers load the commit of the model that was planned, even after its branch moves on."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
    folder = home / "hub" / "models--some--model"
    first, second = "1" * 40, "2" * 40
    for commit in (first, second):
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "config.json").write_text(commit)
    (folder / "refs").mkdir()
    branch = folder / "refs" / "main"
    branch.write_text(first)
    run = run_of(home, ["a.txt"], "some/model")
    store = open_store(run.store.activations)
    made = publish_plan(store, make(run))
    assert made.model_content == {"commit": first}
    branch.write_text(second)
    planned = pin_to_plan(run, load_plan(store, run))
    assert isinstance(planned.model, HuggingFaceModel)
    assert planned.model.revision == first
    check_model(planned, made)
    assert publish_plan(store, make(planned)) == made
    for revision, same in ((first, True), ("main", False), (second, False)):
        model = planned.model.model_copy(update={"revision": revision})
        asked = run.model_copy(update={"model": model})
        if same:
            assert load_plan(store, asked) == made
        else:
            with pytest.raises(PlanMismatchError, match=rf"model\.revision: None -> {revision}"):
                load_plan(store, asked)


def test_a_run_of_the_same_name_is_known_by_content_where_there_is_a_plan(home: Path) -> None:
    """A stored run with the same name is compared by content if there is a plan.

    Text and model were moved, as for a run on a cluster or in the store.
    """
    run = run_of(home, ["a.txt", "b.txt"])
    made = make(run)
    (home / "there").mkdir()
    for name in ("a.txt", "b.txt", "model"):
        (home / name).rename(home / "there" / name)
    moved = run_of(home, ["there/*.txt"], "there/model")
    names = ["model.path", "corpus.files"]
    assert [line.split(":")[0] for line in StoredRun(moved).changes(run)] == names
    publish_plan(open_store(run.store.activations), made)
    assert StoredRun(moved).changes(run) == []
    (home / "there" / "b.txt").write_text("other text")
    assert [line.split(":")[0] for line in StoredRun(moved).changes(run)] == names


def test_planning_again_asks_for_what_was_planned(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planning again reads the planned commit of a data set.

    The data set has a newer commit, and the run file names no commit.
    """
    commits = ["1" * 40, "2" * 40]
    texts = {commits[0]: [f"text {i}" for i in range(100)], commits[1]: ["other"]}
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *_, revision, **__: datasets.Dataset.from_dict({"text": texts[revision]}),
    )
    monkeypatch.setattr(
        dist_sae.data.corpus_files,
        "dataset_commit",
        lambda _, name: name if name in commits else commits[-1],
    )
    for module, name, stand_in in (
        (dist_sae.producing.planner, "check_sites", lambda *_: {}),
        (dist_sae.producing.planner, "build_tokenizer", lambda *_: Letters()),
    ):
        monkeypatch.setattr(module, name, stand_in)
    run = make_run(
        home,
        model={"kind": "huggingface", "path": "model"},
        corpus={"kind": "dataset", "name": "some/texts"},
        activations={"sites": SITES},
        train={"site": SITES[0], "rows": 64},
    )
    commits.reverse()
    made = plan(run)
    assert made.corpus_commit == "1" * 40
    commits.reverse()
    assert plan(run) == made
    store = open_store(run.store.activations)
    with monkeypatch.context() as m:
        m.delattr(datasets, "load_dataset")  # loading a plan reads no text
        for revision in ("main", *commits):
            corpus = run.corpus.model_copy(update={"revision": revision})
            pinned = run.model_copy(update={"corpus": corpus})
            if revision == made.corpus_commit:
                assert load_plan(store, pinned) == made
                continue
            with pytest.raises(PlanMismatchError, match=rf"corpus\.revision: None -> {revision}"):
                load_plan(store, pinned)
    (home / "model" / "config.json").write_text("another")
    with pytest.raises(PlanMismatchError, match=r"the model has changed: config\.json"):
        plan(run)
