"""SCIENCE D8: what is exported is what was trained, read by SAELens's rules.

`forward` is an independent reading of SAELens 6.54.12's TopK, checked against that package on
10,000 rows when it was written; it knows nothing of this project but the two files.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from numpy.typing import NDArray

from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.config import load_run
from dist_sae.errors import ConfigError
from dist_sae.export import export
from dist_sae.sae import build_sae
from dist_sae.storage import open_store
from tests.launch import write_run

SCALE = 0.37
# Keys that SAELens writes itself; without `k` it would silently take 100, without the version it
# would silently drop the metadata.
KEYS = {
    "architecture",
    "d_in",
    "d_sae",
    "k",
    "rescale_acts_by_decoder_norm",
    "dtype",
    "device",
    "apply_b_dec_to_input",
    "normalize_activations",
    "reshape_activations",
    "metadata",
}


def forward(
    folder: Path, x: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(feature activations, reconstruction) of raw activations."""
    config: dict[str, Any] = json.loads((folder / "cfg.json").read_text())
    weights = safetensors.numpy.load_file(folder / "sae_weights.safetensors")
    w = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
    assert config["architecture"] == "topk"
    assert config["normalize_activations"] == "none"
    z = (x - w["b_dec"] * config["apply_b_dec_to_input"]) @ w["W_enc"] + w["b_enc"]
    top = np.argpartition(-z, config["k"] - 1, axis=-1)[:, : config["k"]]
    f = np.zeros_like(z)
    np.put_along_axis(f, top, np.maximum(np.take_along_axis(z, top, -1), 0), -1)
    return f, f @ w["W_dec"] + w["b_dec"]


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    path = write_run(tmp_path)
    generator = torch.Generator().manual_seed(0)
    weights = {
        "W_enc": torch.randn(64, 16, generator=generator),
        "W_dec": torch.nn.functional.normalize(torch.randn(64, 16, generator=generator)),
        "b_enc": torch.randn(64, generator=generator) - 14,  # some rows have fewer than k positive
        "b_dec": torch.randn(16, generator=generator),
    }
    run = load_run(path)
    Checkpoints(open_store(run.store.runs), run.name, 1).save(5, weights, {"scale": SCALE})
    return Path(export(run)), weights


def test_files_have_what_saelens_wants(exported: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = exported
    config = json.loads((folder / "cfg.json").read_text())
    assert config.keys() == KEYS
    assert (config["d_in"], config["d_sae"], config["k"]) == (16, 64, 3)
    assert int(config["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert {"hook_name", "context_size", "prepend_bos", "model_name"} <= config["metadata"].keys()
    weights = safetensors.numpy.load_file(folder / "sae_weights.safetensors")
    assert {name: tensor.shape for name, tensor in weights.items()} == {
        "W_enc": (16, 64),
        "b_enc": (64,),
        "W_dec": (64, 16),
        "b_dec": (16,),
    }
    assert {tensor.dtype for tensor in weights.values()} == {np.dtype(np.float32)}


def test_the_exported_dictionary_is_the_trained_one(
    exported: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """fp64 on both sides of fp32 files: raw x in, the same features and the same raw x_hat out."""
    folder, weights = exported
    x = 5 * torch.randn(2000, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sae = build_sae(load_run(tmp_path / "run.yaml").sae, 16).double()
    sae.load_state_dict(weights)
    codes = sae.encode(x * SCALE)
    ours = torch.zeros(2000, 64).double().scatter(1, codes.latents, codes.acts).numpy()
    features, x_hat = forward(folder, x.numpy())
    assert np.array_equal(ours > 0, features > 0)
    active = (ours > 0).sum(1)
    assert (active.min(), active.max()) == (0, 3)
    np.testing.assert_allclose(features, ours, atol=1e-5)
    np.testing.assert_allclose(x_hat, sae.decode(codes).numpy() / SCALE, atol=1e-5)


@pytest.mark.parametrize(
    ("site", "hook"),
    [
        ("resid_pre.3", "blocks.3.hook_resid_pre"),
        ("resid_post.7", "blocks.7.hook_resid_post"),
        ("attn_z.0", "blocks.0.attn.hook_z"),
    ],
)
def test_hooks_have_the_names_that_users_know(tmp_path: Path, site: str, hook: str) -> None:
    path = write_run(tmp_path, activations={"sites": [site]})
    settings = ["model={kind: huggingface, path: x}", "corpus={kind: files, files: [x.txt]}"]
    run = load_run(path, settings)
    weights = {"W_enc": torch.zeros(64, 16), "W_dec": torch.ones(64, 16) / 4}
    weights |= {"b_enc": torch.zeros(64), "b_dec": torch.zeros(16)}
    Checkpoints(open_store(run.store.runs), run.name, 1).save(5, weights, {"scale": 1.0})
    config = json.loads((Path(export(run)) / "cfg.json").read_text())
    assert config["metadata"]["hook_name"] == hook


def test_exporting_nothing_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run `dist-sae train` first"):
        export(load_run(write_run(tmp_path)))
