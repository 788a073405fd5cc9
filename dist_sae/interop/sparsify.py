"""sparsify: TopK dictionaries and transcoders of one site, as its `SparseCoder` loads them.

`encoder.weight` and `W_dec` are [n_latents, d]. Autoencoders subtract b_dec from x, transcoders do
not. A skip connection is `W_skip` [d_out, d_in]. An autoencoder's decoder rows have length 1,
because sparsify sets them to length 1 if training continues. So codes are in the units of raw
activations. A transcoder's rows keep different lengths, because unit rows would change which codes
are the k largest. Their mean length is 1.

Imports torch only when it writes, so that `problem` is fast.
"""

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from dist_sae.config import Run
from dist_sae.config.sae import TopKConfig
from dist_sae.config.transcoder import TranscoderConfig
from dist_sae.errors import ConfigError

if TYPE_CHECKING:
    from dist_sae.checkpoint.layout import Checkpoint
    from dist_sae.checkpoint.piecewise import PiecewiseTensor

LIBRARY = "sparsify"
CONFIG = "cfg.json"


def problem(run: Run) -> str | None:
    """Return why sparsify cannot represent a run's dictionary, or None if it can."""
    if isinstance(run.sae, TranscoderConfig):
        if run.sae.selects_over_batch:
            return "sae.selection: batch: sparsify supports only selection: row"
    elif not isinstance(run.sae, TopKConfig):
        return f"sae.kind: {run.sae.kind}: sparsify supports only TopK"
    if len(run.reads) > 1 or len(run.writes) > 1:
        return f"sae.reads: {run.described_sites}: sparsify does not support several sites"
    return None


def config(run: Run, checkpoint: "Checkpoint") -> str:
    """Return `cfg.json`: every key of sparsify, and the origin under `dist_sae`."""
    from dist_sae.checkpoint.trained import normalisers_of
    from dist_sae.interop.raw import origin

    assert isinstance(run.sae, TopKConfig | TranscoderConfig)
    (d_in,), (d_out,) = normalisers_of(run, checkpoint).widths
    if d_in != d_out:
        raise ConfigError(
            f"sae.reads: {run.described_sites}: sparsify needs one width, but these sites have "
            f"{d_in} and {d_out}"
        )
    transcodes = isinstance(run.sae, TranscoderConfig)
    content = {
        "activation": "topk",
        "expansion_factor": -(-run.sae.n_latents // d_in),  # `num_latents` takes precedence
        "normalize_decoder": not transcodes,
        "num_latents": run.sae.n_latents,
        "k": run.sae.k,
        "multi_topk": False,
        "skip_connection": run.sae.has_skip,
        "transcode": transcodes,
        "d_in": d_in,
        "dist_sae": origin(run, checkpoint),
    }
    return json.dumps(content, indent=2)


def files(run: Run, checkpoint: "Checkpoint") -> dict[str, Callable[[], Iterator[bytes]]]:
    """Return the function that yields the weight file, for raw activations in fp32."""
    from dist_sae.checkpoint.piecewise import safetensors_pieces

    return {"sae.safetensors": lambda: safetensors_pieces(_tensors(run, checkpoint))}


def note(run: Run, checkpoint: "Checkpoint") -> str:  # noqa: ARG001 - all formats have it
    """Return a note on how sparsify finds the site."""
    return (
        f"sparsify takes the hook point from the folder's name: rename the folder to the module of "
        f"{run.described_sites}, for example layers.3.mlp"
    )


def _tensors(run: Run, checkpoint: "Checkpoint") -> "Iterator[PiecewiseTensor]":
    from dist_sae.interop.raw import RawDictionary, in_memory_tensor

    raw = RawDictionary(run, checkpoint, unit_rows=True)
    yield raw.encoder("encoder.weight")
    yield in_memory_tensor("encoder.bias", raw.per_latent["b_enc"])
    yield raw.decoder("W_dec")
    for name, tensor in raw.shared.items():
        yield in_memory_tensor(name, tensor)
