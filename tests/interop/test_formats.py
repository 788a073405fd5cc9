"""Exports to other formats equal the trained dictionary, and can be imported again.

Each oracle is an independent fp64 implementation of a library's forward pass that uses only the
exported files: eai-sparsify 1.3.3, dictionary-learning 0.1.0 and circuit-tracer 0.5.0. The oracles
were compared with the packages' own classes on 100,000 rows when they were written:
docs/interop.md.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import yaml
from numpy.typing import NDArray

from dist_sae.checkpoint import piecewise
from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.checkpoint.state import IDLE_ROWS
from dist_sae.config import Run, load_run
from dist_sae.config.fingerprint import run_fingerprint
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.interface import Widths
from dist_sae.dictionaries.normaliser import Normaliser, SiteNormalisers
from dist_sae.errors import ConfigError
from dist_sae.interop import raw
from dist_sae.interop.export import export
from dist_sae.interop.foreign import read_dictionary, sae_section
from dist_sae.interop.importing import convert
from dist_sae.storage import open_store
from tests.dictionaries.recipes import UNIT_ROWS
from tests.interop.test_export import HF, dense
from tests.runs import write_run
from tests.world import save

D, N = 6, 32
Rows = NDArray[np.float64]
Oracle = Callable[[Path, Rows], tuple[Rows, Rows]]
MLP = {"reads": ["mlp_in.0"], "writes": ["mlp_out.0"]}
LAYERS = {"reads": ["mlp_in.0", "mlp_in.1"], "writes": ["mlp_out.0", "mlp_out.1"]}
SCALES = {"mlp_in.0": 0.4, "mlp_in.1": 3.0, "mlp_out.0": 1.7, "mlp_out.1": 0.6}


def arrays(file: Path) -> dict[str, Rows]:
    return {n: t.astype(np.float64) for n, t in safetensors.numpy.load_file(file).items()}


def largest(z: Rows, k: int) -> Rows:
    return np.maximum(z, 0) * (z >= np.sort(z, axis=1)[:, -k, None])


def sparsify(folder: Path, x: Rows) -> tuple[Rows, Rows]:
    config, w = json.loads((folder / "cfg.json").read_text()), arrays(folder / "sae.safetensors")
    assert (config["d_in"], config["num_latents"], config["activation"]) == (D, N, "topk")
    read = x if config["transcode"] else x - w["b_dec"]
    f = largest(read @ w["encoder.weight"].T + w["encoder.bias"], config["k"])
    skip = x @ w["W_skip"].T if config["skip_connection"] else 0
    return f, f @ w["W_dec"] + w["b_dec"] + skip


def dictionary_learning(folder: Path, x: Rows) -> tuple[Rows, Rows]:
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    state = torch.load(folder / "ae.pt", weights_only=True)
    w = {name: tensor.double().numpy() for name, tensor in state.items()}
    match trainer["dict_class"]:
        case "AutoEncoderTopK":
            z = (x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]
            assert (state["k"].dtype, int(state["k"])) == (torch.int32, trainer["k"])
            f, b_dec = largest(z, trainer["k"]), w["b_dec"]
        case "BatchTopKSAE":
            z = (x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]
            assert state["threshold"].shape == ()
            f, b_dec = np.maximum(z, 0) * (z > w["threshold"]), w["b_dec"]
        case "AutoEncoder":
            z = (x - w["bias"]) @ w["encoder.weight"].T + w["encoder.bias"]
            f, b_dec = np.maximum(z, 0), w["bias"]
        case "JumpReluAutoEncoder":
            z = x @ w["W_enc"] + w["b_enc"]
            f = np.maximum(z, 0) * (z > w["threshold"])
            return f, f @ w["W_dec"] + w["b_dec"]
        case "GatedAutoEncoder":
            pi = (x - w["decoder_bias"]) @ w["encoder.weight"].T
            magnitudes = np.maximum(np.exp(w["r_mag"]) * pi + w["mag_bias"], 0)
            f, b_dec = (pi + w["gate_bias"] > 0) * magnitudes, w["decoder_bias"]
        case other:
            raise AssertionError(other)
    return f, f @ w["decoder.weight"].T + b_dec


def circuit_tracer(folder: Path, x: Rows) -> tuple[Rows, Rows]:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["feature_input_hook"] == "mlp.hook_in"
    assert config["feature_output_hook"] == "mlp.hook_out"
    if config["model_kind"] == "transcoder_set":
        w = arrays(folder / "layer_0.safetensors")
        z = x @ w["W_enc"].T + w["b_enc"]
        f = z * (z > w["activation_function.threshold"])
        skip = x @ w["W_skip"].T if "W_skip" in w else 0
        return f, f @ w["W_dec"] + w["b_dec"] + skip
    assert config["model_kind"] == "cross_layer_transcoder"
    f, y = np.zeros((len(x), N)), np.zeros_like(x)
    for layer in range(2):
        w = arrays(folder / f"W_enc_{layer}.safetensors")
        z = x[:, layer * D : (layer + 1) * D] @ w[f"W_enc_{layer}"].T + w[f"b_enc_{layer}"]
        f[:, layer::2] = z * (z > w[f"threshold_{layer}"])
        y[:, layer * D : (layer + 1) * D] += w[f"b_dec_{layer}"]
        decoder = arrays(folder / f"W_dec_{layer}.safetensors")[f"W_dec_{layer}"]
        assert decoder.shape == (N // 2, 2 - layer, D)
        y[:, layer * D :] += np.einsum("rf,fld->rld", f[:, layer::2], decoder).reshape(len(x), -1)
    return f, y


ORACLES: dict[str, Oracle] = {
    "sparsify": sparsify,
    "dictionary-learning": dictionary_learning,
    "circuit-tracer": circuit_tracer,
}
HELD: list[tuple[str, dict[str, Any]]] = [
    ("sparsify", {"kind": "topk"}),
    ("sparsify", {"kind": "transcoder", "skip": False, **MLP}),
    ("sparsify", {"kind": "transcoder", "skip": True, **MLP}),
    *(
        ("dictionary-learning", {"kind": kind})
        for kind in ("topk", "batchtopk", "matryoshka", "relu", "jumprelu", "gated")
    ),
    ("circuit-tracer", {"kind": "transcoder", "selection": "batch", "skip": False, **MLP}),
    ("circuit-tracer", {"kind": "transcoder", "selection": "batch", "skip": True, **MLP}),
    ("circuit-tracer", {"kind": "clt_jumprelu", **LAYERS}),
    ("circuit-tracer", {"kind": "clt", **LAYERS}),
]


def named(case: Any) -> str:
    return case if isinstance(case, str) else f"{case['kind']}{'-skip' if case.get('skip') else ''}"


def trained(folder: Path, sae: dict[str, Any]) -> tuple[Run, Dictionary, SiteNormalisers]:
    """Return a run with a checkpoint of random weights; rows vary in their active latents."""
    counts = {"k": 3, "auxk": 0} if "relu" not in sae["kind"] and sae["kind"] != "gated" else {}
    sites = [*sae.get("reads", ["mlp_in.0"]), *sae.get("writes", [])]
    path = write_run(
        folder,
        sae={"n_latents": N, "dead_after_rows": 480, **counts, **sae},
        activations={"sites": sites},
    )
    run = load_run(path, HF)
    dictionary = build_sae(run.sae, Widths((D,) * len(run.reads), (D,) * len(run.writes)))
    generator = torch.Generator().manual_seed(0)
    for name, tensor in dictionary.tensors():
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) / 2)
        if name in ("b_enc", "b_mag"):
            tensor.data.sub_(1)
        if name == "theta":
            tensor.data.abs_()
        if name == "threshold":
            tensor.copy_(torch.tensor([0.9, 0.75]))
        if name == "W_dec" and sae["kind"] in UNIT_ROWS:
            tensor.data.copy_(torch.nn.functional.normalize(tensor.data))
    of = {s: Normaliser(SCALES[s], torch.zeros(D, dtype=torch.float64), 1.0, 1) for s in sites}
    normalisers = SiteNormalisers(run.reads, run.writes, of)
    tensors = {name: tensor.detach() for name, tensor in dictionary.tensors()}
    tensors[IDLE_ROWS] = torch.zeros(N, dtype=torch.int64)
    checkpoints = Checkpoints(open_store(run.store.runs), run.name, 1)
    save(checkpoints, 5, tensors, normalisers.to_scalars() | {"run": run_fingerprint(run)})
    return run, dictionary.double(), normalisers


def infer(sae: Dictionary, normalisers: SiteNormalisers, x: Rows) -> tuple[Rows, Rows]:
    """Return codes and raw reconstructions of raw rows."""
    of = normalisers.by_site
    read = torch.tensor([of[site].scale for site in normalisers.reads], dtype=torch.float64)
    write = torch.tensor([of[site].scale for site in normalisers.writes], dtype=torch.float64)
    rows = torch.from_numpy(x) * read.repeat_interleave(D)
    codes = sae.encode(rows)
    y_hat = sae.decode(codes, rows).detach() / write.repeat_interleave(D)
    return dense(codes, N), y_hat.numpy()


def raw_rows(run: Run, rows: int = 500) -> Rows:
    x: Rows = 3 * np.random.default_rng(1).standard_normal((rows, D * len(run.reads)))
    return x


@pytest.mark.parametrize(("library", "sae"), HELD, ids=named)
def test_an_export_is_the_trained_dictionary_and_comes_back(
    library: str, sae: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exports and imports round-trip, even in small pages that split every tensor."""
    monkeypatch.setattr(raw, "MEMORY_BYTES", 4 * 4 * 4 * (2 * D + 2))
    monkeypatch.setattr(piecewise, "TRANSPOSED_BYTES", 4 * N * 4)
    run, dictionary, normalisers = trained(tmp_path, sae)
    folder = Path(export(run, format_name=library))
    assert folder.name == f"export-{library}"
    x = raw_rows(run)
    codes, expected = infer(dictionary, normalisers, x)
    features, y_hat = ORACLES[library](folder, x)
    assert np.array_equal(features > 0, codes > 0)
    assert 0 < (codes > 0).mean() < 0.9
    np.testing.assert_allclose(y_hat, expected, rtol=1e-5, atol=1e-5)
    if run.sae.kind in UNIT_ROWS:  # a code is the length of its contribution
        np.testing.assert_allclose(features, codes / SCALES["mlp_in.0"], rtol=1e-5, atol=1e-5)
    if run.sae.has_skip and library == "circuit-tracer":
        with pytest.raises(ConfigError, match="has a skip connection and thresholds; dist_sae"):
            sae_section(read_dictionary(folder), run, folder)
        return
    found = read_dictionary(folder)
    section = sae_section(found, run, folder)
    back = Run.model_validate(run.model_dump() | {"sae": section})
    scales = ([SCALES[site] for site in sites] for sites in (run.reads, run.writes))
    again, y_again = infer(convert(back, found, *scales).double(), normalisers, x)
    assert np.array_equal(again > 0, codes > 0)
    np.testing.assert_allclose(y_again, expected, rtol=1e-5, atol=1e-5)


def test_an_export_of_the_same_checkpoint_is_not_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, _, _ = trained(tmp_path, {"kind": "clt", **LAYERS})
    folder = Path(export(run, format_name="circuit-tracer"))
    weights = folder / "W_dec_1.safetensors"
    weights.write_bytes(b"mine")
    export(run, format_name="circuit-tracer")
    assert weights.read_bytes() == b"mine"
    weights.unlink()
    export(run, format_name="circuit-tracer")
    assert weights.exists()


ROW = {"kind": "transcoder", **MLP}
BATCH = {"kind": "transcoder", "selection": "batch"}


@pytest.mark.parametrize(
    ("library", "sae", "reason"),
    [
        ("sparsify", {"kind": "batchtopk"}, "sae.kind: batchtopk: sparsify supports only TopK"),
        ("sparsify", {**BATCH, **MLP}, "sae.selection: batch: sparsify supports only"),
        ("sparsify", {"kind": "transcoder", **LAYERS}, "sae.reads: mlp_in.0, mlp_in.1 -> "),
        ("dictionary-learning", ROW, "sae.kind: transcoder: dictionary_learning does not support"),
        ("circuit-tracer", ROW, "sae.selection: row: circuit-tracer supports only"),
        ("circuit-tracer", {"kind": "topk"}, "sae.kind: topk: circuit-tracer supports only"),
        (
            "circuit-tracer",
            {**BATCH, "reads": ["mlp_in.0"], "writes": ["mlp_out.1"]},
            "sae.reads: mlp_in.0 -> mlp_out.1: circuit-tracer replaces MLPs, so sae.reads",
        ),
        (
            "circuit-tracer",
            {"kind": "clt", "reads": ["mlp_in.1"], "writes": ["mlp_out.1"]},
            "sae.reads: mlp_in.1 -> mlp_out.1: circuit-tracer needs every layer from 0 up",
        ),
        ("circuit-tracer", {**BATCH, **LAYERS}, "sae.reads: mlp_in.0, mlp_in.1 -> "),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    tmp_path: Path, library: str, sae: dict[str, Any], reason: str
) -> None:
    run, _, _ = trained(tmp_path, sae)
    with pytest.raises(ConfigError, match=f"^{re.escape(reason)}") as refused:
        export(run, format_name=library)
    assert "\n" not in str(refused.value)


class Code:
    """An object that calls `os.mkdir` when unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_of_a_pickle_nothing_but_tensors_is_read(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoder"}}')
    for content in (Code(ran), {"bias": Code(ran)}, ["bias"], {"bias": "text"}):
        torch.save(content, tmp_path / "ae.pt")
        with pytest.raises(
            ConfigError, match=r"cannot be read: ae\.pt (contains more|is not a dict)"
        ) as no:
            read_dictionary(tmp_path)
        assert "\n" not in str(no.value)
    assert not ran.exists()


def test_state_dicts_as_dictionary_learning_saves_them_are_read(tmp_path: Path) -> None:
    """Old dictionary-learning files are read.

    Its oldest class centers by `bias`, and its Matryoshka class stores the latents' groups.
    """
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec = (torch.randn(N, D, generator=generator) for _ in range(2))
    b_enc, b_dec = torch.randn(N, generator=generator), torch.randn(D, generator=generator)
    above = torch.tensor(0.7)
    x = 3 * torch.randn(200, D, generator=generator)
    z = (x - b_dec) @ W_enc.T + b_enc
    cases: list[tuple[str, dict[str, torch.Tensor], torch.Tensor]] = [
        (
            "AutoEncoder",
            {"bias": b_dec, "encoder.weight": W_enc, "encoder.bias": b_enc}
            | {"decoder.weight": W_dec.T},
            z.relu(),
        ),
        (
            "MatryoshkaBatchTopKSAE",
            {"W_enc": W_enc.T, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "threshold": above}
            | {"k": torch.tensor(3), "group_sizes": torch.tensor([8, N - 8])},
            z * (z > above),
        ),
    ]
    run = load_run(write_run(tmp_path, activations={"sites": ["mlp_in.0"]}), HF)
    for name, state, f in cases:
        (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": name}}))
        torch.save(state, tmp_path / "ae.pt")
        found = read_dictionary(tmp_path)
        own = Run.model_validate(run.model_dump() | {"sae": sae_section(found, run, tmp_path)})
        dictionary = convert(own, found, [0.4], [0.4])
        codes = dictionary.encode(0.4 * x)
        assert np.array_equal(dense(codes, N) > 0, f.numpy() > 0)
        x_hat = dictionary.decode(codes, 0.4 * x).detach() / 0.4
        torch.testing.assert_close(x_hat, f @ W_dec + b_dec, rtol=1e-4, atol=1e-4)


def layer(folder: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> None:
    weights = safetensors.numpy.load_file(folder / file)
    change(weights)
    safetensors.numpy.save_file(weights, folder / file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "W_dec_1.safetensors").unlink(), "cannot be read: "),
        (
            lambda f: layer(f, "W_enc_1.safetensors", lambda w: w.pop("b_enc_1")),
            "cannot be read: 'b_enc_1' is missing",
        ),
        (
            lambda f: layer(f, "W_enc_1.safetensors", lambda w: w["threshold_1"].fill(-1)),
            "cannot be read: has thresholds below 0",
        ),
        (
            lambda f: layer(
                f, "W_dec_1.safetensors", lambda w: w.update(W_dec_1=np.zeros((N // 2, 2, D)))
            ),
            f"W_dec_1 has shape [{N // 2}, 2, {D}], but its latents write 1 of 2 layers",
        ),
        (
            lambda f: layer(f, "W_enc_1.safetensors", lambda w: w.update(b_enc_1=np.zeros(3))),
            "cannot be read: b_enc differs in shape between layers",
        ),
    ],
)
def test_a_damaged_cross_layer_transcoder_is_refused(
    tmp_path: Path, change: Callable[[Path], Any], message: str
) -> None:
    run, _, _ = trained(tmp_path, {"kind": "clt", **LAYERS})
    folder = Path(export(run, format_name="circuit-tracer"))
    read_dictionary(folder)
    change(folder)
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_dictionary(folder)


def test_the_run_file_names_the_sites_of_a_transcoder(tmp_path: Path) -> None:
    run, _, _ = trained(tmp_path / "one", {**BATCH, **MLP})
    other, _, _ = trained(tmp_path / "two", {"kind": "topk"})
    layers, _, _ = trained(tmp_path / "three", {"kind": "clt", **LAYERS})
    found = Path(export(run, format_name="circuit-tracer"))
    autoencoder = Path(export(other, format_name="sparsify"))
    for folder, names, message in (
        (found, other, "is a transcoder; set sae.reads and sae.writes to its input and"),
        (autoencoder, run, "reconstructs its input; remove sae.writes"),
        (found, layers, "reads 1 layers, but the run file names mlp_in.0, mlp_in.1 -> mlp_out.0"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            sae_section(read_dictionary(folder), names, folder)
    (found / "layer_1.safetensors").write_bytes(b"")
    with pytest.raises(
        ConfigError, match="contains transcoders of 2 layers; give the file of one layer"
    ):
        read_dictionary(found)
    assert read_dictionary(found / "layer_0.safetensors").is_transcoder


def test_saelens_has_transcoders(tmp_path: Path) -> None:
    """A transcoder exported for SAELens, with W_enc as [d_in, n_latents], can be imported again."""
    run, dictionary, normalisers = trained(tmp_path, {**BATCH, **MLP})
    folder = Path(export(run))
    section = sae_section(found := read_dictionary(folder), run, folder)
    assert section["kind"] == "clt_jumprelu"
    back = Run.model_validate(run.model_dump() | {"sae": section})
    again = convert(back, found, [SCALES["mlp_in.0"]], [SCALES["mlp_out.0"]]).double()
    x = raw_rows(run)
    (codes, y), (codes_again, y_again) = (infer(d, normalisers, x) for d in (dictionary, again))
    assert np.array_equal(codes > 0, codes_again > 0)
    np.testing.assert_allclose(y_again, y, rtol=1e-5, atol=1e-5)


WEIGHTS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "sae-lens": ({"kind": "jumprelu"}, "sae_weights.safetensors", "W_enc", "threshold"),
    "sparsify": ({"kind": "topk"}, "sae.safetensors", "W_dec", "encoder.bias"),
    "circuit-tracer": ({**BATCH, **MLP}, "layer_0.safetensors", "W_dec", "b_enc"),
    "dictionary-learning": ({"kind": "batchtopk"}, "ae.pt", "encoder.weight", "threshold"),
}
"""Recipe, file name, a matrix and a vector of each library."""


@pytest.mark.parametrize("fault", ["missing", "extra", "turned", "damaged"])
@pytest.mark.parametrize("library", WEIGHTS)
def test_tensors_that_a_format_has_not_are_one_line(
    library: str, fault: str, tmp_path: Path
) -> None:
    sae, name, matrix, vector = WEIGHTS[library]
    run, _, _ = trained(tmp_path, sae)
    file = Path(export(run, format_name=library)) / name
    weights = torch.load(file) if name == "ae.pt" else safetensors.torch.load_file(file)
    match fault:
        case "missing":
            del weights[vector]
            said = f"'{vector}' is missing"
        case "extra":
            weights["W_more"] = torch.zeros(3)
            said = "has W_more, which "
        case _:
            weights[matrix] = weights[matrix].T.contiguous()
            said = "has shape "
    if name == "ae.pt":
        torch.save(weights, file)
    else:
        safetensors.torch.save_file(weights, file)
    if fault == "damaged":
        file.write_bytes(file.read_bytes()[:-40])
        said = "cannot be read: "
    with pytest.raises(ConfigError, match=re.escape(said)) as refused:
        read_dictionary(file.parent)
    assert "\n" not in str(refused.value)


def test_numbers_of_half_precision_are_read_as_they_are(tmp_path: Path) -> None:
    """bf16 files are read exactly, including thresholds.

    A code just above a bf16 threshold must be active.
    """
    run, _, _ = trained(tmp_path, {"kind": "jumprelu"})
    folder = Path(export(run))
    file = folder / "sae_weights.safetensors"
    half = {name: t.bfloat16() for name, t in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(half, file)
    found = read_dictionary(folder)
    assert torch.equal(found.per_latent["threshold"], half["threshold"].double().clamp_min(0))
    w = {name: tensor.double().numpy() for name, tensor in half.items()}
    x = raw_rows(run, 2000)
    z = x @ w["W_enc"] + w["b_enc"]
    back = Run.model_validate(run.model_dump() | {"sae": sae_section(found, run, folder)})
    scales = [SCALES["mlp_in.0"]]
    again = convert(back, found, scales, scales).double()
    rows = scales[0] * torch.from_numpy(x)
    assert np.array_equal(dense(again.encode(rows), N) > 0, (z > w["threshold"]) & (z > 0))
