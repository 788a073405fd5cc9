"""Exports equal the trained dictionary when read by SAELens's rules.

`forward` is an independent implementation of SAELens 6.54.12 that uses only the two exported files.
For TopK and transcoders it was checked against that package's classes on 10,000 rows when it was
written.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from numpy.typing import NDArray

from dist_sae.checkpoint import layout, piecewise
from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.checkpoint.state import IDLE_ROWS
from dist_sae.config import Run, load_run
from dist_sae.config.fingerprint import run_fingerprint
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.interface import Codes, Widths
from dist_sae.dictionaries.normaliser import Normaliser, SiteNormalisers
from dist_sae.errors import ConfigError
from dist_sae.interop import raw
from dist_sae.interop.export import export
from dist_sae.interop.sae_lens import architecture
from dist_sae.kernels import Entries
from dist_sae.storage import open_store
from tests.dictionaries.recipes import CONFIGS, KINDS, UNIT_ROWS
from tests.runs import write_run
from tests.world import save

SCALE, THETA = 0.37, 2.5
IDLE = {IDLE_ROWS: torch.zeros(64, dtype=torch.int64)}
# Keys that SAELens writes. Without the version it would silently drop the metadata.
KEYS = {
    "architecture",
    "d_in",
    "d_sae",
    "dtype",
    "device",
    "apply_b_dec_to_input",
    "normalize_activations",
    "reshape_activations",
    "metadata",
}
TOPK_KEYS = {"k", "rescale_acts_by_decoder_norm"}  # without k SAELens would silently use 100


def forward(
    folder: Path, x: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (feature activations, reconstruction) of raw activations."""
    config: dict[str, Any] = json.loads((folder / "cfg.json").read_text())
    weights = safetensors.numpy.load_file(folder / "sae_weights.safetensors")
    w = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
    assert config["normalize_activations"] == "none"
    centred = x - w["b_dec"] if config["apply_b_dec_to_input"] else x
    z: Any = centred @ w["W_enc"] + w.get("b_enc", 0)
    match config["architecture"]:
        case "topk":
            top = np.argpartition(-z, config["k"] - 1, axis=-1)[:, : config["k"]]
            f = np.zeros_like(z)
            np.put_along_axis(f, top, np.maximum(np.take_along_axis(z, top, -1), 0), -1)
        case "jumprelu" | "jumprelu_transcoder" | "jumprelu_skip_transcoder":
            f = np.maximum(z, 0) * (z > w["threshold"])
        case "standard":
            f = np.maximum(z, 0)
        case "gated":
            pi = x @ w["W_enc"]
            f = (pi + w["b_gate"] > 0) * np.maximum(np.exp(w["r_mag"]) * pi + w["b_mag"], 0)
        case other:
            raise AssertionError(other)
    skip = x @ w["W_skip"].T if config["architecture"] == "jumprelu_skip_transcoder" else 0
    return f, f @ w["W_dec"] + w["b_dec"] + skip


def scalars(run: Run, scale: float) -> dict[str, Any]:
    return {
        "scale": scale,
        "mean": [0.0] * 16,
        "variance": 1.0,
        "rows": 1,
        "run": run_fingerprint(run),
    }


def dense(codes: Codes, n_latents: int) -> NDArray[np.float64]:
    entries = Entries(codes.latents, codes.starts, n_latents)
    found = torch.zeros(len(codes.starts), n_latents, dtype=codes.acts.dtype)
    found[entries.rows, entries.latents] = codes.acts
    return found.numpy()


EXPORTED = [
    kind
    for kind in KINDS
    if kind != "transcoder" and architecture(CONFIGS[kind])  # type: ignore[arg-type]
]
"""Autoencoders of one site that SAELens supports."""


@pytest.fixture(params=EXPORTED)
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def exported(tmp_path: Path, kind: str) -> tuple[Path, dict[str, torch.Tensor]]:
    sae: dict[str, Any] = {"kind": kind, "n_latents": 64, "dead_after_rows": 480}
    sae |= {"k": 3, "auxk": 16} if kind in ("topk", "batchtopk", "matryoshka") else {}
    run = load_run(write_run(tmp_path, sae=sae))
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.randn(64, 16, generator=generator)
    weights = {
        "W_enc": torch.randn(64, 16, generator=generator),
        "W_dec": torch.nn.functional.normalize(W_dec) if kind in UNIT_ROWS else W_dec / 4,
        # some rows have fewer than k positive pre-activations
        "b_enc": torch.randn(64, generator=generator) - 14,
        "b_dec": torch.randn(16, generator=generator),
    }
    if kind in ("batchtopk", "matryoshka"):
        weights["threshold"] = torch.tensor([THETA * 0.75, 0.75], dtype=torch.float64)
    if kind in ("jumprelu", "jumprelu_tanh"):
        weights["theta"] = torch.randn(64, generator=generator).exp() / 4
    if kind == "gated":
        weights["r_mag"] = torch.randn(64, generator=generator) / 2
        weights["b_mag"] = torch.randn(64, generator=generator) - 14
    checkpoints = Checkpoints(open_store(run.store.runs), run.name, 1)
    save(checkpoints, 5, weights | IDLE, scalars(run, SCALE))
    return Path(export(run)), weights


HF = ["model={kind: huggingface, path: x}", "corpus={kind: files, files: [x.txt]}"]
MLP = {"reads": ["mlp_in.3"], "writes": ["mlp_out.3"]}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kind": "routed", "experts": 4}, "sae.kind: routed: SAELens does not support this kind"),
        ({"kind": "crosscoder"}, "sae.kind: crosscoder: SAELens does not support this kind"),
        ({"kind": "transcoder", **MLP}, "sae.selection: row: SAELens supports only transcoders"),
        (
            {"kind": "transcoder", "selection": "batch", "reads": ["mlp_in.3", "mlp_out.3"]},
            "sae.reads: mlp_in.3, mlp_out.3: SAELens does not support several sites",
        ),
    ],
)
def test_what_saelens_does_not_have_is_refused(
    tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    sae = {"n_latents": 64, "k": 3, "auxk": 16, "reads": ["mlp_in.3"], **settings}
    path = write_run(tmp_path, sae=sae, activations={"sites": ["mlp_in.3", "mlp_out.3"]})
    with pytest.raises(ConfigError, match=f"^{re.escape(reason)}"):
        export(load_run(path, HF))


@pytest.mark.parametrize("skip", [False, True])
def test_an_exported_transcoder_maps_raw_activations(tmp_path: Path, *, skip: bool) -> None:
    """An exported transcoder gives our outputs for raw inputs.

    Both sides compute in fp64 from fp32 files. The two sites differ in width and in scale.
    """
    sae = {"kind": "transcoder", "n_latents": 64, "k": 3, "auxk": 16, "selection": "batch", **MLP}
    sites = {"sites": ["mlp_in.3", "mlp_out.3"]}
    run = load_run(write_run(tmp_path, sae={**sae, "skip": skip}, activations=sites), HF)
    dictionary = build_sae(run.sae, Widths((16,), (12,)))
    generator = torch.Generator().manual_seed(0)
    for name, tensor in dictionary.tensors():
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) / 4)
        if name == "threshold":
            tensor.copy_(torch.tensor([THETA * 0.75, 0.75]))
    of = {
        site: Normaliser(scale, torch.zeros(width, dtype=torch.float64), 1.0, 1)
        for site, scale, width in (("mlp_in.3", SCALE, 16), ("mlp_out.3", 1.7, 12))
    }
    known = SiteNormalisers(run.reads, run.writes, of).to_scalars()
    checkpoints = Checkpoints(open_store(run.store.runs), run.name, 1)
    tensors = {name: tensor.detach() for name, tensor in dictionary.tensors()}
    save(checkpoints, 5, tensors | IDLE, known | {"run": run_fingerprint(run)})
    folder = Path(export(run))
    config = json.loads((folder / "cfg.json").read_text())
    assert (config["d_in"], config["d_out"], config["apply_b_dec_to_input"]) == (16, 12, False)
    assert config["metadata"]["model_class_name"] == "TransformerBridge"
    assert config["metadata"]["hook_name"] == "blocks.3.mlp.hook_in"
    assert config["metadata"]["hook_name_out"] == "blocks.3.mlp.hook_out"
    x = 5 * torch.randn(500, 16, generator=generator, dtype=torch.float64)
    dictionary.double()
    codes = dictionary.encode(x * SCALE)
    norms = dictionary.W_dec.detach().norm(dim=1).numpy()
    features, y_hat = forward(folder, x.numpy())
    assert codes.acts.count_nonzero() > 100
    np.testing.assert_allclose(features, dense(codes, 64) * norms, atol=1e-5)
    expected = dictionary.decode(codes, x * SCALE).detach().numpy() / 1.7
    np.testing.assert_allclose(y_hat, expected, atol=1e-5)


def test_files_have_what_saelens_wants(
    exported: tuple[Path, dict[str, torch.Tensor]], kind: str
) -> None:
    folder, _ = exported
    config = json.loads((folder / "cfg.json").read_text())
    assert config.keys() == (KEYS | TOPK_KEYS if kind == "topk" else KEYS)
    assert (config["d_in"], config["d_sae"]) == (16, 64)
    assert config.get("k") == (3 if kind == "topk" else None)
    assert int(config["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert {"hook_name", "context_size", "prepend_bos", "model_name"} <= config["metadata"].keys()
    pattern = [1, 3, 7, 15, 32] if kind == "matryoshka" else None
    assert config["metadata"].get("prefix_pattern") == pattern
    weights = safetensors.numpy.load_file(folder / "sae_weights.safetensors")
    expected = {"W_enc": (16, 64), "b_enc": (64,), "W_dec": (64, 16), "b_dec": (16,)}
    if config["architecture"] == "jumprelu":
        expected["threshold"] = (64,)
    if config["architecture"] == "gated":
        del expected["b_enc"]
        expected |= dict.fromkeys(("b_gate", "b_mag", "r_mag"), (64,))
    assert {name: tensor.shape for name, tensor in weights.items()} == expected
    assert {tensor.dtype for tensor in weights.values()} == {np.dtype(np.float32)}


def test_the_exported_dictionary_is_the_trained_one(
    exported: tuple[Path, dict[str, torch.Tensor]], kind: str, tmp_path: Path
) -> None:
    """An export gives our features and x_hat for raw x, computed in fp64 from fp32 files.

    A feature activation is a latent's code times the norm of its decoder row.
    """
    folder, weights = exported
    x = 5 * torch.randn(2000, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sae = build_sae(load_run(tmp_path / "run.yaml").sae, 16).double()
    sae.load_state_dict(weights)
    codes = sae.encode(x * SCALE)
    ours = dense(codes, 64) * sae.W_dec.detach().norm(dim=1).numpy()
    features, x_hat = forward(folder, x.numpy())
    assert np.array_equal(ours > 0, features > 0)
    active = (ours > 0).sum(1)
    assert active.min() == 0
    assert active.max() == 3 if kind == "topk" else active.max() > 3
    if kind in ("batchtopk", "matryoshka"):
        assert ours[ours > 0].min() > THETA
    np.testing.assert_allclose(features, ours, atol=1e-5)
    np.testing.assert_allclose(x_hat, sae.decode(codes, x).numpy() / SCALE, atol=1e-5)


SMALL: Any = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9}
HOOKED, BRIDGE = "HookedTransformer", "TransformerBridge"


@pytest.mark.parametrize(
    ("architecture", "site", "model_class", "hook"),
    [
        (None, "resid_pre.3", HOOKED, "blocks.3.hook_resid_pre"),
        (None, "resid_post.7", HOOKED, "blocks.7.hook_resid_post"),
        (None, "attn_z.0", HOOKED, "blocks.0.attn.hook_z"),
        (None, "mlp_inner.0", HOOKED, "blocks.0.mlp.hook_post"),
        (None, "mlp_in.0", BRIDGE, "blocks.0.mlp.hook_in"),
        (None, "mlp_out.0", BRIDGE, "blocks.0.mlp.hook_out"),
        (transformers.LlamaConfig(**SMALL), "mlp_out.0", HOOKED, "blocks.0.hook_mlp_out"),
        (transformers.LlamaConfig(**SMALL), "attn_out.0", HOOKED, "blocks.0.hook_attn_out"),
        (transformers.GPTNeoXConfig(**SMALL), "mlp_out.0", HOOKED, "blocks.0.hook_mlp_out"),
        (transformers.Gemma2Config(**SMALL), "mlp_out.0", BRIDGE, "blocks.0.mlp.hook_out"),
        (transformers.Olmo2Config(**SMALL), "attn_out.0", BRIDGE, "blocks.0.attn.hook_out"),
    ],
)
def test_hooks_are_those_of_the_same_rows(
    tmp_path: Path,
    architecture: transformers.PretrainedConfig | None,
    site: str,
    model_class: str,
    hook: str,
) -> None:
    """Exports name the hook point that has the site's rows.

    None: the model's files are not available. docs/python.md describes the rows compared in
    TransformerLens.
    """
    model = tmp_path / "x"
    if architecture:
        architecture.save_pretrained(model)
    path = write_run(tmp_path, activations={"sites": [site]})
    settings = [f"model={{kind: huggingface, path: {model}}}"]
    run = load_run(path, [*settings, "corpus={kind: files, files: [x.txt]}"])
    weights = {"W_enc": torch.zeros(64, 16), "W_dec": torch.ones(64, 16) / 4}
    weights |= {"b_enc": torch.zeros(64), "b_dec": torch.zeros(16)}
    checkpoints = Checkpoints(open_store(run.store.runs), run.name, 1)
    save(checkpoints, 5, weights | IDLE, scalars(run, 1.0))
    config = json.loads((Path(export(run)) / "cfg.json").read_text())
    assert config["metadata"]["model_class_name"] == model_class
    assert config["metadata"]["hook_name"] == hook
    assert config["metadata"]["model_name"] == str(model)


def test_a_folder_may_have_the_name_that_the_hub_has_for_its_model(tmp_path: Path) -> None:
    path = write_run(tmp_path, activations={"sites": ["resid_post.1"]})
    settings = ["model={kind: huggingface, path: /x}", "corpus={kind: files, files: [x.txt]}"]
    run = load_run(path, settings)
    zeros = {"W_enc": torch.zeros(64, 16), "W_dec": torch.ones(64, 16) / 4}
    zeros |= {"b_enc": torch.zeros(64), "b_dec": torch.zeros(16)}
    checkpoints = Checkpoints(open_store(run.store.runs), run.name, 1)
    save(checkpoints, 5, zeros | IDLE, scalars(run, 1.0))  # saved without the hub's name
    named = load_run(path, [*settings, "export.model_name=some/model"])
    config = json.loads((Path(export(named)) / "cfg.json").read_text())
    assert config["metadata"]["model_name"] == "some/model"


def whole(
    weights: dict[str, torch.Tensor], run: Run, scale: float = SCALE
) -> dict[str, torch.Tensor]:
    """Return the tensors to be exported, computed from the whole dictionary at once."""
    sae = build_sae(run.sae, 16)
    sae.load_state_dict(weights)
    sae.constrain()
    p = {name: tensor.double() for name, tensor in sae.state_dict().items()}
    norms = p["W_dec"].norm(dim=1).clamp_min(1e-30)
    tensors = {
        "W_enc": scale * (norms[:, None] * p["W_enc"]).T,
        "b_enc": norms * p["b_enc"],
        "W_dec": p["W_dec"] / (norms[:, None] * scale),
        "b_dec": p["b_dec"] / scale,
    }
    if "threshold" in weights:
        tensors["threshold"] = norms * THETA
    if "theta" in weights:
        tensors["threshold"] = norms * p["theta"] * 4
    if "r_mag" in weights:
        tensors["b_gate"] = tensors.pop("b_enc")
        tensors |= {"b_mag": norms * p["b_mag"], "r_mag": p["r_mag"]}
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}


@pytest.mark.parametrize("page_latents", [1, 3, 64])
def test_pages_are_no_other_numbers(
    exported: tuple[Path, dict[str, torch.Tensor]],
    page_latents: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exporting in pages gives the library's bytes, even if a decoder row is zero."""
    run, weights = load_run(tmp_path / "run.yaml"), exported[1]
    weights["W_dec"][7] = 0
    monkeypatch.setattr(layout, "PART_BYTES", 11 * 16 * 4)
    monkeypatch.setattr(raw, "MEMORY_BYTES", 4 * page_latents * (2 * 16 + 2) * 4)
    monkeypatch.setattr(piecewise, "TRANSPOSED_BYTES", 5 * 64 * 4)
    checkpoints = Checkpoints(open_store(run.store.runs), run.name, 1)
    save(checkpoints, 6, weights | IDLE, scalars(run, SCALE))
    found = (Path(export(run)) / "sae_weights.safetensors").read_bytes()
    assert found == safetensors.torch.save(whole(weights, run))


def test_a_damaged_part_makes_room_for_the_checkpoint_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = load_run(write_run(tmp_path))
    weights = {"W_enc": torch.ones(64, 16), "W_dec": torch.ones(64, 16) / 4}
    weights |= {"b_enc": torch.zeros(64), "b_dec": torch.zeros(16)}
    checkpoints = Checkpoints(open_store(run.store.runs), run.name, 2)
    for step in (5, 6):
        save(checkpoints, step, weights | IDLE, scalars(run, 1.0))
    part = tmp_path / "runs/world/checkpoints/step-00000006/W_enc-000000000.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"\1")
    folder = Path(export(run))
    assert "skipping the checkpoint of step 6: " in caplog.text
    assert json.loads((folder / "cfg.json").read_text())["metadata"]["trained_rows"] == 5 * 160
    assert {path.name for path in folder.iterdir()} == {"cfg.json", "sae_weights.safetensors"}


def test_exporting_nothing_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run `dist-sae train` first"):
        export(load_run(write_run(tmp_path)))
