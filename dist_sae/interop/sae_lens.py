"""SAELens: which dictionaries it can hold, and how it writes them.

The scale of the activations is folded in, so that the exported dictionary takes raw activations x,
and the decoder's norms, so that its rows have length 1 / s and f is the length of a contribution:

    z = W_enc (s x - b_dec) + b_enc = (s W_enc) (x - b_dec / s) + b_enc
    x_hat = (W_dec^T f + b_dec) / s = ((W_dec / |d|)^T (|d| f) + b_dec) / s

BatchTopK and Matryoshka are written as the JumpReLU that they are at inference. Latents keep their
numbers. Latent i is in the prefix that the first number of `prefix_pattern` (in the metadata) above
i modulo its last belongs to. A gated dictionary's magnitudes are e^r (s W_enc) x + b_mag, so |d|
multiplies b_mag like b_enc, and r stays as it is.

Transcoders have a scale s of what they read and s_out of what they write, and are not centred:

    y_hat = ((W_dec / |d|)^T (|d| f) + W_skip s x + b_dec) / s_out

Imports no torch: `problem` is asked where nobody else needs it.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, assert_never

from dist_sae import __version__
from dist_sae.config import Run
from dist_sae.config.clt import CLTConfig
from dist_sae.config.crosscoder import CrosscoderConfig
from dist_sae.config.data import HuggingFaceModel, ModelConfig
from dist_sae.config.dictionary import CountsLatentsConfig
from dist_sae.config.matryoshka import MatryoshkaConfig
from dist_sae.config.sae import (
    BatchTopKConfig,
    CLTJumpReLUConfig,
    CrosscoderReLUConfig,
    GatedConfig,
    JumpReLUConfig,
    JumpReLUTanhConfig,
    ReLUConfig,
    RoutedConfig,
    SaeConfig,
    TopKConfig,
)
from dist_sae.config.transcoder import TranscoderConfig

if TYPE_CHECKING:
    from torch import Tensor

    from dist_sae.checkpoint.layout import Checkpoint
    from dist_sae.checkpoint.piecewise import PiecewiseTensor

# The SAELens version this follows. Below 6, its loader drops the metadata without a word.
_SAELENS_VERSION = "6.54.12"
MEMORY_BYTES = 512 * 2**20
"""Bytes that the weights may take; in fp64, and beside a block of the transpose, less than 2 GB."""
_HOOKED, _BRIDGE = "HookedTransformer", "TransformerBridge"
# Names of our sites in TransformerLens, with the class of models that has them; see docs/python.md
_HOOKS = {
    "resid_pre": (_HOOKED, "hook_resid_pre"),
    "resid_post": (_HOOKED, "hook_resid_post"),
    "mlp_in": (_BRIDGE, "mlp.hook_in"),  # HookedTransformer has no name for it after an RMSNorm
    "mlp_inner": (_HOOKED, "mlp.hook_post"),
    "mlp_out": (_HOOKED, "hook_mlp_out"),
    "attn_out": (_HOOKED, "hook_attn_out"),
    "attn_z": (_HOOKED, "attn.hook_z"),
}
_BEFORE_POST_NORM = {
    "mlp_out": (_BRIDGE, "mlp.hook_out"),
    "attn_out": (_BRIDGE, "attn.hook_out"),
}


def architecture(sae: SaeConfig) -> str | None:
    """SAELens's name for this kind of dictionary; None if it has nothing like it."""
    match sae:
        case TranscoderConfig():
            name = "jumprelu_skip_transcoder" if sae.skip else "jumprelu_transcoder"
            return name if sae.over_batch else None
        case (
            RoutedConfig()
            | CLTConfig()
            | CLTJumpReLUConfig()
            | CrosscoderConfig()
            | CrosscoderReLUConfig()
        ):
            return None
        case TopKConfig():
            return "topk"
        case BatchTopKConfig() | MatryoshkaConfig() | JumpReLUConfig() | JumpReLUTanhConfig():
            return "jumprelu"
        case ReLUConfig():
            return "standard"
        case GatedConfig():
            return "gated"
        case _:
            assert_never(sae)


def problem(run: Run) -> str | None:
    """Why SAELens cannot hold the dictionary of a run; None if it can."""
    if isinstance(run.sae, TranscoderConfig) and not run.sae.over_batch:
        return "sae.selection: row: SAELens has transcoders of batch alone, as JumpReLU"
    if architecture(run.sae) is None:
        return f"sae.kind: {run.sae.kind}: SAELens has nothing like it"
    if len(run.reads) > 1 or len(run.writes) > 1:
        return f"sae.reads: {run.described_sites}: SAELens has no dictionaries of several sites"
    return None


def config(run: Run, checkpoint: "Checkpoint") -> dict[str, Any]:
    """`cfg.json`: every key that SAELens writes itself, and in `metadata` where it comes from.

    Args:
        run: The run as it was trained; SAELens can hold its dictionary.
        checkpoint: The exported checkpoint.
    """
    from dist_sae.checkpoint.trained import normalisers_of

    normalisers, model, sae = normalisers_of(run, checkpoint), run.model, run.sae
    if isinstance(model, HuggingFaceModel):
        model, _ = model.of_site(run.site)
    transcodes = isinstance(sae, TranscoderConfig)
    own: dict[str, Any] = {"d_out": normalisers.widths.d_out} if transcodes else {}
    if isinstance(sae, TopKConfig):
        own = {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    hooks = [_hook(run.model, site) for site in dict.fromkeys((*run.reads, *run.writes))]
    nested: dict[str, Any] = {}
    if isinstance(sae, MatryoshkaConfig):
        nested = {"prefix_pattern": list(sae.prefix_pattern)}
    return {
        "architecture": architecture(sae),
        "d_in": normalisers.widths.d_in,
        "d_sae": sae.n_latents,
        **own,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": isinstance(sae, CountsLatentsConfig) and not transcodes,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if run.site.startswith("attn_z.") else "none",
        "metadata": {
            "sae_lens_version": _SAELENS_VERSION,
            "sae_lens_training_version": None,
            "model_name": run.export.model_name
            or (model.path if isinstance(model, HuggingFaceModel) else model.kind),
            "model_class_name": _BRIDGE if _BRIDGE in dict(hooks) else _HOOKED,
            "hook_name": hooks[0][1],
            **({"hook_name_out": hooks[-1][1]} if transcodes else {}),
            "hook_head_index": None,
            "context_size": run.activations.context_tokens,
            "prepend_bos": run.activations.prepend_bos,
            "exclude_special_tokens": run.activations.exclude.special_tokens,
            "seqpos_slice": [None],
            "dataset_path": run.corpus.label,
            "model_from_pretrained_kwargs": {},
            "dist_sae_version": __version__,
            "site": run.site,
            "activation_scale": normalisers.of[run.site].scale,
            "trained_rows": checkpoint.step * run.train.batch_rows,
            "checkpoint": checkpoint.digest,
            **nested,
        },
    }


def needs_bridge(config: dict[str, Any]) -> bool:
    """Whether only TransformerLens's newer class of models has the rows that `cfg.json` names."""
    return bool(config["metadata"]["model_class_name"] == _BRIDGE)


def _hook(model: ModelConfig, site: str) -> tuple[str, str]:
    """TransformerLens's class of models, and its name for the rows of a site there.

    `hook_mlp_out` and `hook_attn_out` are taken after a norm where one follows. Names of the bridge
    are right for every architecture.
    """
    if not isinstance(model, HuggingFaceModel):
        return _HOOKED, site
    model, site = model.of_site(site)
    name, _, layer = site.rpartition(".")
    model_class, hook = _HOOKS[name]
    if name in _BEFORE_POST_NORM:
        from dist_sae.models.loading import has_post_norms

        if has_post_norms(model) is not False:
            model_class, hook = _BEFORE_POST_NORM[name]
    return model_class, f"blocks.{layer}.{hook}"


def weights(run: Run, checkpoint: "Checkpoint") -> "list[PiecewiseTensor]":
    """Tensors with SAELens's names and orientation, for raw activations, in fp32.

    Numbers of each latent are read at once, the matrices part by part when their pieces are made.

    Args:
        run: The run as it was trained; SAELens can hold its dictionary.
        checkpoint: The exported checkpoint.

    Raises:
        CorruptObjectError: The checkpoint is damaged. Making the pieces raises it as well.
    """
    import torch

    from dist_sae.checkpoint.pages import PagedDictionary
    from dist_sae.checkpoint.piecewise import PiecewiseTensor, transposed
    from dist_sae.checkpoint.trained import normalisers_of

    sae, normalisers = run.sae, normalisers_of(run, checkpoint)
    (d_in,), (d_out,) = normalisers.widths
    scale, out = (normalisers.of[site].scale for site in (*run.reads, *run.writes))
    paged = PagedDictionary(sae, normalisers.widths, checkpoint, MEMORY_BYTES)
    has_thresholds = str(architecture(sae)).startswith("jumprelu")
    vectors: dict[str, list[Tensor]] = {}
    of_all: dict[str, Tensor] = {}
    for page in paged.pages(leave_out={"W_enc"}):
        p = {name: tensor.detach().double() for name, tensor in page.tensors() if name != "W_enc"}
        norms = p["W_dec"].norm(dim=1).clamp_min(1e-30)
        found = {"norms": norms, "b_enc": norms * p["b_enc"]}
        thresholds = page.inference_thresholds(norms.dtype)
        if has_thresholds and thresholds is not None:
            found["threshold"] = norms * thresholds
        if architecture(sae) == "gated":
            found["b_gate"] = found.pop("b_enc")
            found |= {"b_mag": norms * p["b_mag"], "r_mag": p["r_mag"]}
        for name, vector in found.items():
            vectors.setdefault(name, []).append(vector)
        of_all = {"b_dec": p["b_dec"] / out}
        if "W_skip" in p:
            of_all["W_skip"] = p["W_skip"] * (scale / out)
    of_latents = {name: torch.cat(parts) for name, parts in vectors.items()}
    norms = of_latents.pop("norms")

    def matrix(name: str) -> "Iterator[tuple[Tensor, Tensor]]":
        """Norms of some latents, and their rows."""
        first = 0
        for page in paged.pages(leave_out={"W_enc", "W_dec"} - {name}):
            rows = page.get_parameter(name).detach()
            yield norms[first : first + len(rows), None], rows
            first += len(rows)

    def decoder() -> "Iterator[Tensor]":
        for of_rows, rows in matrix("W_dec"):
            yield (rows.double() / (of_rows * out)).float()

    def encoder(columns: slice) -> "Iterator[Tensor]":
        for of_rows, rows in matrix("W_enc"):
            yield (scale * (of_rows * rows[:, columns].double())).float()

    def small(name: str, tensor: "Tensor") -> PiecewiseTensor:
        return PiecewiseTensor(name, torch.float32, tuple(tensor.shape), lambda: (tensor.float(),))

    return [
        PiecewiseTensor("W_dec", torch.float32, (sae.n_latents, d_out), decoder),
        transposed("W_enc", (d_in, sae.n_latents), encoder),
        *(small(name, tensor) for name, tensor in (of_all | of_latents).items()),
    ]
