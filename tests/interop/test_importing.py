"""Dictionaries imported from other libraries, against fp64 forward passes by hand."""

import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from numpy.typing import NDArray

from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.checkpoint.trained import read_trained
from dist_sae.commands.cli import main
from dist_sae.config import Run, load_run
from dist_sae.data.work_queue import Worker
from dist_sae.errors import ConfigError
from dist_sae.interop.foreign import read_dictionary, sae_section
from dist_sae.interop.importing import convert, import_dictionary
from dist_sae.producing.loop import produce
from dist_sae.producing.planner import plan
from dist_sae.storage import open_store
from dist_sae.telemetry.exporter import Telemetry
from tests.interop.test_export import dense, forward
from tests.runs import TINY, write_run

D, N, K, SCALE = 8, 24, 3, 0.37
Arrays = dict[str, NDArray[np.float32]]


def arrays(*, unit: bool, **more: tuple[int, ...]) -> Arrays:
    chance = np.random.default_rng(0)
    shapes = {"W_enc": (D, N), "W_dec": (N, D), "b_enc": (N,), "b_dec": (D,), **more}
    found = {name: chance.standard_normal(shape) for name, shape in shapes.items()}
    if unit:
        found["W_dec"] /= np.linalg.norm(found["W_dec"], axis=1, keepdims=True)
    if "threshold" in found:
        found["threshold"] = np.abs(found["threshold"])
    return {name: array.astype(np.float32) for name, array in found.items()}


def sae_lens(folder: Path, architecture: str, *, centred: bool, unit: bool, **config: Any) -> Path:
    of_kind: dict[str, tuple[int, ...]] = {}
    if architecture == "jumprelu":
        of_kind = {"threshold": (N,)}
    if architecture == "gated":
        of_kind = dict.fromkeys(("b_gate", "b_mag", "r_mag"), (N,))
    found = arrays(unit=unit, **of_kind)
    if architecture == "gated":
        del found["b_enc"]
    safetensors.numpy.save_file(found, folder / "sae_weights.safetensors")
    content = {
        "architecture": architecture,
        "apply_b_dec_to_input": centred,
        "normalize_activations": "none",
        **({"k": K} if architecture == "topk" else {}),
        **config,
    }
    (folder / "cfg.json").write_text(json.dumps(content))
    return folder


def ours(folder: Path, tmp_path: Path, x: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the latents' contributions and the reconstruction of raw activations."""
    found, run = read_dictionary(folder), load_run(write_run(tmp_path))
    run = Run.model_validate(run.model_dump() | {"sae": sae_section(found, run, folder)})
    dictionary = convert(run, found, [SCALE], [SCALE]).double()
    rows = SCALE * torch.from_numpy(x)
    codes = dictionary.encode(rows)
    norms = dictionary.W_dec.detach().norm(dim=1).numpy()
    x_hat = dictionary.decode(codes, rows).detach().numpy() / SCALE
    return dense(codes, N) * norms / SCALE, x_hat


def raw_rows() -> NDArray[np.float64]:
    return 5 * np.random.default_rng(1).standard_normal((400, D))


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu", "gated"])
def test_a_dictionary_of_saelens_gives_the_same_latents(
    tmp_path: Path, architecture: str, *, centred: bool, unit: bool
) -> None:
    centred = centred and architecture != "gated"
    folder = sae_lens(tmp_path, architecture, centred=centred, unit=unit)
    x = raw_rows()
    features, x_hat = forward(folder, x)
    norms = np.linalg.norm(
        safetensors.numpy.load_file(folder / "sae_weights.safetensors")["W_dec"], axis=1
    )
    found, found_x_hat = ours(folder, tmp_path, x)
    assert np.array_equal(found > 0, features > 0)
    assert 0 < (found > 0).mean() < 1
    np.testing.assert_allclose(found, features * norms, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(found_x_hat, x_hat, rtol=2e-5, atol=2e-5)


def test_a_gated_dictionary_of_saelens_may_be_centred(tmp_path: Path) -> None:
    folder = sae_lens(tmp_path, "gated", centred=True, unit=True)
    x = raw_rows()
    w = safetensors.numpy.load_file(folder / "sae_weights.safetensors")
    pi = (x - w["b_dec"]) @ w["W_enc"].astype(np.float64)
    f = (pi + w["b_gate"] > 0) * np.maximum(np.exp(w["r_mag"]) * pi + w["b_mag"], 0)
    found, _ = ours(folder, tmp_path, x)
    np.testing.assert_allclose(found, f, rtol=2e-5, atol=2e-5)


def test_saelens_may_select_by_the_length_of_a_contribution(tmp_path: Path) -> None:
    """SAELens's option to select by code times decoder norm is supported.

    Its selected code is z |d|, and its decoder rows are divided by |d|.
    """
    folder = sae_lens(tmp_path, "topk", centred=True, unit=False, rescale_acts_by_decoder_norm=True)
    w = safetensors.numpy.load_file(folder / "sae_weights.safetensors")
    x, norms = raw_rows(), np.linalg.norm(w["W_dec"], axis=1)
    z = ((x - w["b_dec"]) @ w["W_enc"].astype(np.float64) + w["b_enc"]) * norms
    least = np.sort(z, axis=1)[:, -K, None]
    found, _ = ours(folder, tmp_path, x)
    np.testing.assert_allclose(found, np.maximum(z, 0) * (z >= least), rtol=2e-5, atol=2e-5)


def test_a_dictionary_of_sparsify_gives_the_same_latents(tmp_path: Path) -> None:
    w = arrays(unit=True)
    stored = {"encoder.weight": w["W_enc"].T.copy(), "encoder.bias": w["b_enc"]}
    stored |= {name: w[name] for name in ("W_dec", "b_dec")}
    safetensors.numpy.save_file(stored, tmp_path / "sae.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"activation": "topk", "k": K, "d_in": D}))
    x = raw_rows()
    z = (x - w["b_dec"]) @ w["W_enc"].astype(np.float64) + w["b_enc"]
    f = np.maximum(z, 0) * (z >= np.sort(z, axis=1)[:, -K, None])
    found, x_hat = ours(tmp_path, tmp_path, x)
    np.testing.assert_allclose(found, f, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(x_hat, f @ w["W_dec"] + w["b_dec"], rtol=2e-5, atol=2e-5)


def test_a_dictionary_of_gemma_scope_gives_the_same_latents(tmp_path: Path) -> None:
    w = arrays(unit=False, threshold=(N,))
    np.savez(tmp_path / "params.npz", allow_pickle=False, **w)
    x = raw_rows()
    z = x @ w["W_enc"].astype(np.float64) + w["b_enc"]
    f = np.maximum(z, 0) * (z > w["threshold"])
    found, x_hat = ours(tmp_path, tmp_path, x)
    norms = np.linalg.norm(w["W_dec"], axis=1)
    np.testing.assert_allclose(found, f * norms, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(x_hat, f @ w["W_dec"] + w["b_dec"], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "not a dictionary in a known format; known formats: SAELens (cfg.json and"),
        ({"ae.pt": b""}, "contains pickled weights (ae.pt)"),
        ({"cfg.json": b"{", "sae_weights.safetensors": b""}, "cannot be read: Expecting"),
        (
            {"cfg.json": b'{"architecture": "temporal"}', "sae_weights.safetensors": b""},
            "dist_sae has no recipe for architecture temporal",
        ),
        (
            {
                "cfg.json": b'{"normalize_activations": "layer_norm"}',
                "sae_weights.safetensors": b"",
            },
            "normalize_activations is layer_norm, but its scale is not in the file",
        ),
        (
            {"cfg.json": b'{"signed": true, "k": 3}', "sae.safetensors": b""},
            "dist_sae has no recipe for sparsify's signed latents",
        ),
        (
            {"cfg.json": b'{"apply_b_dec_to_input": true}', "sae_weights.safetensors": b"x"},
            "cannot be read: ",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_dictionary(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"b_dec": np.zeros(D + 1)},
            f"b_dec has shape [{D + 1}], but W_dec's shape requires [{D}]",
        ),
        (
            {"W_enc": np.zeros((N, D))},
            f"W_enc has shape [{D}, {N}], but W_dec's shape requires [{N}, {D}]",
        ),
        ({"b_enc": np.full(N, np.nan)}, "b_enc contains non-finite values"),
        ({"W_skip": np.zeros((D, D))}, "has W_skip, which jumprelu does not have"),
        ({"threshold": None}, "cannot be read: 'threshold' is missing"),
        ({"scaling_factor": np.full(1, 2.0)}, "scaling_factor is not 1"),
        ({"b_enc": np.array([{}])}, "cannot be read: Object arrays cannot be loaded"),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    w: dict[str, Any] = {**arrays(unit=True, threshold=(N,)), **change}
    np.savez(tmp_path / "params.npz", **{k: v for k, v in w.items() if v is not None})
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_dictionary(tmp_path)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with a produced activation set of width 8, and no checkpoint."""
    run = load_run(write_run(tmp_path, TINY))
    plan(run)
    produce(run, Worker("p"), threading.Event(), Telemetry(run.name, "produce", None))
    return run


def test_an_imported_dictionary_is_a_run(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """An imported dictionary can be evaluated and trained further in another run.

    It cannot be trained in its own run.
    """
    folder = sae_lens(tmp_path, "topk", centred=True, unit=True)
    place = str(tmp_path / "run.yaml")
    assert main(["import", str(folder), "--as", place, "--set", "name=other"]) == 0
    other = f"{run.store.runs}/other"
    trained = read_trained(open_store(run.store.runs), load_run(f"{other}/run.yaml"))
    assert trained
    assert (trained.step, trained.run.sae.n_latents) == (0, N)
    x = raw_rows()
    scale = trained.normalisers.by_site[run.site].scale
    rows = scale * torch.from_numpy(x).float()
    x_hat = trained.sae.decode(trained.sae.encode(rows), rows).detach().numpy() / scale
    np.testing.assert_allclose(x_hat, forward(folder, x)[1], rtol=1e-3, atol=1e-3)
    assert main(["evaluate", other, "--set", "processes.device=cpu"]) == 0
    assert json.loads(Path(other, "evaluation.json").read_text())["rows"] > 0
    assert main(["import", str(folder), "--as", place, "--set", "name=other"]) == 2
    assert main(["train", other]) == 2
    said = capsys.readouterr().err
    assert f"{other}: already has checkpoints; choose another name" in said
    assert f"{other}: contains an imported dictionary; to train it further, use `--set" in said
    more = ["--from", "other", "--set", "name=third", "--set", "sae.dead_after_rows=64"]
    assert main(["train", other, *more]) == 0
    steps = Checkpoints(open_store(run.store.runs), "third", 1).steps()
    assert steps


def test_rows_of_several_lengths_are_those_of_the_checkpoint(tmp_path: Path, run: Run) -> None:
    """Importing decoder rows of unequal length into `topk`, which needs unit rows, keeps x_hat."""
    folder = sae_lens(tmp_path, "topk", centred=True, unit=False)
    import_dictionary(folder, run)
    trained = read_trained(open_store(run.store.runs), load_run(f"{run.store.runs}/tiny/run.yaml"))
    assert trained
    x, scale = raw_rows(), trained.normalisers.by_site[run.site].scale
    rows = scale * torch.from_numpy(x)
    sae = trained.sae.double()
    x_hat = sae.decode(sae.encode(rows), rows).detach().numpy() / scale
    np.testing.assert_allclose(x_hat, forward(folder, x)[1], rtol=1e-4, atol=1e-4)


def test_a_dictionary_of_another_width_is_refused(tmp_path: Path, run: Run) -> None:
    w = arrays(unit=True, threshold=(N,))
    w |= {"W_enc": w["W_enc"][1:], "W_dec": w["W_dec"][:, 1:], "b_dec": w["b_dec"][1:]}
    np.savez(tmp_path / "params.npz", allow_pickle=False, **w)
    message = (
        f"reads vectors of width {D - 1}, but synthetic has width {D}; name another site or model"
    )
    with pytest.raises(ConfigError, match=message):
        import_dictionary(tmp_path, run)
