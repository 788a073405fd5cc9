"""Evaluation on a real, tiny language model: its results, and what is reused between calls."""

import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dist_sae import logs
from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.checkpoint.pages import PagedDictionary
from dist_sae.checkpoint.state import IDLE_ROWS
from dist_sae.config import Run
from dist_sae.config.data import HuggingFaceModel
from dist_sae.config.fingerprint import run_fingerprint
from dist_sae.config.sae import SaeConfig
from dist_sae.data.plan import load_plan
from dist_sae.data.shard import manifest_key
from dist_sae.data.work_queue import Worker
from dist_sae.dictionaries import build_sae
from dist_sae.errors import EXIT_RESUMABLE, ConfigError, ObjectNotFoundError, UnitMissingError
from dist_sae.evaluation.evaluate import evaluate
from dist_sae.evaluation.pca import pca_fvu
from dist_sae.interop.export import export
from dist_sae.models import build_tokenizer
from dist_sae.models.spliced import SplicedModel
from dist_sae.producing.loop import produce
from dist_sae.producing.planner import plan
from dist_sae.report.build import report
from dist_sae.storage import open_store
from dist_sae.telemetry.exporter import Telemetry
from tests.dictionaries.recipes import sae_rows
from tests.models.test_huggingface import D, save_model
from tests.world import joined, open_activation_set, save

DOCUMENTS, WORDS = 60, 20


@pytest.fixture(scope="module")
def produced_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A produced activation set of a language model, without checkpoints."""
    folder = tmp_path_factory.mktemp("language")
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, 50, (DOCUMENTS, WORDS), generator=generator)
    text = "\n".join(" ".join(f"w{word}" for word in document) for document in words.tolist())
    (folder / "text.txt").write_text(text)
    run = Run.model_validate(
        {
            "name": "language",
            "store": {"activations": str(folder / "a"), "runs": str(folder / "r")},
            "model": {
                "kind": "huggingface",
                "path": str(save_model(folder / "model", "llama")),
                "dtype": "fp32",
                "batch_tokens": 128,
            },
            "corpus": {
                "kind": "files",
                "files": [str(folder / "text.txt")],
                "txt_documents": "line",
            },
            "activations": {
                "sites": ["resid_post.1"],
                "streams": 2,
                "unit_rows": 200,
                "context_tokens": 16,
                "heldout_share": 0.2,
                "dtype": "fp32",
                "exclude": {"over_norm": None},
            },
            "sae": {"kind": "topk", "n_latents": 32, "k": 4, "auxk": 0},
            "train": {"rows": 640, "batch_rows": 64},
            "evaluate": {"contexts": 12, "rows": 150, "latents": 2},
        }
    ).resolved()
    plan(run)
    produce(run, Worker("p"), threading.Event(), Telemetry("language", "produce", None))
    return run


@pytest.fixture
def run(produced_run: Run, tmp_path: Path) -> Run:
    """A run with checkpoints of two untrained dictionaries."""
    store = produced_run.store.model_copy(update={"runs": str(tmp_path)})
    run = produced_run.model_copy(update={"store": store})
    made = load_plan(open_store(run.store.activations), run)
    for step in (4, 10):
        sae = build_sae(run.sae, D)
        sae.initialise(
            sae_rows(torch.randn(64, D, generator=torch.Generator().manual_seed(step))), step
        )
        tensors = sae.state_dict() | {IDLE_ROWS: torch.zeros(32, dtype=torch.int64)}
        scalars = {
            "scale": 0.5,
            "mean": [0.125] * D,
            "variance": 1.0,
            "rows": 1,
            "plan": made.hash,
            "run": run_fingerprint(run),
        }
        save(Checkpoints(open_store(str(tmp_path)), run.name, 2), step, tensors, scalars)
    return run


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets one item per batch on which the language model computes losses."""
    losses: Callable[..., Any] = SplicedModel.losses
    seen: list[int] = []

    def counted(*args: Any) -> Any:
        seen.append(1)
        return losses(*args)

    monkeypatch.setattr(SplicedModel, "losses", counted)
    return seen


def evaluation(run: Run, name: str = "evaluation.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(run.store.runs) / "language" / name).read_text())
    return found


def test_what_no_dictionary_changes_is_computed_once(run: Run, passes: list[int]) -> None:
    kept = Path(run.store.activations) / "evaluation"
    first = evaluate(run)
    batches = len(passes) // 4  # clean, with zeros, with the mean, with the reconstruction
    assert len(passes) == 4 * batches >= 8
    files = {path: path.read_bytes() for path in kept.iterdir()}
    assert {path.name.partition("-")[0] for path in files} == {"cross", "pca", "produced"}

    other = evaluate(run, step=4)
    assert len(passes) == 5 * batches
    assert {path: path.read_bytes() for path in kept.iterdir()} == files
    for name in ("ce_clean", "ce_zero", "ce_mean"):
        assert other[name] == first[name]
    assert other["ce_spliced"] != first["ce_spliced"]

    for path, content in files.items():  # damaged results are computed again
        path.write_bytes(content[:-9])
    again = run.model_copy(update={"evaluate": run.evaluate.model_copy(update={"latents": 3})})
    (Path(run.store.runs) / "language/evaluation.json").unlink()
    assert without_times(evaluate(again)) == without_times(first)
    assert {path: path.read_bytes() for path in kept.iterdir()} == files


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "evaluate_seconds"}


def test_progress_is_told_to_the_last_row_and_context(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(logs.SUPERVISED, "1")
    result = evaluate(run)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    last = {record["role"]: (record["done"], record["total"]) for record in told}
    assert last == {"evaluate": (result["rows"], result["rows"]), "losses": (48, 48)}
    assert all(record["done"] <= record["total"] for record in told)


def test_cross_entropies_are_those_of_the_plain_model(run: Run) -> None:
    """Cross-entropies are in nats per held-out token, and intervals contain the estimates."""
    result = evaluate(run)
    assert isinstance(run.model, HuggingFaceModel)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(run.model.path)
    made = load_plan(open_store(run.store.activations), run)
    lines = [
        line
        for unit in made.heldout_units
        for span in made.units[unit]
        for line in text_of(run)[span.first : span.first + span.count]
    ]
    total, tokens = 0.0, 0
    contexts = []
    for ids in build_tokenizer(run)(lines):
        contexts += [[0, *ids[start : start + 15]] for start in range(0, len(ids), 15)]
    for ids in contexts[:12]:
        given = torch.tensor([ids])
        with torch.inference_mode():
            logits = model(given).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, given[0, 1:], reduction="sum"))
        tokens += len(ids) - 1
    assert result["tokens"] == tokens
    assert result["ce_clean"] == pytest.approx(total / tokens, rel=1e-5)
    assert result["ce_documents"] == 6  # contexts of 15 and 5 words
    for name, (low, high) in result["intervals"].items():
        assert low < result[name] < high


@pytest.fixture
def pages_of_five(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave memory for five latents at a time."""

    def paged(config: SaeConfig, d_in: int, checkpoint: Checkpoint, **_: Any) -> PagedDictionary:
        made = PagedDictionary(config, d_in, checkpoint, 4 * (5 * (2 * D + 1) + D) * 4)
        assert [len(part) for part in made.parts("W_dec")] == [*6 * [5], 2]
        return made

    monkeypatch.setattr("dist_sae.checkpoint.trained.PagedDictionary", paged)


def test_pages_give_the_same_numbers(run: Run, request: pytest.FixtureRequest) -> None:
    results = []
    for _ in range(2):
        results.append(evaluate(run))
        (Path(run.store.runs) / "language/evaluation.json").unlink()
        request.getfixturevalue("pages_of_five")
    expected, found = results
    assert found.keys() == expected.keys()
    for name in found.keys() - {"evaluate_seconds", "intervals"}:
        wanted = expected[name]
        if isinstance(wanted, float):
            wanted = pytest.approx(wanted, rel=1e-5)
        assert found[name] == wanted, name


@pytest.mark.usefixtures("pages_of_five")
def test_a_checkpoint_that_its_trainer_deletes_meanwhile_has_a_newer_one(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If the trainer deletes the checkpoint being read, the newest is evaluated from the start.

    Any other missing object is still an error.
    """
    checkpoints = Checkpoints(open_store(run.store.runs), run.name, 1)
    older = checkpoints.open(10)
    tensors = older.tensors

    def train_on(*args: Any) -> float:
        if checkpoints.steps()[-1] == 10:
            save(checkpoints, 12, tensors | {"W_dec": torch.eye(32, D)}, older.scalars)
        return pca_fvu(*args)

    monkeypatch.setattr("dist_sae.evaluation.evaluate.pca_fvu", train_on)
    found = evaluate(run)
    assert checkpoints.steps() == [12]
    assert found["step"] == 12
    assert found == evaluate(run) == evaluation(run)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    def missing(*args: Any) -> float:
        raise ObjectNotFoundError("no such object", url=run.store.activations, key="units/0")

    monkeypatch.setattr("dist_sae.evaluation.evaluate.pca_fvu", missing)
    save(checkpoints, 13, tensors, older.scalars)
    with pytest.raises(ObjectNotFoundError, match="units/0"):
        evaluate(run)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def text_of(run: Run) -> list[str]:
    return Path(run.store.activations).with_name("text.txt").read_text().splitlines()


def test_pca_is_that_of_the_training_rows(run: Run) -> None:
    """The PCA's FVU matches one computed in fp64 from all rows at once."""
    result = evaluate(run)
    activation_set = open_activation_set(run)
    made = activation_set.plan
    training = joined(activation_set.rows(made.train_units, 10**6)).double()
    heldout = joined(activation_set.heldout_rows(150)).double()
    directions = torch.linalg.eigh(torch.cov(training.T)).eigenvectors[:, -4:]
    centred = heldout - 0.25  # the unscaled mean
    left = centred - centred @ directions @ directions.T
    assert result["pca_components"] == 4
    expected = float(left.square().sum() / centred.square().sum())
    assert result["pca_fvu"] == pytest.approx(expected, rel=1e-4)


def test_what_is_done_is_not_done_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are reused until the checkpoint or the evaluation's settings change."""
    first, place, page = evaluate(run), Path(export(run)), Path(report(run))
    files = [place / "cfg.json", place / "sae_weights.safetensors", page]
    before = [path.stat().st_mtime_ns for path in files]
    with monkeypatch.context() as patch:
        patch.setattr("dist_sae.checkpoint.pages.load_weights", None)  # fails if weights are read
        assert evaluate(run) == first
        assert (export(run), report(run)) == (str(place), str(page))
    assert [path.stat().st_mtime_ns for path in files] == before

    settings = run.evaluate.model_copy(update={"rows": 70})
    assert evaluate(run.model_copy(update={"evaluate": settings}))["rows"] == 70
    report(run)  # rewrites the page, because the results changed
    checkpoints = Checkpoints(open_store(run.store.runs), run.name, 2)
    checkpoint = checkpoints.open(10)
    zeros = checkpoint.tensors | {"W_dec": torch.zeros(32, D)}
    save(checkpoints, 10, zeros, checkpoint.scalars)
    assert evaluate(run)["fvu"] != first["fvu"]
    export(run)
    after = [path.stat().st_mtime_ns for path in files]
    assert all(now > then for now, then in zip(after, before, strict=True))


def test_what_was_measured_while_units_were_missing_is_measured_again(run: Run) -> None:
    store = open_store(run.store.activations)
    complete = evaluate(run)
    key = manifest_key(0)
    manifest = store.get(key)
    store.delete(key)
    try:
        partial = evaluate(run)
        assert partial["train_documents"] < complete["train_documents"]
        assert evaluate(run) == partial
    finally:
        store.put(key, manifest)
    assert evaluate(run)["train_documents"] == complete["train_documents"]


def test_units_that_nobody_makes_are_not_waited_for_without_end(run: Run) -> None:
    store = open_store(run.store.activations)
    key = manifest_key(load_plan(store, run).heldout_units[0])
    manifest = store.get(key)
    store.delete(key)
    for path in Path(run.store.activations, "units").iterdir():
        os.utime(path, (0, 0))  # so that no recent unit suggests a running producer
    timeouts = run.timeouts.model_copy(update={"missing_seconds": 0.2})
    try:
        with pytest.raises(
            UnitMissingError, match=r"start producers .* then rerun this command"
        ) as told:
            evaluate(run.model_copy(update={"timeouts": timeouts}))
    finally:
        store.put(key, manifest)
    assert told.value.exit_code == EXIT_RESUMABLE


def test_a_step_that_is_not_the_newest_has_results_of_its_own(run: Run) -> None:
    newest = evaluate(run)
    older = evaluate(run, step=4)
    assert (newest["step"], older["step"]) == (10, 4)
    assert evaluation(run) == newest
    assert evaluation(run, "evaluation-step-00000004.json") == older
    assert evaluate(run, step=10) == newest
    assert export(run, step=4).endswith("/export-step-00000004")
    assert report(run, step=4).endswith("/report/report-step-00000004.html")
    with pytest.raises(
        ConfigError, match=r"--step: .* has no checkpoint of step 5; available steps: 4, 10"
    ):
        evaluate(run, step=5)


def test_an_evaluation_names_its_subject(run: Run) -> None:
    result = evaluate(run)
    assert (result["kind"], result["n_latents"], result["k"]) == ("topk", 32, 4)
    assert (result["site"], result["seed"], result["sae"]["auxk"]) == ("resid_post.1", 0, 0)
    assert (result["train_documents"], result["heldout_documents"]) == (48, 12)
    # two contexts per document, each with an excluded BOS
    assert result["excluded_rows"]["special_token"] == 2 * DOCUMENTS
    assert result["trained_rows"] == 640
    assert result["passes"] == pytest.approx(640 / (48 * (WORDS - 2)), rel=0.2)
    assert result["run_file"] == f"{run.store.runs}/language/run.yaml"
    assert {"dist_sae", "torch"} <= result["versions"].keys()
    assert "thread" in result["hardware"] or torch.cuda.is_available()
    assert result["evaluate_seconds"] > 0
