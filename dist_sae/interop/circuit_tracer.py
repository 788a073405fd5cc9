"""circuit-tracer: transcoders and cross-layer transcoders of MLPs, for attribution graphs.

Writes `config.yaml` and these files, in which every matrix has one row per latent:

    transcoder of layer l   layer_<l>.safetensors: W_enc, b_enc, W_dec, b_dec, W_skip if there is
                            one, activation_function.threshold
    cross-layer, layer l    W_enc_<l>.safetensors: W_enc_<l>, b_enc_<l>, b_dec_<l>, threshold_<l>
                            W_dec_<l>.safetensors: W_dec_<l> [latents, layers - l, d], for layers
                            from l on

A code is z where z exceeds the threshold, and b_dec is not subtracted from x. Decoder rows of a
transcoder have length 1. Latents of a cross-layer transcoder write several layers, so their lengths
are not changed. Latent i of layer l is our latent i * layers + l.

The hook points are the MLP's own input and output (`mlp.hook_in`, `mlp.hook_out`), which are our
sites `mlp_in` and `mlp_out` in every architecture.

Imports torch only when it writes, so that `problem` is fast.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import yaml

from dist_sae.config import Run
from dist_sae.config.clt import CrossLayerConfig
from dist_sae.config.data import HuggingFaceModel, layer_of
from dist_sae.config.transcoder import TranscoderConfig
from dist_sae.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from dist_sae.checkpoint.layout import Checkpoint
    from dist_sae.checkpoint.pages import PagedDictionary
    from dist_sae.checkpoint.piecewise import PiecewiseTensor

LIBRARY = "circuit-tracer"
CONFIG = "config.yaml"


def problem(run: Run) -> str | None:
    """Return why circuit-tracer cannot represent a run's dictionary, or None if it can."""
    sae = run.sae
    if isinstance(sae, TranscoderConfig):
        if not sae.selects_over_batch:
            return (
                "sae.selection: row: circuit-tracer supports only transcoders with selection: batch"
            )
    elif not isinstance(sae, CrossLayerConfig):
        return f"sae.kind: {sae.kind}: circuit-tracer supports only transcoders"
    if not isinstance(run.model, HuggingFaceModel):
        return f"model.kind: {run.model.kind}: circuit-tracer supports only language models"
    return _sites_problem(run)


def _sites_problem(run: Run) -> str | None:
    layers = [layer_of(site.partition("@")[0]) for site in run.reads]
    mlps = [[f"{name}.{layer}" for layer in layers] for name in ("mlp_in", "mlp_out")]
    if [list(run.reads), list(run.writes)] != mlps:
        return (
            f"sae.reads: {run.described_sites}: circuit-tracer replaces MLPs, so sae.reads must be "
            f"mlp_in and sae.writes mlp_out of the same layers"
        )
    if isinstance(run.sae, TranscoderConfig) and len(layers) > 1:
        return f"sae.reads: {run.described_sites}: circuit-tracer needs one transcoder per layer"
    if isinstance(run.sae, CrossLayerConfig) and layers != list(range(len(layers))):
        return f"sae.reads: {run.described_sites}: circuit-tracer needs every layer from 0 up"
    return None


def config(run: Run, checkpoint: "Checkpoint") -> str:
    """Return `config.yaml`: the keys that circuit-tracer reads, and under `dist_sae` the origin."""
    from dist_sae.checkpoint.trained import normalisers_of
    from dist_sae.interop.raw import model_name, origin

    widths = normalisers_of(run, checkpoint).widths
    if set(widths.reads) != set(widths.writes):
        raise ConfigError(
            f"sae.reads: {run.described_sites}: circuit-tracer needs one width, but these sites "
            f"have {widths.reads[0]} and {widths.writes[0]}"
        )
    crosses = isinstance(run.sae, CrossLayerConfig)
    content = {
        "model_name": model_name(run),
        "model_kind": "cross_layer_transcoder" if crosses else "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
        "dist_sae": origin(run, checkpoint),
    }
    return yaml.safe_dump(content, sort_keys=False)


def files(run: Run, checkpoint: "Checkpoint") -> dict[str, Callable[[], Iterator[bytes]]]:
    """Return functions that yield each weight file, for raw activations in fp32."""
    from dist_sae.checkpoint.piecewise import safetensors_pieces

    if isinstance(run.sae, TranscoderConfig):
        name = f"layer_{layer_of(run.site)}.safetensors"
        return {name: lambda: safetensors_pieces(_transcoder(run, checkpoint))}
    found: dict[str, Callable[[], Iterator[bytes]]] = {}
    for layer in range(len(run.reads)):
        for name, tensors in (("W_enc", _encoder), ("W_dec", _decoder)):
            of_layer = partial(tensors, run, checkpoint, layer)
            found[f"{name}_{layer}.safetensors"] = partial(_pieces, of_layer)
    return found


def note(run: Run, checkpoint: "Checkpoint") -> str | None:  # noqa: ARG001 - all formats have it
    """Return what a replacement model needs in addition: the transcoders of all other layers."""
    if isinstance(run.sae, CrossLayerConfig):
        return None
    return (
        f"circuit-tracer needs a transcoder for every layer: put the files of all layers next to "
        f"layer_{layer_of(run.site)}.safetensors"
    )


def _pieces(tensors: "Callable[[], Iterator[PiecewiseTensor]]") -> Iterator[bytes]:
    from dist_sae.checkpoint.piecewise import safetensors_pieces

    yield from safetensors_pieces(tensors())


def _transcoder(run: Run, checkpoint: "Checkpoint") -> "Iterator[PiecewiseTensor]":
    from dist_sae.interop.raw import RawDictionary, in_memory_tensor

    raw = RawDictionary(run, checkpoint, unit_rows=True)
    yield raw.encoder("W_enc")
    yield raw.decoder("W_dec")
    for name, tensor in raw.shared.items():
        yield in_memory_tensor(name, tensor)
    yield in_memory_tensor("b_enc", raw.per_latent["b_enc"])
    yield in_memory_tensor("activation_function.threshold", raw.per_latent["threshold"])


def _paged(run: Run, checkpoint: "Checkpoint") -> "PagedDictionary":
    from dist_sae.checkpoint.pages import PagedDictionary
    from dist_sae.checkpoint.trained import normalisers_of
    from dist_sae.interop.raw import MEMORY_BYTES

    widths = normalisers_of(run, checkpoint).widths
    return PagedDictionary(run.sae, widths, checkpoint, MEMORY_BYTES)


def _encoder(run: Run, checkpoint: "Checkpoint", layer: int) -> "Iterator[PiecewiseTensor]":
    """Yield the encoder of the latents that read a layer, and the bias of what is written to it."""
    import torch

    from dist_sae.checkpoint.piecewise import PiecewiseTensor
    from dist_sae.checkpoint.trained import normalisers_of
    from dist_sae.interop.raw import in_memory_tensor

    normalisers, layers = normalisers_of(run, checkpoint), len(run.reads)
    paged = _paged(run, checkpoint)
    scale, site = normalisers.by_site[run.reads[layer]].scale, run.writes[layer]
    out = normalisers.by_site[site].scale
    biases, thresholds, b_dec = [], [], torch.empty(0)
    for page in paged.pages(leave_out={"W_enc", "W_dec"}):
        above = page.inference_thresholds(torch.float64)
        assert above is not None
        thresholds.append(above[layer::layers])
        biases.append(page.b_enc.detach()[layer::layers].clone())
        b_dec = page.b_dec.detach()[normalisers.columns[site]].double() / out

    def rows() -> "Iterator[Tensor]":
        for page in paged.pages(leave_out={"W_dec"}):
            yield (page.W_enc.detach()[layer::layers].double() * scale).float()

    shape = (run.sae.n_latents // layers, normalisers.widths.reads[layer])
    yield PiecewiseTensor(f"W_enc_{layer}", torch.float32, shape, rows)
    yield in_memory_tensor(f"b_enc_{layer}", torch.cat(biases))
    yield in_memory_tensor(f"threshold_{layer}", torch.cat(thresholds))
    yield in_memory_tensor(f"b_dec_{layer}", b_dec)


def _decoder(run: Run, checkpoint: "Checkpoint", layer: int) -> "Iterator[PiecewiseTensor]":
    """Yield the decoder of the latents that read a layer, for this layer and each later one."""
    import torch

    from dist_sae.checkpoint.piecewise import PiecewiseTensor
    from dist_sae.checkpoint.trained import normalisers_of

    normalisers, layers = normalisers_of(run, checkpoint), len(run.reads)
    paged = _paged(run, checkpoint)
    scales = torch.tensor([normalisers.by_site[site].scale for site in run.writes[layer:]])
    width = normalisers.widths.writes[layer]
    n_latents = run.sae.n_latents // layers

    def rows() -> "Iterator[Tensor]":
        for page in paged.pages(leave_out={"W_enc"}):
            latents = torch.arange(layer, len(page.b_enc), layers)
            _, written = page.decoder_block(latents, page.W_dec.detach())
            by_layer: Any = written.reshape(-1, layers - layer, width)
            yield (by_layer.double() / scales.double()[:, None]).float()

    shape = (n_latents, layers - layer, width)
    yield PiecewiseTensor(f"W_dec_{layer}", torch.float32, shape, rows)
