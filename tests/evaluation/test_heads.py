"""Cross-entropies of models whose head predicts masked tokens, and of those without one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_sae.config import load_run
from dist_sae.config.data import HuggingFaceModel
from dist_sae.evaluation.cross_entropy import cross_entropies
from dist_sae.models.spliced import SplicedModel
from dist_sae.plan import plan
from dist_sae.sae import build_sae
from tests.models.test_huggingface import D, hf, save_model
from tests.test_produce_together import run_file
from tests.world import open_units


def measured(folder: Path, path: Path) -> tuple[dict[str, Any], HuggingFaceModel]:
    run = load_run(run_file(folder / "run", path))
    assert isinstance(run.model, HuggingFaceModel)
    sae = build_sae(run.sae, D)
    plan(run)
    return cross_entropies(open_units(run), run, sae, 1.0, torch.zeros(D)), run.model


def test_an_encoders_are_of_masked_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of every predicted token's loss; zero is also the mean here, and no latent fires."""
    losses: list[torch.Tensor] = []
    plain = SplicedModel.losses

    def record(self: SplicedModel, *arguments: Any) -> torch.Tensor:
        losses.append(plain(self, *arguments))
        return losses[-1]

    monkeypatch.setattr(SplicedModel, "losses", record)
    found, _ = measured(tmp_path, save_model(tmp_path / "m", "bert", kind=hf.AutoModelForMaskedLM))
    clean = torch.cat([of_batch[~of_batch.isnan()] for of_batch in losses[: len(losses) // 4]])
    assert found["ce_of"] == "masked tokens"
    assert found["tokens"] == len(clean) > 0
    assert found["ce_clean"] == pytest.approx(float(clean.double().mean()))
    assert found["ce_zero"] == found["ce_mean"] != found["ce_clean"]


def test_they_are_left_out_of_a_model_without_a_head(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found, model = measured(tmp_path, save_model(tmp_path / "m", "bert"))
    assert found.keys() == {"ce_left_out"}
    assert found["ce_left_out"].startswith(f"model.path {model.path}: its files have no head")
    assert f"cross-entropies are left out: {found['ce_left_out']}" in caplog.messages
