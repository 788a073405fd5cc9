"""`dist-sae analyse dark-matter` on small indexed worlds whose features are known."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_sae import logs
from dist_sae.analysis.dark_matter import study
from dist_sae.analysis.dark_matter_findings import WRONG_RECAPTURE, findings, is_at_chance
from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.checkpoint.run_folder import run_file_key
from dist_sae.commands import cli
from dist_sae.config import Run, dump_run
from dist_sae.data.plan import load_plan
from dist_sae.dictionaries import build_sae
from dist_sae.errors import ConfigError
from dist_sae.models.synthetic import SyntheticSource
from dist_sae.report.outcome import read_outcome_table, read_outcomes
from dist_sae.storage import open_store
from tests.index.indexed import make_index, produced
from tests.world import save

D, FEATURES, K = 64, 384, 4
MODEL = {"d_in": D, "n_features": FEATURES, "l0": 4, "zipf": 1.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with 6,400 rows of 384 Zipf features in 64 dimensions, and no checkpoint."""
    return produced(
        tmp_path_factory.mktemp("dark"),
        model=MODEL,
        corpus={"documents": 200},
        sae={"kind": "topk", "n_latents": 96, "k": K, "auxk": 7},
        evaluate={"rows": 700},
    )


def source(run: Run) -> SyntheticSource:
    return SyntheticSource(run.model)  # type: ignore[arg-type]


def indexed(world: Run, name: str, directions: torch.Tensor) -> Run:
    """Return an indexed run whose dictionary has these directions as encoder and decoder."""
    sae_config = world.sae.model_copy(update={"n_latents": len(directions)})
    run = world.model_copy(update={"name": name, "sae": sae_config})
    sae = build_sae(run.sae, D)
    sae.W_enc.data.copy_(directions)
    sae.W_dec.data.copy_(directions)
    bias = source(world).bias
    sae.b_dec.data.copy_(bias)
    p = source(world).probabilities
    mean = p @ source(world).directions + bias
    scalars = {
        "run": run.model_dump(mode="json"),
        "plan": load_plan(open_store(run.store.activations), run).hash,
        "scale": 1.0,
        "mean": mean.tolist(),
        "variance": 1.0,
        "rows": 1,
    }
    tensors = {name: tensor.detach() for name, tensor in sae.tensors()}
    tensors["idle_rows"] = torch.zeros(len(directions), dtype=torch.int64)
    runs = open_store(run.store.runs)
    save(Checkpoints(runs, run.name, 9), 3, tensors, scalars)
    runs.put(run_file_key(run.name), dump_run(run).encode())
    make_index(run)
    return run


@pytest.fixture(scope="module")
def ideal(world: Run) -> list[Run]:
    """Dictionaries of the 96 and of the 192 most frequent features."""
    directions = source(world).directions
    return [indexed(world, f"ideal{n}", directions[:n]) for n in (96, 192)]


@pytest.fixture(scope="module")
def random(world: Run) -> Run:
    """A dictionary of random directions, unrelated to the features."""
    rows = torch.randn(96, D, generator=torch.Generator().manual_seed(11))
    return indexed(world, "random", torch.nn.functional.normalize(rows, dim=1))


def true_tail(run: Run, n: int) -> float:
    p = source(run).probabilities.double()
    variances = p * (1 + 0.25**2) - p**2
    return float(variances[n:].sum() / variances.sum())


def analyse(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """Run the command and return stdout, or stderr if a failure is expected."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "configure", lambda **_: None)
        assert cli.main(["analyse", "dark-matter", *arguments]) == code
    said = capsys.readouterr()
    return said.err if code else said.out


def folder(run: Run) -> str:
    return f"{run.store.runs}/{run.name}"


@pytest.mark.system
def test_two_widths_of_a_known_world(ideal: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    """The intervals contain the planted tail and floor, and the FVU exceeds the tail."""
    said = analyse(capsys, *map(folder, ideal), "--json")
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    for run in ideal:
        own = found["runs"][run.name]
        value, low, high = own["tail"]
        assert low <= true_tail(run, run.sae.n_latents) <= high
        assert high - low < 0.25
        assert own["pursued_fvu"] > value + 0.05
        assert own["interference"] == pytest.approx(own["pursued_fvu"] - value)
        assert own["alive"] == run.sae.n_latents
        assert not own["nothing"]
        assert own["fit_rows"] == 50 * D
    (check,) = found["checks"]
    assert (check["from"], check["to"], check["verdict"]) == (["ideal96"], "ideal192", "within")
    assert check["predicted"][1] <= true_tail(ideal[1], 192) <= check["predicted"][2]
    (same,) = found["error_norm_correlations"]
    assert same["correlation"] > 0.3
    runs = open_store(ideal[0].store.runs)
    (outcome,) = read_outcomes(runs, ideal[0].name)
    assert outcome.what == "dark-matter"
    assert len(outcome.figures) == 3
    ranks = read_outcome_table(runs, outcome, "ranks")
    assert set(ranks["run"].to_pylist()) == {"ideal96", "ideal192"}
    assert "FVU alone is not the tail" in Path(found["page"]).read_text()


@pytest.mark.system
def test_pages_give_the_same_numbers(ideal: list[Run]) -> None:
    """Results do not change if memory holds only a fraction of the dictionary."""
    run = ideal[1]
    little = run.evaluate.model_copy(update={"memory_bytes": 4 * 2 * 192 * D})
    whole, paged = (
        findings([study(each, losses=False)]).numbers["runs"]["ideal192"]
        for each in (run, run.model_copy(update={"evaluate": little}))
    )
    for name in ("fvu", "error_r2", "norm_r2", "fvu_nonlinear", "interference", "pursued_l0"):
        assert paged[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6)
    assert paged["tail"] == pytest.approx(whole["tail"], rel=1e-4)


@pytest.mark.system
def test_a_random_dictionary_is_nothing(ideal: list[Run], random: Run) -> None:
    one = study(random, losses=False)
    assert is_at_chance(one)
    found = findings([one, study(ideal[0], losses=False)])
    assert found.summary[0].startswith("random (96 of 96 latents alive): nothing found.")
    assert "floors" not in found.numbers["runs"]["random"]
    assert found.numbers["checks"] == []


@pytest.mark.system
def test_two_dictionaries_are_compared_by_frequency(
    ideal: list[Run], random: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = indexed(ideal[0], "twin", source(ideal[0]).directions[:96].flip(0))
    said = analyse(capsys, folder(ideal[0]), folder(twin), "--no-losses")
    assert "100 % of 96 alive latents of the first have a partner" in said
    assert "Disagreement among rare latents is expected" in said
    assert "ALARM" not in said
    assert f"{WRONG_RECAPTURE} It would give 96 here." in said
    said = analyse(capsys, folder(ideal[0]), folder(random), "--no-losses")
    assert "ideal96 and random: nothing in common; no latent has a partner." in said


def test_mistakes_are_one_line(
    world: Run, ideal: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    said = analyse(capsys, folder(ideal[0]), "--rows", "639", code=2)
    assert said == (
        "error: ideal96: only 639 rows to fit to; 64 input dimensions need at least 640 (10 each), "
        "better 3200\n"
    )
    assert "--rows: is 0" in analyse(capsys, folder(ideal[0]), "--rows", "0", code=2)
    twice = analyse(capsys, folder(ideal[0]), folder(ideal[0]), code=2)
    assert twice == "error: ideal96: is named twice; runs must have different names\n"
    bare = world.model_copy(update={"name": "bare"})
    with pytest.raises(ConfigError, match="bare: has no checkpoint yet"):
        study(bare)
