"""Cross-entropies of masked language models, and of models without a head."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_sae.config import load_run
from dist_sae.config.data import HuggingFaceModel
from dist_sae.config.sae import ReLUConfig, SaeConfig
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.normaliser import Normaliser, SiteNormalisers
from dist_sae.dictionaries.recipes.relu import ReLU
from dist_sae.evaluation.cross_entropy import bootstrap_intervals, cross_entropies
from dist_sae.models.spliced import SplicedModel
from dist_sae.producing.planner import plan
from tests.models.test_huggingface import D, hf, save_model
from tests.producing.test_produce_together import run_file
from tests.world import open_activation_set


def measured(
    folder: Path, path: Path, sae: SaeConfig | None = None, **exclude: Any
) -> tuple[dict[str, Any], HuggingFaceModel]:
    run = load_run(run_file(folder / "run", path))
    rules = run.activations.exclude.model_copy(update=exclude)
    run = run.model_copy(
        update={"activations": run.activations.model_copy(update={"exclude": rules})}
    )
    assert isinstance(run.model, HuggingFaceModel)
    plan(run)
    dictionary = build_sae(sae or run.sae, D)
    normaliser = Normaliser(1.0, torch.zeros(D, dtype=torch.float64), 1.0, 1)
    normalisers = SiteNormalisers(run.reads, run.writes, {run.site: normaliser})
    found = cross_entropies(open_activation_set(run), run, dictionary, normalisers)
    return found, run.model


def test_an_encoders_are_of_masked_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder's cross-entropy is the mean loss over all masked tokens.

    Rows of masked tokens are not replaced, because training never sees them. In this test no latent
    fires, so zero, mean and reconstruction are the same.
    """
    of_passes: list[torch.Tensor] = []
    n_replaced: list[int] = []
    plain = SplicedModel.losses

    def record(
        self: SplicedModel, tokens: torch.Tensor, mask: torch.Tensor, edits: Any
    ) -> torch.Tensor:
        losses = plain(self, tokens, mask, edits)
        (edit,) = edits.values()
        acts = torch.ones(*tokens.shape, D)
        changed = (edit(acts) != acts).any(2)
        shown = mask.clone()
        shown[:, 0] = False  # BOS
        shown[:, 1:] &= losses.isnan()
        n_replaced.append(int(changed.sum()))
        assert torch.equal(changed, shown) or not changed.any()
        of_passes.append(losses[~losses.isnan()])
        return losses

    monkeypatch.setattr(SplicedModel, "losses", record)
    found, _ = measured(tmp_path, save_model(tmp_path / "m", "bert", kind=hf.AutoModelForMaskedLM))
    # three quarters of the passes are without the dictionary: plain, with zeros, with the mean
    first = 3 * len(of_passes) // 4
    clean = of_passes[:first:3]
    assert not any(n_replaced[:first:3])
    assert sum(n_replaced[1:first:3]) == sum(n_replaced[first:]) > 0
    assert found["ce_of"] == "masked tokens"
    assert found["tokens"] == len(torch.cat(clean)) > 0
    assert found["ce_clean"] == pytest.approx(float(torch.cat(clean).double().mean()))
    assert found["ce_zero"] == found["ce_mean"] != found["ce_clean"]


def test_they_are_left_out_of_a_model_without_a_head(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found, model = measured(tmp_path, save_model(tmp_path / "m", "bert"))
    assert found.keys() == {"ce_left_out"}
    assert found["ce_left_out"].startswith(f"model.path {model.path}: its files contain no head")
    assert f"cross-entropies are left out: {found['ce_left_out']}" in caplog.messages


def test_all_active_latents_are_never_held_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation never calls `encode`, since ReLU may activate any number of latents per row."""
    monkeypatch.setattr(ReLU, "encode", None)
    path = save_model(tmp_path / "m", "llama")
    found, _ = measured(tmp_path, path, ReLUConfig(n_latents=32))
    assert found["ce_spliced"] == found["ce_zero"]  # all of the dictionary's parameters are zero


def test_they_are_left_out_where_ablation_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Cross-entropies are left out if ablation replaces no row, e.g. if all rows are excluded."""
    found, _ = measured(tmp_path, save_model(tmp_path / "m", "llama"), over_norm=1e-9)
    assert found.keys() == {"ce_left_out"}
    assert "changes no prediction" in found["ce_left_out"]
    assert f"cross-entropies are left out: {found['ce_left_out']}" in caplog.messages


def test_intervals_are_of_the_draws_that_have_a_share() -> None:
    """Bootstrap draws without an ablation effect are skipped.

    Ablation changes one of three documents, and 8 of 27 draws lack that document.
    """
    clean = torch.tensor([1.1, 2.3, 3.7])
    harms = {"clean": 0.0, "spliced": 1.0, "zero": 4.0, "mean": 2.0}
    sums = {name: (clean + torch.tensor([0.0, 0.0, x])).tolist() for name, x in harms.items()}
    found = bootstrap_intervals(sums, torch.tensor([3, 5, 7]), torch.tensor([4, 8, 9]))
    assert found["ce_recovered"] == pytest.approx([0.75, 0.75])
    assert found["ce_recovered_mean"] == pytest.approx([0.5, 0.5])
    assert found["ce_clean"][0] < found["ce_clean"][1]
