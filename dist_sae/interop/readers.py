"""Readers of other libraries' files, one per library. `foreign.py` chooses the reader.

If dist_sae's recipe has another form, the result is an equivalent function of x. Thresholds below 0
after a ReLU become 0, a ReLU transcoder becomes a JumpReLU transcoder with thresholds of 0, and one
threshold for all latents is copied to each latent.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from dist_sae.interop.torch_file import read_torch_file

_SAE_LENS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
_SAE_LENS_TRANSCODERS = {
    "transcoder": False,
    "skip_transcoder": False,
    "jumprelu_transcoder": True,
    "jumprelu_skip_transcoder": True,
}
"""Whether an architecture has thresholds; otherwise it has a ReLU."""
_PER_LATENT = {
    "topk": {"b_enc"},
    "relu": {"b_enc"},
    "jumprelu": {"b_enc", "threshold"},
    "gated": {"b_enc", "b_mag", "r_mag"},
}


class ImportedDictionary(NamedTuple):
    """A dictionary as another library stored it, in fp64."""

    library: str
    kind: str
    """The dist_sae recipe with the same encoder: topk, relu, jumprelu or gated."""
    k: int | None
    """Latents active on each row; None if thresholds decide."""
    subtracts_b_dec: bool
    """Whether b_dec is subtracted from x."""
    W_enc: Float[Tensor, "n_latents d_read"]
    W_dec: Float[Tensor, "n_latents d_out"]
    """For several layers, a latent's rows for each layer side by side; 0 before its own layer."""
    b_dec: Float[Tensor, " d_out"]
    per_latent: dict[str, Float[Tensor, " n_latents"]]
    """b_enc, and threshold, b_mag, r_mag if the kind has them."""
    W_skip: Float[Tensor, "d_out d_read"] | None = None
    is_transcoder: bool | None = False
    """Whether this is a transcoder; None if the files do not say."""
    layers: int = 1
    """Layers of a cross-layer transcoder; latent n reads layer n % layers."""


def sae_lens(config_file: Path, weights_file: Path) -> ImportedDictionary:
    """Read SAELens's `cfg.json` and `sae_weights.safetensors`, whose W_enc is [d_in, n_latents]."""
    config = _read_json(config_file)
    architecture = config.get("architecture", "standard")
    is_transcoder = architecture in _SAE_LENS_TRANSCODERS
    kind = "jumprelu" if is_transcoder else _SAE_LENS.get(architecture)
    if kind is None:
        raise ValueError(f"dist_sae has no recipe for architecture {architecture}")
    if (scaling := config.get("normalize_activations") or "none") != "none":
        raise ValueError(
            f"normalize_activations is {scaling}, but its scale is not in the file; fold it into "
            f"the weights (SAELens: fold_activation_norm_scaling_factor)"
        )
    weights = safetensors.torch.load_file(weights_file)
    if "b_gate" in weights:
        weights["b_enc"] = weights.pop("b_gate")
    if is_transcoder and not _SAE_LENS_TRANSCODERS[architecture]:
        weights["threshold"] = torch.zeros_like(weights["b_enc"])
    subtracts_b_dec = bool(config["apply_b_dec_to_input"])
    if is_transcoder and subtracts_b_dec:
        raise ValueError("apply_b_dec_to_input is true, but a transcoder's b_dec is an output bias")
    found = _dictionary(
        "SAELens",
        kind,
        config.get("k"),
        weights,
        subtracts_b_dec=subtracts_b_dec,
        transposed=True,
        is_transcoder=is_transcoder,
    )
    if config.get("rescale_acts_by_decoder_norm"):  # selects by f |d|, decodes with d / |d|
        norms = found.W_dec.norm(dim=1)
        found = found._replace(
            W_enc=norms[:, None] * found.W_enc,
            W_dec=found.W_dec / norms[:, None],
            per_latent={name: norms * vector for name, vector in found.per_latent.items()},
        )
    return found


def sparsify(config_file: Path, weights_file: Path) -> ImportedDictionary:
    """Read sparsify's `cfg.json` and `sae.safetensors`, of an autoencoder or a transcoder."""
    config = _read_json(config_file)
    if config.get("signed"):
        raise ValueError("dist_sae has no recipe for sparsify's signed latents")
    if config.get("multi_topk") not in (None, False) or config.get("activation", "topk") != "topk":
        raise ValueError("only sparsify's activation: topk without multi_topk is supported")
    is_transcoder = bool(config.get("transcode"))
    if config.get("skip_connection") and not is_transcoder:
        raise ValueError("dist_sae has no recipe for an autoencoder with a skip connection")
    weights = safetensors.torch.load_file(weights_file)
    weights["W_enc"] = weights.pop("encoder.weight")
    weights["b_enc"] = weights.pop("encoder.bias")
    return _dictionary(
        "sparsify",
        "topk",
        config["k"],
        weights,
        subtracts_b_dec=not is_transcoder,
        is_transcoder=is_transcoder,
    )


def gemma_scope(weights_file: Path) -> ImportedDictionary:
    """Read Gemma Scope's `params.npz`. Only the run file says whether it is a transcoder."""
    with np.load(weights_file, allow_pickle=False) as arrays:
        weights = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    scale = weights.pop("scaling_factor", torch.ones(1))
    if not bool((scale == 1).all()):
        raise ValueError("scaling_factor is not 1")
    return _dictionary(
        "Gemma Scope", "jumprelu", None, weights, transposed=True, is_transcoder=None
    )


def dictionary_learning(config_file: Path, weights_file: Path) -> ImportedDictionary:
    """Read dictionary_learning's `config.json` and `ae.pt`, which may contain only tensors."""
    trainer = _read_json(config_file)["trainer"]
    if not isinstance(trainer, dict):
        raise ValueError("trainer is not a JSON object")
    name, weights = trainer["dict_class"], read_torch_file(weights_file)
    library = "dictionary_learning"
    if name in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        weights["W_enc"] = weights["W_enc"].T
    else:
        weights["W_enc"] = weights.pop("encoder.weight")
        weights["W_dec"] = weights.pop("decoder.weight").T
    match name:
        case "AutoEncoder" | "AutoEncoderNew":
            subtracts_b_dec = name == "AutoEncoder"
            weights["b_dec"] = weights.pop("bias" if subtracts_b_dec else "decoder.bias")
            weights["b_enc"] = weights.pop("encoder.bias")
            return _dictionary(library, "relu", None, weights, subtracts_b_dec=subtracts_b_dec)
        case "GatedAutoEncoder":
            for theirs, ours in (("decoder", "b_dec"), ("gate", "b_enc"), ("mag", "b_mag")):
                weights[ours] = weights.pop(f"{theirs}_bias")
            return _dictionary(library, "gated", None, weights, subtracts_b_dec=True)
        case "JumpReluAutoEncoder":
            return _dictionary(library, "jumprelu", None, weights)
        case "AutoEncoderTopK":
            weights["b_enc"] = weights.pop("encoder.bias")
            weights.pop("threshold", None)  # for an encoding that is not the default
            k = weights.pop("k", torch.tensor(trainer.get("k", 0)))
            return _dictionary(library, "topk", int(k), weights, subtracts_b_dec=True)
        case "BatchTopKSAE" | "MatryoshkaBatchTopKSAE":
            if "encoder.bias" in weights:
                weights["b_enc"] = weights.pop("encoder.bias")
            for key in ("k", "group_sizes"):
                weights.pop(key, None)
            weights["threshold"] = weights["threshold"].expand_as(weights["b_enc"])
            return _dictionary(library, "jumprelu", None, weights, subtracts_b_dec=True)
        case _:
            raise ValueError(f"dist_sae has no recipe for dict_class {name}")


def circuit_tracer(file: Path) -> ImportedDictionary:
    """Read circuit-tracer's `layer_<l>.safetensors`, one layer's transcoder."""
    weights = safetensors.torch.load_file(file)
    thresholds = weights.pop("activation_function.threshold", None)
    weights["threshold"] = torch.zeros_like(weights["b_enc"]) if thresholds is None else thresholds
    _check_thresholds(weights["threshold"])
    return _dictionary("circuit-tracer", "jumprelu", None, weights, is_transcoder=True)


def circuit_tracer_layers(folder: Path) -> ImportedDictionary:
    """Read circuit-tracer's `W_enc_<l>` and `W_dec_<l>` files, a cross-layer transcoder."""
    layers = len(list(folder.glob("W_enc_*.safetensors")))
    parts: dict[str, list[Tensor]] = {
        name: [] for name in ("W_enc", "b_enc", "threshold", "b_dec", "W_dec")
    }
    for layer in range(layers):
        of_layer: dict[str, Tensor] = {}
        for matrix in ("W_enc", "W_dec"):
            of_layer |= safetensors.torch.load_file(folder / f"{matrix}_{layer}.safetensors")
        of_layer.setdefault(f"threshold_{layer}", torch.zeros_like(of_layer[f"b_enc_{layer}"]))
        decoder = of_layer[f"W_dec_{layer}"]
        if decoder.shape[1:2] != (layers - layer,):
            raise ValueError(
                f"W_dec_{layer} has shape {list(decoder.shape)}, but its latents write "
                f"{layers - layer} of {layers} layers"
            )
        before = decoder.new_zeros(len(decoder), layer, *decoder.shape[2:])
        of_layer[f"W_dec_{layer}"] = torch.cat([before, decoder], 1).flatten(1)
        for name, tensors in parts.items():
            tensors.append(of_layer[f"{name}_{layer}"])
    for name, tensors in parts.items():
        if len({tensor.shape for tensor in tensors}) > 1:
            raise ValueError(f"{name} differs in shape between layers")
    biases = torch.cat(parts.pop("b_dec"))
    weights = {name: torch.stack(t, 1).flatten(0, 1) for name, t in parts.items()}
    weights["b_dec"] = biases
    _check_thresholds(weights["threshold"])
    found = _dictionary("circuit-tracer", "jumprelu", None, weights, is_transcoder=True)
    return found._replace(layers=layers)


def _check_thresholds(thresholds: Tensor) -> None:
    if bool((thresholds < 0).any()):
        raise ValueError("has thresholds below 0; negative codes are not supported")


def _read_json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is not a JSON object")
    return content


def _dictionary(
    library: str,
    kind: str,
    k: int | None,
    weights: dict[str, Tensor],
    *,
    subtracts_b_dec: bool = False,
    transposed: bool = False,
    is_transcoder: bool | None = False,
) -> ImportedDictionary:
    skip = weights.pop("W_skip", None) if is_transcoder else None
    wanted = {"W_enc", "W_dec", "b_dec", *_PER_LATENT[kind]}
    if surplus := sorted(weights.keys() - wanted):
        raise ValueError(f"has {', '.join(surplus)}, which {kind} does not have")
    doubles = {name: weights[name].double() for name in sorted(wanted)}
    if "threshold" in doubles:
        doubles["threshold"] = doubles["threshold"].clamp_min(0)
    return ImportedDictionary(
        library,
        kind,
        k,
        subtracts_b_dec,
        doubles["W_enc"].T if transposed else doubles["W_enc"],
        doubles["W_dec"],
        doubles["b_dec"],
        {name: doubles[name] for name in _PER_LATENT[kind]},
        None if skip is None else skip.double(),
        is_transcoder,
    )
