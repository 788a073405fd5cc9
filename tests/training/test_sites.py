"""Dictionaries that read and write several sites of a language model, trained by real processes."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.checkpoint.state import load_weights
from dist_sae.checkpoint.trained import normalisers_of
from dist_sae.config import Run, load_run
from dist_sae.data.work_queue import Worker
from dist_sae.dictionaries import build_sae
from dist_sae.producing.loop import produce
from dist_sae.producing.planner import plan
from dist_sae.storage import open_store
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.telemetry.history import read_history
from tests.launch import run as run_program
from tests.launch import train
from tests.models.test_huggingface import save_model
from tests.training.trained import check_close, check_same
from tests.world import open_activation_set

pytestmark = pytest.mark.system

STEPS = 24
KINDS: dict[str, dict[str, Any]] = {
    "transcoder": {"kind": "transcoder", "reads": ["mlp_in.0"], "writes": ["mlp_out.0"]},
    "crosscoder": {"kind": "crosscoder", "reads": ["resid_post.1", "mlp_inner.0", "mlp_out.0"]},
    "clt": {
        "kind": "clt",
        "reads": ["mlp_in.0", "mlp_in.1"],
        "writes": ["mlp_out.0", "mlp_out.1"],
    },
}
"""The sites have 24 and 40 dimensions."""


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run on a tiny Llama with a complete activation set."""
    folder = tmp_path_factory.mktemp("language")
    words = torch.randint(3, 50, (120, 20), generator=torch.Generator().manual_seed(0))
    text = "\n".join(" ".join(f"w{word}" for word in document) for document in words.tolist())
    (folder / "text.txt").write_text(text)
    settings = {
        "name": "world",
        "store": {"activations": str(folder / "a"), "runs": str(folder / "runs")},
        "model": {
            "kind": "huggingface",
            "path": str(save_model(folder / "model", "llama")),
            "dtype": "fp32",
        },
        "corpus": {"kind": "files", "files": [str(folder / "text.txt")], "txt_documents": "line"},
        "activations": {
            "sites": [
                "mlp_in.0",
                "mlp_inner.0",
                "mlp_out.0",
                "resid_post.1",
                "mlp_in.1",
                "mlp_out.1",
            ],
            "streams": 2,
            "unit_rows": 200,
            "context_tokens": 16,
            "heldout_share": 0.2,
            "dtype": "fp32",
            "exclude": {"over_norm": None},
        },
        "sae": {"n_latents": 64, "k": 4, "auxk": 8, "dead_after_rows": 320} | KINDS["crosscoder"],
        "train": {
            "rows": STEPS * 64,
            "batch_rows": 64,
            "lr": 3e-3,
            "products": "fp32",
            "heldout_rows": 100,
            "log_every_steps": 1,
            "save_every_steps": 1000,
        },
    }
    run = Run.model_validate(settings).resolved()
    plan(run)
    produce(run, Worker("p"), threading.Event(), Telemetry("world", "produce", None))
    return settings


def run_file(folder: Path, language: dict[str, Any], kind: str, **train: Any) -> Path:
    store = language["store"] | {"runs": str(folder / "runs")}
    sae = {"n_latents": 64, "k": 4, "auxk": 8, "dead_after_rows": 320} | KINDS[kind]
    settings = language | {"store": store, "sae": sae, "train": language["train"] | train}
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder / "run.yaml"


def final(folder: Path) -> Checkpoint:
    checkpoint = Checkpoints(open_store(str(folder / "runs")), "world", 2).latest()
    assert checkpoint is not None
    return checkpoint


def history(folder: Path) -> list[dict[str, Any]]:
    return read_history(open_store(str(folder / "runs")), "world")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, language: dict[str, Any]) -> dict[str, Path]:
    """An undisturbed run of each kind."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in folders.items():
        train(run_file(folder, language, kind))
    return folders


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_of_several_sites_resumes_bitwise(
    tmp_path: Path, language: dict[str, Any], calm: dict[str, Path], kind: str
) -> None:
    path = run_file(tmp_path, language, kind)
    train(path, stop_at=9)
    assert 9 <= final(tmp_path).step < STEPS
    train(path)
    one, other = final(calm[kind]), final(tmp_path)
    assert one.step == other.step == STEPS
    assert one.scalars == other.scalars
    check_same(one, other)
    measured = [
        [(record["fvu"], record.get("site_fvu")) for record in records if "fvu" in record]
        for records in (history(calm[kind]), history(tmp_path))
    ]
    assert measured[0] == measured[1]


@pytest.mark.parametrize("shards", [1, 2], ids=["replicas", "shards"])
def test_two_ranks_train_on_several_sites_as_one(
    tmp_path: Path, language: dict[str, Any], calm: dict[str, Path], shards: int
) -> None:
    path = run_file(tmp_path, language, "crosscoder")
    train(path, "--set", f"processes.latent_shards={shards}", world=2)
    check_close(final(calm["crosscoder"]), final(tmp_path))
    for here, there in zip(history(calm["crosscoder"]), history(tmp_path), strict=True):
        assert there.get("fvu") == pytest.approx(here.get("fvu"), rel=1e-5)
        assert there.get("site_fvu") == pytest.approx(here.get("site_fvu"), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_held_out_fvu_is_that_of_the_written_sites(calm: dict[str, Path], kind: str) -> None:
    """The expected FVU is computed by hand: each site at its own scale, about its own mean."""
    run, checkpoint = load_run(calm[kind] / "run.yaml"), final(calm[kind])
    normalisers = normalisers_of(run, checkpoint)
    blocks = list(open_activation_set(run).heldout_rows(100))
    of_site = {
        site: torch.cat([block[site] for block in blocks]) * normaliser.scale
        for site, normaliser in normalisers.by_site.items()
    }
    for x in of_site.values():  # the scales were measured on other rows
        assert float(x.square().sum(1).mean()) == pytest.approx(x.shape[1], rel=0.2)
    sae = build_sae(run.sae, normalisers.widths)
    load_weights(sae, checkpoint)
    with torch.no_grad():
        x_hat = sae.infer(torch.cat([of_site[site] for site in run.reads], 1)).x_hat
    target = torch.cat([of_site[site] for site in run.writes], 1)
    mean = torch.cat([normalisers.by_site[site].mean for site in run.writes])
    fvu = (target - x_hat).double().square().sum() / (target - mean).square().sum()
    assert checkpoint.scalars["heldout_fvu"] == pytest.approx(float(fvu), rel=1e-5)


def test_the_fvu_of_each_written_site_is_recorded(calm: dict[str, Path]) -> None:
    """The sites' errors add up to the total. A dictionary that writes one site has no others."""
    run, checkpoint = load_run(calm["crosscoder"] / "run.yaml"), final(calm["crosscoder"])
    variances = {s: n.variance for s, n in normalisers_of(run, checkpoint).by_site.items()}
    for record in history(calm["crosscoder"]):
        if "fvu" in record:
            assert list(record["site_fvu"]) == list(run.writes)
            missed = sum(record["site_fvu"][site] * variances[site] for site in variances)
            assert record["fvu"] == pytest.approx(missed / sum(variances.values()), rel=1e-5)
    assert not any("site_fvu" in record for record in history(calm["transcoder"]))


def test_a_child_has_the_sites_and_the_scales_of_its_parent(
    tmp_path: Path, language: dict[str, Any], calm: dict[str, Path]
) -> None:
    parent = {"run": "world", "data": "restart"}
    path = run_file(tmp_path, language, "transcoder", parent=parent)
    shared = f"store.runs={calm['transcoder'] / 'runs'}"
    train(path, "--set", "name=child", "--set", shared)
    runs, run = open_store(str(calm["transcoder"] / "runs")), load_run(path, ["name=child"])
    child = Checkpoints(runs, "child", 2).latest()
    assert child is not None
    of_child, of_parent = (
        normalisers_of(run, checkpoint) for checkpoint in (child, final(calm["transcoder"]))
    )
    assert of_child.to_scalars() == of_parent.to_scalars()
    turned = ["--set", "sae.reads=[mlp_out.0]", "--set", "sae.writes=[mlp_in.0]"]
    error = run_program("train", str(path), "--set", "name=other", "--set", shared, *turned, code=2)
    assert (
        "sae.reads: mlp_out.0 -> mlp_in.0 cannot start from a dictionary of mlp_in.0 -> mlp_out.0"
    ) in error
