from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_sae.config import Run, jobs_of, load_run
from dist_sae.config.data import S3Config
from dist_sae.data.corpus import Corpus, CorpusIndex, Span
from dist_sae.data.corpus_files import CorpusFile
from dist_sae.data.identity import plan_settings
from dist_sae.data.make_plan import make_plan
from dist_sae.data.plan import (
    PLAN_KEY,
    Plan,
    load_plan,
    publish_plan,
)
from dist_sae.errors import ConfigError, CorpusError, CorruptObjectError, PlanMismatchError
from dist_sae.producing.planner import plan
from dist_sae.storage import open_store
from dist_sae.storage.records import seal
from dist_sae.training.start import Start
from tests.runs import make_run, write_run
from tests.world import changed


def index(documents: int, per_span: int = 1) -> CorpusIndex:
    spans = [Span(0, i, per_span, i, i + per_span) for i in range(0, documents, per_span)]
    return CorpusIndex(
        (CorpusFile(name="x", documents=documents, fingerprint="f"),), spans, [100] * len(spans)
    )


def dealt(run: Run, index: CorpusIndex, document_rows: float) -> Plan:
    """Return the plan of documents of equal length."""
    counts = np.array([span.count for span in index.spans])
    return make_plan(run, index, np.rint(counts * document_rows).astype(np.int64))


def documents_of(made: Plan, units: range) -> list[int]:
    return [
        number
        for unit in units
        for span in made.units[unit]
        for number in range(span.first, span.first + span.count)
    ]


def test_the_plan_follows_from_corpus_and_settings_alone(tmp_path: Path) -> None:
    """The plan's hash is the same on every machine.

    A changed golden hash would make existing activation sets unusable.
    """
    one = dealt(make_run(tmp_path), index(128), 16.0)
    other = dealt(make_run(tmp_path / "elsewhere"), index(128), 16.0)
    assert one.hash == other.hash
    assert one == other
    assert one.hash == "30d4b9722b8e0d9c3789d1e2ff6fab5ebe2aeb97bd387e469be43de413a38523"


def test_what_a_plan_decides_leaves_jobs_of_other_kinds_their_own_settings(tmp_path: Path) -> None:
    open_ = {"unit_rows": None, "streams": None}
    kinds = {"sweep": {"over": {"sae.kind": ["topk", "batchtopk"]}}}
    run = make_run(tmp_path, **kinds, activations=open_, train={"rows": "all"})
    made = dealt(run, index(128), 16.0)
    jobs = jobs_of(made.resolve(run))
    assert [job.sae.kind for job in jobs] == ["topk", "batchtopk"]
    assert all(isinstance(job.train.rows, int) and not job.left_open for job in jobs)


def old_plan(run: Run, documents: int = 8) -> Plan:
    """Return a plan from before documents were dealt by size."""
    settings = plan_settings(make_plan(run, index(documents), np.full(documents, 16)).resolve(run))
    return Plan(
        settings=settings,
        files=index(documents).files,
        document_rows=16.5,
        n_train_units=4,
        units=tuple((span,) for span in index(documents).spans[:5]),
    )


def test_a_plan_of_an_older_version_keeps_its_hash_and_its_streams(tmp_path: Path) -> None:
    """A plan of an older version keeps its hash and streams, and its rows per document."""
    settings: dict[str, Any] = {"streams": 2, "window_units": 4, "unit_rows": 65536, "seed": 0}
    made = Plan(
        settings={"activations": settings | {"dtype": "bf16"}, "corpus": {"max_documents": None}},
        files=(CorpusFile(name="x", documents=6, fingerprint="f"),),
        document_rows=16.5,
        n_train_units=4,
        units=tuple((Span(0, i, 1 + (i == 4), i, i + 1 + (i == 4)),) for i in range(5)),
    )
    assert made.hash == "a0e77725ab0879f6caa85e69bc4e86d8ded9502392e4e7dcbbd59b0fe6575d5d"
    assert b'unit_rows":[' not in seal(made)
    assert [made.stream_units(v) for v in (0, 1)] == [[0, 2], [1, 3]]
    assert made.rows_of_units == (16, 16, 16, 16, 33)
    assert made.pass_rows == made.train_rows_estimate == 64
    assert not made.guarantees_rows


def test_a_plan_that_is_there_stays_however_it_was_made(tmp_path: Path) -> None:
    run = make_run(tmp_path, corpus={"documents": 8}, train={"rows": 64})
    store = open_store(run.store.activations)
    old = old_plan(run).model_copy(update={"files": Corpus(run.corpus, S3Config()).index().files})
    publish_plan(store, old)
    assert plan(run) == old
    with pytest.raises(PlanMismatchError, match=r"corpus\.documents: 8 -> 9"):
        plan(make_run(tmp_path, corpus={"documents": 9}, train={"rows": 64}))


def test_the_stored_plan_is_the_plan(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    made = plan(run)
    read = load_plan(open_store(run.store.activations), run)
    assert read == made
    assert read.hash == made.hash


@pytest.mark.parametrize(
    ("section", "changed"),
    [
        ("activations", {"seed": 1}),
        ("activations", {"streams": 8}),
        ("activations", {"heldout_share": 0.2}),
        ("model", {"seed": 5}),
        ("corpus", {"documents": 256}),
    ],
)
def test_other_settings_give_another_plan(
    tmp_path: Path, section: str, changed: dict[str, Any]
) -> None:
    first, second = make_run(tmp_path), make_run(tmp_path, **{section: changed})
    assert dealt(first, index(128), 16.0).hash != dealt(second, index(128), 16.0).hash


def test_the_seed_decides_which_documents_meet(tmp_path: Path) -> None:
    one = dealt(make_run(tmp_path), index(128), 16.0)
    other = dealt(make_run(tmp_path, activations={"seed": 1}), index(128), 16.0)
    assert one.units != other.units
    assert one.units != tuple(sorted(one.units))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("activations", "dtype", "bf16"),
        ("activations", "unit_rows", 100),
        ("activations", "block_rows", 8),
        ("model", "l0", 2.0),
        ("corpus", "document_rows", 32),
    ],
)
def test_a_store_with_another_plan_is_refused_and_the_setting_named(
    tmp_path: Path, section: str, key: str, value: Any
) -> None:
    run = make_run(tmp_path)
    made = plan(run)
    changed = make_run(tmp_path, **{section: {key: value}})
    store = open_store(run.store.activations)
    both: list[Callable[[], object]] = [lambda: load_plan(store, changed), lambda: plan(changed)]
    for refused in both:
        with pytest.raises(PlanMismatchError, match=rf"{section}\.{key}: .* -> {value}"):
            refused()
    assert store.get(PLAN_KEY) == seal(made)


def test_settings_that_only_change_speed_or_training_keep_the_plan(tmp_path: Path) -> None:
    """Settings of speed or training do not change the plan.

    Planning again finds the stored plan.
    """

    def language_model(**model: int) -> Run:
        return make_run(
            tmp_path,
            model={"kind": "huggingface", "path": "m"} | model,
            corpus={"kind": "files", "files": ["x"]},
            activations={"sites": ["resid_post.0"]},
        )

    one, other = language_model(), language_model(batch_tokens=77)
    assert dealt(one, index(128), 16.0).hash == dealt(other, index(128), 16.0).hash
    run = make_run(tmp_path)
    plan(run)
    trained_otherwise = make_run(tmp_path, train={"lr": 0.5}, sae={"k": 3})
    assert load_plan(open_store(run.store.activations), trained_otherwise) == plan(run)


def test_publishing_creates_once(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    store = open_store(run.store.activations)
    made = dealt(run, index(128), 16.0)
    assert publish_plan(store, made) is made
    again = publish_plan(store, made)
    assert again == made
    assert again is not made


def test_another_corpus_under_the_same_settings_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    store = open_store(run.store.activations)
    made = dealt(run, index(128), 16.0)
    publish_plan(store, made)
    file = made.files[0].model_copy(update={"fingerprint": "other"})
    with pytest.raises(PlanMismatchError, match="the corpus files have changed"):
        publish_plan(store, made.model_copy(update={"files": (file,)}))


def test_no_plan_yet_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(PlanMismatchError, match="run `dist-sae plan` first"):
        load_plan(open_store(run.store.activations), run)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"schema_version": 1}'])
def test_a_damaged_plan_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    run = make_run(tmp_path)
    store = open_store(run.store.activations)
    store.put(PLAN_KEY, content)
    with pytest.raises(CorruptObjectError) as caught:
        load_plan(store, run)
    assert caught.value.key == PLAN_KEY
    assert "\n" not in str(caught.value)


def test_a_plan_of_a_later_version_names_the_versions(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    store = open_store(run.store.activations)
    plan(run)
    store.put(PLAN_KEY, changed(store.get(PLAN_KEY), schema_version=2))
    with pytest.raises(CorruptObjectError, match="schema version 2, but this program reads 1"):
        load_plan(store, run)


@pytest.mark.parametrize("streams", [1, 4, 8])
@pytest.mark.parametrize(
    ("documents", "per_span", "rows"), [(128, 1, 16.0), (1000, 3, 40.0), (90, 1, 1000.0)]
)
def test_each_document_is_in_one_unit_and_units_divide_among_streams(
    tmp_path: Path, streams: int, documents: int, per_span: int, rows: float
) -> None:
    """Each document is in exactly one unit, no unit is empty, and streams get equally many units.

    In the last case, documents are longer than a unit (120 rows).
    """
    run = make_run(tmp_path, activations={"streams": streams, "heldout_share": 0.1})
    made = dealt(run, index(documents, per_span), rows)
    assert made.n_train_units % streams == 0
    assert all(made.units)
    train, heldout = (documents_of(made, u) for u in (made.train_units, made.heldout_units))
    assert set(Counter(train + heldout).values()) == {1}
    assert len(train) + len(heldout) >= documents
    assert len(heldout) == pytest.approx(0.1 * documents, abs=per_span)
    assert made.unit_rows is not None
    of_streams = [sum(made.unit_rows[u] for u in made.stream_units(v)) for v in range(streams)]
    assert max(of_streams) - min(of_streams) <= per_span * rows
    streamed = [unit for v in range(streams) for unit in made.stream_units(v)]
    assert sorted(streamed) == list(made.train_units)
    assert len({len(made.stream_units(v)) for v in range(streams)}) == 1


def test_documents_without_rows_make_no_unit(tmp_path: Path) -> None:
    run = make_run(
        tmp_path,
        activations={"streams": None, "unit_rows": None, "heldout_share": 0.0},
        train={"rows": "all", "normaliser_rows": None},
    )
    made = make_plan(run, index(43), np.array([10_000, 9_000, 50] + [0] * 40))
    assert made.n_train_units == made.streams * (3 // made.streams)
    assert made.unit_rows is not None
    assert all(made.unit_rows)
    assert sorted(documents_of(made, made.train_units)) == list(range(43))
    with pytest.raises(CorpusError, match="3 documents to train on are too few for 4 streams"):
        make_plan(make_run(tmp_path), index(9), np.array([1000] * 4 + [0] * 5))


def test_units_have_about_the_rows_that_were_asked_for(tmp_path: Path) -> None:
    """122 documents x 16 rows in units of about 120 rows give 16 units of 7 or 8 documents."""
    made = dealt(make_run(tmp_path), index(128), 16.0)
    assert made.n_train_units == 16
    assert {len(made.units[u]) for u in made.train_units} == {7, 8}
    assert made.train_rows_estimate == 122 * 16


def test_nothing_is_held_out_when_nothing_shall_be(tmp_path: Path) -> None:
    made = dealt(make_run(tmp_path, activations={"heldout_share": 0.0}), index(128), 16.0)
    assert len(made.heldout_units) == 0
    assert sorted(documents_of(made, made.train_units)) == list(range(128))


def test_too_few_documents_for_the_streams_is_said(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="3 documents to train on are too few for 4 streams"):
        dealt(make_run(tmp_path), index(4), 1000.0)


def test_less_than_one_batch_is_said(tmp_path: Path) -> None:
    # 3 of the 64 documents are held out, so 61 rows are left
    with pytest.raises(CorpusError, match=r"about 61 rows to train on, less than one batch.*64"):
        dealt(make_run(tmp_path), index(64), 1.0)


def test_max_documents_takes_a_sample_of_the_corpus(tmp_path: Path) -> None:
    settings = [
        "corpus={kind: files, files: [x.txt], max_documents: 100}",
        "model={kind: huggingface, path: x}",
        "activations.sites=[resid_pre.0]",
    ]
    run = load_run(write_run(tmp_path, activations={"unit_rows": 50}), settings)
    made = dealt(run, index(400), 10.0)
    chosen = documents_of(made, range(len(made.units)))
    assert len(chosen) == len(set(chosen)) == 100
    assert min(chosen) < 40  # a sample of all 400, not the first hundred
    assert max(chosen) > 360


def test_small_first_units_count_for_how_far_producers_must_run_ahead(tmp_path: Path) -> None:
    """The check of `max_ahead_units` takes into account that the first units are small.

    72,000 rows are needed to begin, and the first windows have 32 units of 2,048 rows, so 64 + 34
    units must fit at once.
    """

    def run(ahead: int) -> Run:
        return make_run(
            tmp_path,
            activations={"streams": None, "unit_rows": None, "window_units": 4},
            store={"max_ahead_units": ahead},
            train={"batch_rows": 4096, "rows": "all", "normaliser_rows": 56_000},
        )

    made = dealt(run(1), index(9000), 100.0)
    assert made.first_windows == 32
    assert made.rows_of_units[0] == pytest.approx(2048, abs=100)
    Start().check(made.resolve(run(98)), made)
    with pytest.raises(ConfigError, match=r"97 would block the run: .* need 98 units"):
        Start().check(made.resolve(run(97)), made)
