"""Dictionaries read from the files of other libraries.

A dictionary that is read takes raw activations x:

    z     = W_enc (x - c) + b_enc        c = b_dec, or 0
    y_hat = W_dec^T f + b_dec + W_skip x

where f is the k largest of relu(z) (topk), relu(z) (relu), z H(z - threshold) (jumprelu), or as in
`dictionaries/recipes/gated.py` (gated). y = x, except for transcoders.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from dist_sae.config import Run
from dist_sae.errors import ConfigError
from dist_sae.interop import readers
from dist_sae.interop.readers import ImportedDictionary

_EQUAL = 1e-3  # lengths of decoder rows that differ by less, relative to the mean, are equal
_READERS: dict[tuple[str, ...], tuple[str, Callable[..., ImportedDictionary]]] = {
    ("cfg.json", "sae_weights.safetensors"): ("SAELens", readers.sae_lens),
    ("cfg.json", "sae.safetensors"): ("sparsify", readers.sparsify),
    ("params.npz",): ("Gemma Scope", readers.gemma_scope),
    ("config.json", "ae.pt"): ("dictionary_learning", readers.dictionary_learning),
}


def read_dictionary(source: Path) -> ImportedDictionary:
    """Read another library's dictionary.

    Args:
        source: Folder with the library's files, or one layer's file of circuit-tracer.

    Raises:
        ConfigError: The files are of an unknown library, damaged, or of a kind for which dist_sae
            has no recipe.
    """
    try:
        imported = _reader(source)()
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as exc:
        reason = f"{exc} is missing" if isinstance(exc, KeyError) else exc
        raise ConfigError(f"{source}: cannot be read: {reason}") from exc
    _check(source, imported)
    return imported


def _reader(source: Path) -> Callable[[], ImportedDictionary]:
    if source.is_file() and source.name.endswith(".safetensors"):
        return partial(readers.circuit_tracer, source)
    there = {file.name for file in source.iterdir()} if source.is_dir() else set()
    for names, (_, reader) in _READERS.items():
        if there.issuperset(names):
            return partial(reader, *(source / name for name in names))
    if "W_enc_0.safetensors" in there:
        return partial(readers.circuit_tracer_layers, source)
    if layers := sorted(source.glob("layer_*.safetensors")):
        if len(layers) > 1:
            raise ConfigError(
                f"{source}: contains transcoders of {len(layers)} layers; give the file of one "
                f"layer, for example {layers[0]}"
            )
        return partial(readers.circuit_tracer, layers[0])
    pickled = sorted(name for name in there if name.endswith((".pt", ".pth", ".bin", ".pkl")))
    if pickled:
        raise ConfigError(
            f"{source}: contains pickled weights ({pickled[0]}), which can run arbitrary code when "
            f"loaded; if you trust them, convert them to safetensors first"
        )
    known = ", ".join(f"{library} ({' and '.join(n)})" for n, (library, _) in _READERS.items())
    raise ConfigError(
        f"{source}: not a dictionary in a known format; known formats: {known}, circuit-tracer "
        f"(layer_<l>.safetensors, or W_enc_<l>.safetensors and W_dec_<l>.safetensors)"
    )


def _check(source: Path, imported: ImportedDictionary) -> None:
    if imported.W_dec.ndim != 2 or imported.W_enc.ndim != 2:  # noqa: PLR2004 - rows and columns
        raise ConfigError(f"{source}: W_enc and W_dec are not matrices")
    n_latents, d_out = imported.W_dec.shape
    d_in = imported.W_enc.shape[1] if imported.is_transcoder else d_out
    shapes = {
        "W_enc": (imported.W_enc, (n_latents, d_in)),
        "b_dec": (imported.b_dec, (d_out,)),
        **{name: (part, (n_latents,)) for name, part in imported.per_latent.items()},
    }
    if imported.W_skip is not None:
        shapes["W_skip"] = imported.W_skip, (d_out, d_in)
    for name, (tensor, wanted) in shapes.items():
        if tensor.shape != wanted:
            raise ConfigError(
                f"{source}: {name} has shape {list(tensor.shape)}, but W_dec's shape requires "
                f"{list(wanted)}"
            )
    for name, tensor in (*imported._asdict().items(), *imported.per_latent.items()):
        if isinstance(tensor, Tensor) and not bool(tensor.isfinite().all()):
            raise ConfigError(f"{source}: {name} contains non-finite values")
    if (imported.kind == "topk") != (imported.k is not None):
        raise ConfigError(
            f"{source}: has k = {imported.k}, which does not fit kind {imported.kind}"
        )


def sae_section(imported: ImportedDictionary, run: Run, source: Path) -> dict[str, Any]:
    """Return the `sae` section of a run file for this dictionary on the run's sites.

    A TopK dictionary whose decoder rows differ in length becomes a transcoder from a site to
    itself. The recipe `topk` has unit rows, and normalizing the rows would change which codes are
    the k largest.

    Raises:
        ConfigError: The sites do not fit the dictionary, or dist_sae has no recipe for it.
    """
    sae: dict[str, Any] = {"n_latents": len(imported.W_dec)}
    sae |= {"reads": run.sae.reads, "writes": run.sae.writes}
    differ = run.reads != run.writes
    if imported.is_transcoder is not None and differ != imported.is_transcoder:
        remedy = (
            "is a transcoder; set sae.reads and sae.writes to its input and output sites"
            if imported.is_transcoder
            else "reconstructs its input; remove sae.writes"
        )
        raise ConfigError(f"{source}: {remedy}")
    if differ and len(run.reads) != imported.layers:
        raise ConfigError(
            f"{source}: reads {imported.layers} layers, but the run file names "
            f"{run.described_sites}; name one input and one output site for each layer"
        )
    if imported.k is not None:
        sae |= {"k": imported.k, "auxk": 0}
        norms = imported.W_dec.norm(dim=1)
        if differ or bool(norms.max() - norms.min() > _EQUAL * norms.mean()):
            return {"kind": "transcoder", "skip": imported.W_skip is not None, **sae}
        return {"kind": "topk", **sae}
    if imported.W_skip is not None:
        raise ConfigError(
            f"{source}: has a skip connection and thresholds; dist_sae has no recipe with both"
        )
    return {"kind": "clt_jumprelu" if differ else imported.kind, **sae}
