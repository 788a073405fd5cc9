"""Export for Neuronpedia: the columns of its tables, and the exported dictionary's numbers.

`TABLES` is an independent transcription of its database's schema (November 2026). Its import reads
lines of features, activations and explanations with the columns that the first line names, and
inserts the other tables' objects as they are. So a single unknown column is an error.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import transformers

from dist_sae.commands.cli import main
from dist_sae.config import Run, load_run
from dist_sae.errors import ConfigError
from dist_sae.explaining.explain import ExplainPlan
from dist_sae.explaining.scoring import Verdict
from dist_sae.explaining.stored import ExplanationSet, LatentExplanation
from dist_sae.index.query import Index
from dist_sae.interop import neuronpedia
from dist_sae.interop.export import export
from dist_sae.interop.neuronpedia import export_pages
from dist_sae.storage import open_store
from tests.explaining.words import FIRES_ON, documents, number, words_run
from tests.index.indexed import make_index
from tests.interop.test_export import HF
from tests.runs import write_run

pytestmark = pytest.mark.system

TABLES: dict[str, dict[str, tuple[type, bool]]] = {
    "features": {
        **dict.fromkeys(("modelId", "layer", "index"), (str, True)),
        **dict.fromkeys(("sourceSetName", "creatorId", "hookName"), (str, False)),
        **dict.fromkeys(("maxActApprox", "frac_nonzero"), (float, False)),
        **dict.fromkeys(
            (
                *("topkCosSimIndices", "topkCosSimValues", "neg_str", "neg_values", "pos_str"),
                *("pos_values", "freq_hist_data_bar_heights", "freq_hist_data_bar_values"),
            ),
            (list, False),
        ),
    },
    "activations": {
        **dict.fromkeys(("id", "index", "layer", "modelId", "creatorId"), (str, True)),
        **dict.fromkeys(("tokens", "values"), (list, True)),
        **dict.fromkeys(("maxValue", "minValue"), (float, True)),
        "maxValueTokenIndex": (int, True),
        **dict.fromkeys(("binMin", "binMax", "binContains"), (float, False)),
        "qualifyingTokenIndex": (int, False),
    },
    "explanations": {
        **dict.fromkeys(
            ("id", "modelId", "layer", "index", "description", "authorId"), (str, True)
        ),
        "notes": (str, False),
    },
    "release": {
        **dict.fromkeys(("name", "description", "creatorName", "creatorId"), (str, True)),
        "visibility": (str, False),
    },
    "model": {
        **dict.fromkeys(("id", "creatorId", "owner"), (str, True)),
        **dict.fromkeys(("layers", "neuronsPerLayer"), (int, True)),
        **dict.fromkeys(("displayName", "displayNameShort", "visibility"), (str, False)),
    },
    "sourceset": {
        **dict.fromkeys(
            ("modelId", "name", "description", "creatorName", "creatorId"), (str, True)
        ),
        "urls": (list, True),
        **dict.fromkeys(("releaseName", "visibility"), (str, False)),
    },
    "source": {
        **dict.fromkeys(("id", "modelId", "setName", "creatorId"), (str, True)),
        **dict.fromkeys(("dataset", "notes", "visibility"), (str, False)),
        "num_tokens_in_prompt": (int, False),
    },
}
"""Each column's type, and whether it is required because it has no default."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return words_run(tmp_path_factory.mktemp("words"), examples=8, decile_examples=1)


def command(run: Run, *more: str) -> list[str]:
    return ["export", f"{run.store.runs}/{run.name}", "--format", "neuronpedia", *more]


@pytest.fixture(scope="module")
def folder(run: Run) -> Path:
    assert main(command(run, "--set", "export.model_name=Some/Tiny Model")) == 0
    return Path(run.store.runs, "words/export-neuronpedia/tiny-model/0-words")


def lines(folder: Path, table: str) -> list[dict[str, Any]]:
    single = folder / f"{table}.jsonl"
    if single.exists():
        return [json.loads(line) for line in single.read_text().splitlines()]
    files = sorted(folder.glob(f"{table}/batch-*.jsonl.gz"))
    texts = [gzip.decompress(file.read_bytes()).decode() for file in files]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def explain(run: Run) -> None:
    index = Index(open_store(run.store.runs), run.name)
    verdicts = [Verdict("active", 3, yes=True), Verdict("random", None, yes=False)]
    told = LatentExplanation(1, "the word wbe", "", verdicts)
    ExplanationSet(index, "mine").add(ExplainPlan().settings_for(index, "m", "m"), [told])


def test_objects_have_columns_of_the_tables_and_all_that_have_no_default(
    run: Run, folder: Path
) -> None:
    explain(run)
    assert main(command(run, "--set", "export.model_name=Some/Tiny Model")) == 0
    for table, columns in TABLES.items():
        rows = lines(folder, table)
        assert rows, table
        for row in rows:
            assert row.keys() == rows[0].keys()
            assert row.keys() <= columns.keys(), table
            assert {name for name, (_, needed) in columns.items() if needed} <= row.keys(), table
            for name, value in row.items():
                kinds = (int, float) if columns[name][0] is float else columns[name][0]
                assert isinstance(value, kinds), (table, name)
    (told,) = lines(folder, "explanations")
    assert (told["index"], told["description"]) == ("1", "the word wbe")
    assert told["notes"].startswith("mine; detection 1.00 (")


def test_ids_lead_from_one_table_to_the_next(folder: Path) -> None:
    (model,), (source,), (source_set,), (release,) = (
        lines(folder, table) for table in ("model", "source", "sourceset", "release")
    )
    assert (model["id"], model["owner"]) == ("tiny-model", "Some")
    assert (source["id"], source["setName"]) == ("0-words", source_set["name"])
    assert source_set["releaseName"] == release["name"]
    features, activations = lines(folder, "features"), lines(folder, "activations")
    firing = [str(latent) for latent, on in enumerate(FIRES_ON) if on]
    assert [row["index"] for row in features] == firing
    assert {row["index"] for row in activations} == set(firing)
    for row in (*features, *activations):
        assert (row["modelId"], row["layer"]) == ("tiny-model", "0-words")
    assert {row["sourceSetName"] for row in features} == {source_set["name"]}
    assert {row["hookName"] for row in features} == {"blocks.0.hook_resid_pre"}
    assert len({row["id"] for row in activations}) == len(activations)


def test_numbers_are_those_of_the_exported_dictionary(run: Run, folder: Path) -> None:
    """Exported numbers match those computed from the dictionary and the model.

    The site is the embeddings, and word n's embedding is the n-th unit vector.
    """
    weights = safetensors.numpy.load_file(Path(export(run)) / "sae_weights.safetensors")
    codes = np.maximum(weights["W_enc"] + weights["b_enc"], 0)  # for each word, [words, latents]
    hf: Any = transformers
    model = hf.AutoModelForCausalLM.from_pretrained(run.model.path)  # type: ignore[union-attr]
    gain = model.model.norm.weight.detach().numpy()
    logits = weights["W_dec"] * gain @ model.lm_head.weight.detach().numpy().T
    logits -= logits.mean(1, keepdims=True)
    flat = np.array(documents()).ravel()
    for feature in lines(folder, "features"):
        latent = int(feature["index"])
        acts = codes[flat, latent]
        assert feature["frac_nonzero"] == pytest.approx(np.mean(acts > 0))
        assert feature["maxActApprox"] == pytest.approx(acts.max(), rel=1e-3)
        assert sum(feature["freq_hist_data_bar_heights"]) == np.sum(acts > 0)
        assert feature["freq_hist_data_bar_values"][-1] == pytest.approx(
            acts.max() * 31 / 32, rel=1e-3
        )
        ordered = np.sort(logits[latent])
        np.testing.assert_allclose(feature["pos_values"], ordered[::-1][:10], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(feature["neg_values"], ordered[:10], rtol=1e-4, atol=1e-5)
        for text, value in zip(feature["pos_str"], feature["pos_values"], strict=True):
            if text.startswith(" w"):
                assert logits[latent, number(text)] == pytest.approx(value, rel=1e-4, abs=1e-5)
    for row in lines(folder, "activations"):
        expected = codes[list(map(number, row["tokens"])), int(row["index"])]
        np.testing.assert_allclose(row["values"], expected, rtol=1e-3)
        assert row["maxValue"] == max(row["values"]) == row["values"][row["maxValueTokenIndex"]]
        assert row["minValue"] == min(row["values"])
        if row["binContains"] == -1:
            assert row["binMin"] == -1
        else:
            assert row["binContains"] == 0.1
            value = row["values"][row["qualifyingTokenIndex"]]
            assert row["binMin"] <= value * 1.001
            assert value <= row["binMax"] * 1.001


def test_pages_are_written_once_and_old_ones_do_not_stay(run: Run, folder: Path) -> None:
    pages = folder / "features/batch-0.jsonl.gz"
    pages.write_bytes(b"mine")
    more = folder / "features/batch-7.jsonl.gz"
    more.write_bytes(b"of a wider dictionary")
    again = command(run, "--set", "export.model_name=Some/Tiny Model")
    assert main(again) == 0
    assert pages.read_bytes() == b"mine"
    (folder / "source.jsonl").unlink()
    assert main(again) == 0
    assert lines(folder, "features")
    assert not more.exists()


def test_a_wide_dictionary_has_no_more_files_than_the_import_lists(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of files stays within what Neuronpedia's import lists.

    Five latents fire. With a limit of two files, one gets three and the other two.
    """
    monkeypatch.setattr(neuronpedia, "LATENTS", 1)
    monkeypatch.setattr(neuronpedia, "MOST_BATCHES", 2)
    assert main(command(run, "--set", "export.neuronpedia.model=wide")) == 0
    folder = Path(run.store.runs, "words/export-neuronpedia/wide/0-words")
    for kind in ("features", "activations"):
        assert {file.name for file in (folder / kind).iterdir()} == {
            "batch-0.jsonl.gz",
            "batch-1.jsonl.gz",
        }
    assert [row["index"] for row in lines(folder, "features")] == ["0", "1", "2", "3", "5"]


SITES = ["mlp_in.3", "mlp_out.3"]
BOTH = {"kind": "transcoder", "selection": "batch", "reads": SITES, "writes": SITES[1:]}


def test_what_neuronpedia_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.kind: synthetic: Neuronpedia supports") as no:
        export_pages(load_run(write_run(tmp_path)))
    assert "\n" not in str(no.value)
    path = write_run(
        tmp_path, sae=BOTH | {"n_latents": 64, "k": 3, "auxk": 16}, activations={"sites": SITES}
    )
    with pytest.raises(ConfigError, match=r"Neuronpedia supports only latents of one layer$") as no:
        export_pages(load_run(path, HF))
    assert "\n" not in str(no.value)
    with pytest.raises(ConfigError, match=r"export\.neuronpedia\.model: "):
        load_run(path, [*HF, "export.neuronpedia.model=A B"])


def test_a_share_of_the_postings_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"postings": 0.5, "name": "half"}
    make_index(run.model_copy(update={"index": run.index.model_copy(update=settings)}))
    assert main(command(run)) == 2
    assert "has only a share of the postings (index.postings), and Neuronpedia" in (
        capsys.readouterr().err
    )
