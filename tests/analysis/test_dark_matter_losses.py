"""Rises of the cross-entropy due to the parts of an error, on a tiny language model."""

from pathlib import Path

import pytest
import torch

from dist_sae.analysis.dark_matter import study
from dist_sae.analysis.dark_matter_findings import findings
from dist_sae.config import Run
from dist_sae.evaluation.evaluate import evaluate
from tests.index.indexed import make_index
from tests.notebook.raw import initialised, language_run, save_dictionary, save_language_model

pytestmark = pytest.mark.system

D = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("losses")
    run = language_run(folder, save_language_model(folder / "model"))
    sae = initialised(run, D, seed=3)
    save_dictionary(run, sae, 7)
    make_index(run)
    return run


def test_the_rise_of_the_loss_is_shared_out(run: Run) -> None:
    """The total rise matches `evaluate`, and a linear error has no nonlinear part."""
    whole = evaluate(run)
    own = study(run, 300)
    rises = own.losses
    assert rises["whole"] == pytest.approx(whole["ce_spliced"] - whole["ce_clean"], abs=1e-9)
    assert rises["tokens"] == whole["tokens"]
    assert rises["nonlinear"] != pytest.approx(rises["linear"], abs=1e-3)
    numbers = findings([own]).numbers["runs"]["language"]
    assert numbers["ce_rise_nonlinear"] == rises["nonlinear"]
    assert numbers["fvu"] == pytest.approx(whole["fvu"], rel=1e-6)

    shrunk = initialised(run, D, seed=3)
    shrunk.W_dec.data.zero_()  # x_hat is a constant, so e = b_dec - x
    other = run.model_copy(update={"name": "constant"})
    save_dictionary(other, shrunk, 7)
    make_index(other)
    linear = study(other, 300)
    assert linear.parts.numbers["error_r2"] == pytest.approx(1, abs=1e-4)
    assert abs(linear.losses["nonlinear"]) < 1e-3
    assert linear.losses["linear"] == pytest.approx(linear.losses["whole"], abs=1e-3)
    assert abs(linear.losses["whole"]) > 1e-2


def test_losses_are_left_out_where_the_model_is_gone(run: Run) -> None:
    model = Path(run.model.path)  # type: ignore[union-attr]
    model.rename(model.with_name("away"))
    try:
        own = study(run, 300)
    finally:
        model.with_name("away").rename(model)
    assert own.losses == {}
    (line,) = own.left_out
    assert line.startswith("no cross-entropies: ")
    assert torch.isfinite(own.parts.norms).all()
    assert f"language: {line}." in findings([own]).caveats
    assert study(run, 300, losses=False).left_out == ()
