"""An activation set with the sites of two models that read the same text."""

import json
from pathlib import Path

import pytest
import torch

from dist_sae.config import Run
from dist_sae.config.data import HuggingFaceModel, OtherModel
from dist_sae.data.corpus import Corpus
from dist_sae.data.plan import check_model, load_plan
from dist_sae.errors import ModelError, PlanMismatchError
from dist_sae.models import build_source, check_sites
from dist_sae.producing.planner import plan
from dist_sae.storage import open_store
from tests.models.test_huggingface import hf, random_tokens, save_model
from tests.producing.producers import rows_of, start
from tests.runs import make_run

SITES = ("resid_post.0", "resid_post.0@other", "mlp_out.1@other")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of two models with different weights and the same tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    one, two = (save_model(folder / name, "llama") for name in ("one", "two"))
    other = hf.AutoModelForCausalLM.from_pretrained(two)
    for parameter in other.parameters():
        parameter.data *= 1.5
    other.save_pretrained(two)
    return one, two


@pytest.fixture
def both(folders: tuple[Path, Path]) -> HuggingFaceModel:
    one, two = map(str, folders)
    return HuggingFaceModel(path=one, dtype="fp32", other=OtherModel(path=two))


def comparing(folder: Path, model: HuggingFaceModel, **changes: object) -> Run:
    corpus = folder / "corpus.jsonl"
    texts = [" ".join(f"w{(n + i) % 40 + 3}" for i in range(12)) for n in range(60)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    activations = {
        "sites": SITES,
        "dtype": "fp32",
        "context_tokens": 12,
        "streams": 2,
        "unit_rows": 100,
        "exclude": {"over_norm": 1e9},
    }
    return make_run(
        folder,
        model=model.model_dump(mode="json") | changes,
        corpus={"kind": "files", "files": [str(corpus)]},
        activations=activations,
        train={"site": SITES[1], "batch_rows": 8, "rows": 8},
    )


def test_sites_are_of_the_model_that_they_name(both: HuggingFaceModel) -> None:
    tokens, mask = random_tokens(9, 6)
    rows = build_source(both, SITES).run(tokens, mask)
    assert tuple(sorted(rows)) == tuple(sorted(SITES))
    for site in SITES:
        model, name = both.of_site(site)
        alone = build_source(model, (name,)).run(tokens, mask)[name]
        assert torch.equal(rows[site][mask], alone[mask])
    assert not torch.allclose(rows[SITES[0]][mask], rows[SITES[1]][mask])


def test_a_unit_has_the_rows_of_both_models(both: HuggingFaceModel, tmp_path: Path) -> None:
    run = comparing(tmp_path, both)
    made = plan(run)
    start(run, "a")
    store = open_store(run.store.activations)
    unit = made.train_units[0]
    of_site = {site: rows_of(store, unit, site) for site in SITES}
    for site in SITES[1:]:
        assert torch.equal(of_site[site].tokens, of_site[SITES[0]].tokens)
        assert torch.equal(of_site[site].positions, of_site[SITES[0]].positions)
    # rows of the second model equal those of the second model alone on the same document
    model, name = both.of_site(SITES[1])
    found = of_site[SITES[1]]
    row = int((found.positions == 3).nonzero()[0])
    documents = Corpus(run.corpus, run.store.s3).read(made.files, made.units[unit], None)
    (text,) = (d.text for d in documents if d.number == int(found.documents[row]))
    ids = torch.tensor([[0, *(int(word[1:]) for word in text.split()[:11])]], dtype=torch.int32)
    alone = build_source(model, (name,)).run(ids, torch.ones_like(ids, dtype=torch.bool))[name]
    expected = alone[0, 1 + 3]  # position 3 of the text follows BOS
    assert (found.acts[row] - expected).norm() / expected.norm() < 1e-5


def test_another_second_model_is_not_the_plans(
    both: HuggingFaceModel, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    run = comparing(tmp_path, both)
    plan(run)
    made = load_plan(open_store(run.store.activations), run)
    check_model(run, made)
    same = comparing(tmp_path, both, other={"path": str(folders[0])})
    with pytest.raises(PlanMismatchError, match=r"other/model\.safetensors"):
        check_model(same, made)


def test_models_with_other_tokens_are_refused(both: HuggingFaceModel, tmp_path: Path) -> None:
    two = save_model(tmp_path / "two", "llama")
    tokenizer = json.loads((two / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w3"], vocabulary["w4"] = vocabulary["w4"], vocabulary["w3"]
    (two / "tokenizer.json").write_text(json.dumps(tokenizer))
    model = both.model_copy(update={"other": OtherModel(path=str(two))})
    with pytest.raises(ModelError, match="4 tokens differ"):
        check_sites(model, comparing(tmp_path, model).activations)


def test_sites_and_models_go_together(both: HuggingFaceModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"resid_post\.0@other is a site of model\.other"):
        comparing(tmp_path, both, other=None)
    with pytest.raises(ValueError, match=r"model\.other: .* none of its sites"):
        make_run(tmp_path, model=both.model_dump(mode="json"), activations={"sites": ["mlp_in.1"]})
