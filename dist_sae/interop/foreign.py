"""Dictionaries of other libraries, as their files have them.

SAELens (`cfg.json`, `sae_weights.safetensors`), sparsify (`cfg.json`, `sae.safetensors`) and Gemma
Scope (`params.npz`). What is read takes raw activations x:

    z     = W_enc (x - c) + b_enc        c = b_dec, or 0
    x_hat = W_dec^T f + b_dec

with f the k largest of relu(z) (topk), relu(z) (relu), z H(z - threshold) (jumprelu), or as in
`dictionaries/recipes/gated.py` (gated).
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from dist_sae.errors import ConfigError

_SAE_LENS = ("cfg.json", "sae_weights.safetensors")
_SPARSIFY = ("cfg.json", "sae.safetensors")
_GEMMA_SCOPE = ("params.npz",)
_KINDS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
_OF_KIND = {
    "topk": {"b_enc"},
    "relu": {"b_enc"},
    "jumprelu": {"b_enc", "threshold"},
    "gated": {"b_enc", "b_mag", "r_mag"},
}


class Foreign(NamedTuple):
    """A dictionary as another library stored it, in fp64."""

    library: str
    kind: str
    """The recipe here that encodes alike."""
    k: int | None
    """Latents active on each row; None where thresholds decide."""
    centred: bool
    """Whether b_dec is subtracted from x."""
    W_enc: Float[Tensor, "n_latents d_in"]
    W_dec: Float[Tensor, "n_latents d_in"]
    b_dec: Float[Tensor, " d_in"]
    of_latents: Mapping[str, Float[Tensor, " n_latents"]]
    """b_enc, and threshold, b_mag, r_mag where the kind has them."""


def read_foreign(folder: Path) -> Foreign:
    """Read a dictionary.

    Args:
        folder: Folder with the library's files.

    Raises:
        ConfigError: The files are of no known library, damaged, or of a kind that has no recipe
            here.
    """
    there = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    for names, reader in _READERS.items():
        if there.issuperset(names):
            try:
                found = reader(*(folder / name for name in names))
            except (OSError, ValueError, KeyError, safetensors.SafetensorError) as exc:
                reason = f"lacks {exc}" if isinstance(exc, KeyError) else exc
                raise ConfigError(f"{folder}: cannot be read: {reason}") from exc
            _check(folder, found)
            return found
    pickled = sorted(name for name in there if name.endswith((".pt", ".pth", ".bin", ".pkl")))
    if pickled:
        raise ConfigError(
            f"{folder}: has pickled weights ({pickled[0]}), which can run any code when they are "
            f"read; save them as safetensors where you trust them"
        )
    raise ConfigError(
        f"{folder}: is no dictionary that can be read; SAELens has {' and '.join(_SAE_LENS)}, "
        f"sparsify {' and '.join(_SPARSIFY)}, Gemma Scope {_GEMMA_SCOPE[0]}"
    )


def _sae_lens(config_file: Path, weights_file: Path) -> Foreign:
    config = json.loads(config_file.read_text())
    kind = _KINDS.get(architecture := config.get("architecture", "standard"))
    if kind is None:
        raise ValueError(f"architecture {architecture} has no recipe here")
    if (scaling := config.get("normalize_activations") or "none") != "none":
        raise ValueError(
            f"normalize_activations is {scaling}, and the file lacks its scale; fold it into the "
            f"weights (SAELens: fold_activation_norm_scaling_factor)"
        )
    weights = safetensors.torch.load_file(weights_file)
    if "b_gate" in weights:
        weights["b_enc"] = weights.pop("b_gate")
    centred = bool(config["apply_b_dec_to_input"])
    found = _foreign("SAELens", kind, config.get("k"), weights, centred=centred, transposed=True)
    if config.get("rescale_acts_by_decoder_norm"):  # it selects by f |d|, and decodes with d / |d|
        norms = found.W_dec.norm(dim=1)
        found = found._replace(
            W_enc=norms[:, None] * found.W_enc,
            W_dec=found.W_dec / norms[:, None],
            of_latents={name: norms * vector for name, vector in found.of_latents.items()},
        )
    return found


def _sparsify(config_file: Path, weights_file: Path) -> Foreign:
    config = json.loads(config_file.read_text())
    if config.get("signed") or config.get("transcode") or config.get("skip_connection"):
        raise ValueError("signed latents and transcoders of sparsify have no recipe here")
    if config.get("multi_topk") not in (None, False) or config.get("activation", "topk") != "topk":
        raise ValueError("of sparsify only activation: topk without multi_topk is read")
    weights = safetensors.torch.load_file(weights_file)
    weights["W_enc"] = weights.pop("encoder.weight")
    weights["b_enc"] = weights.pop("encoder.bias")
    return _foreign("sparsify", "topk", config["k"], weights, centred=True)


def _gemma_scope(weights_file: Path) -> Foreign:
    with np.load(weights_file, allow_pickle=False) as arrays:
        weights = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    scale = weights.pop("scaling_factor", torch.ones(1))
    if not bool((scale == 1).all()):
        raise ValueError("scaling_factor is not 1")
    return _foreign("Gemma Scope", "jumprelu", None, weights, transposed=True)


_READERS: dict[tuple[str, ...], Callable[..., Foreign]] = {
    _SAE_LENS: _sae_lens,
    _SPARSIFY: _sparsify,
    _GEMMA_SCOPE: _gemma_scope,
}


def _foreign(
    library: str,
    kind: str,
    k: int | None,
    weights: dict[str, Tensor],
    *,
    centred: bool = False,
    transposed: bool = False,
) -> Foreign:
    wanted = {"W_enc", "W_dec", "b_dec", *_OF_KIND[kind]}
    if surplus := sorted(weights.keys() - wanted):
        raise ValueError(f"has {', '.join(surplus)}, which {kind} has not")
    doubles = {name: weights[name].double() for name in sorted(wanted)}
    return Foreign(
        library,
        kind,
        k,
        centred,
        doubles["W_enc"].T if transposed else doubles["W_enc"],
        doubles["W_dec"],
        doubles["b_dec"],
        {name: doubles[name] for name in _OF_KIND[kind]},
    )


def _check(folder: Path, found: Foreign) -> None:
    shape = tuple(found.W_dec.shape)
    shapes = {
        "W_enc": (tuple(found.W_enc.shape), shape),
        "b_dec": (tuple(found.b_dec.shape), shape[1:]),
        **{name: (tuple(part.shape), shape[:1]) for name, part in found.of_latents.items()},
    }
    for name, (there, wanted) in shapes.items():
        if there != wanted:
            raise ConfigError(
                f"{folder}: {name} has the shape {list(there)}, not {list(wanted)} as W_dec says"
            )
    for name, tensor in (*found._asdict().items(), *found.of_latents.items()):
        if isinstance(tensor, Tensor) and not bool(tensor.isfinite().all()):
            raise ConfigError(f"{folder}: {name} has numbers that are not finite")
    if (found.kind == "topk") != (found.k is not None):
        raise ConfigError(f"{folder}: says k = {found.k} of kind {found.kind}")


def settings(found: Foreign) -> dict[str, Any]:
    """The `sae` section of a run file with this dictionary."""
    n_latents = len(found.W_dec)
    if found.k is not None:
        return {"kind": "topk", "n_latents": n_latents, "k": found.k, "auxk": 0}
    return {"kind": found.kind, "n_latents": n_latents}
