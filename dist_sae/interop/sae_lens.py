"""SAELens: which dictionaries its format can represent, and their files.

The scale s of the activations is folded in, so that the exported dictionary takes raw activations
x. The lengths |d| of the decoder rows are folded in too, so that exported rows have length 1 / s.
Then the code |d| f is the length of a latent's contribution to the scaled reconstruction:

    z = W_enc (s x - b_dec) + b_enc = (s W_enc) (x - b_dec / s) + b_enc
    x_hat = (W_dec^T f + b_dec) / s = ((W_dec / |d|)^T (|d| f) + b_dec) / s

BatchTopK and Matryoshka are written as the JumpReLU that they are at inference. Latents keep their
numbers. The smallest prefix of latent i is the position of the first number in `prefix_pattern` (in
the metadata) that exceeds i modulo the pattern's last number. A gated dictionary's magnitudes are
e^r (s W_enc) x + b_mag, so b_mag is multiplied by |d| like b_enc, and r is unchanged.

Transcoders have scales s of what they read and s_out of what they write, and do not subtract b_dec
from x:

    y_hat = ((W_dec / |d|)^T (|d| f) + W_skip s x + b_dec) / s_out

Imports torch only when it writes, because `problem` also runs where nothing else needs torch.
"""

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, assert_never

from dist_sae import __version__
from dist_sae.config import Run
from dist_sae.config.clt import CLTConfig
from dist_sae.config.crosscoder import CrosscoderConfig
from dist_sae.config.data import HuggingFaceModel, ModelConfig
from dist_sae.config.dictionary import KSelectionConfig
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
    from dist_sae.checkpoint.layout import Checkpoint
    from dist_sae.checkpoint.piecewise import PiecewiseTensor

LIBRARY = "SAELens"
CONFIG = "cfg.json"

# SAELens version that this module follows and states. Below 6, SAELens drops the metadata.
_SAELENS_VERSION = "6.54.12"
_HOOKED, _BRIDGE = "HookedTransformer", "TransformerBridge"
# TransformerLens's names of our sites, and the model class that has them; see docs/python.md
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
    """Return SAELens's name for this kind of dictionary, or None if it has no such kind."""
    match sae:
        case TranscoderConfig():
            name = "jumprelu_skip_transcoder" if sae.skip else "jumprelu_transcoder"
            return name if sae.selects_over_batch else None
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
    """Return why SAELens cannot represent a run's dictionary, or None if it can."""
    if isinstance(run.sae, TranscoderConfig) and not run.sae.selects_over_batch:
        return "sae.selection: row: SAELens supports only transcoders with selection: batch"
    if architecture(run.sae) is None:
        return f"sae.kind: {run.sae.kind}: SAELens does not support this kind"
    if len(run.reads) > 1 or len(run.writes) > 1:
        return f"sae.reads: {run.described_sites}: SAELens does not support several sites"
    return None


def config(run: Run, checkpoint: "Checkpoint") -> str:
    """Return `cfg.json`: every key that SAELens itself writes, with the origin in `metadata`.

    Args:
        run: The run as it was trained, for which `problem` is None.
        checkpoint: The exported checkpoint.
    """
    return json.dumps(_config(run, checkpoint), indent=2)


def _config(run: Run, checkpoint: "Checkpoint") -> dict[str, Any]:
    from dist_sae.checkpoint.trained import normalisers_of
    from dist_sae.interop.raw import model_name

    normalisers, sae = normalisers_of(run, checkpoint), run.sae
    transcodes = isinstance(sae, TranscoderConfig)
    own: dict[str, Any] = {"d_out": normalisers.widths.d_out} if transcodes else {}
    if isinstance(sae, TopKConfig):
        own = {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    hooks = [hook(run.model, site) for site in dict.fromkeys((*run.reads, *run.writes))]
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
        "apply_b_dec_to_input": isinstance(sae, KSelectionConfig) and not transcodes,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if run.site.startswith("attn_z.") else "none",
        "metadata": {
            "sae_lens_version": _SAELENS_VERSION,
            "sae_lens_training_version": None,
            "model_name": model_name(run),
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
            "activation_scale": normalisers.by_site[run.site].scale,
            "trained_rows": checkpoint.step * run.train.batch_rows,
            "checkpoint": checkpoint.digest,
            **nested,
        },
    }


def note(run: Run, checkpoint: "Checkpoint") -> str | None:
    """Return a note for the export's users if only TransformerBridge has its rows, else None."""
    metadata = _config(run, checkpoint)["metadata"]
    if metadata["model_class_name"] != _BRIDGE:
        return None
    return (
        f"load the model with TransformerLens's TransformerBridge, where {run.described_sites} is "
        f"{metadata['hook_name']}; HookedTransformer's hooks have other activations, or none"
    )


def hook(model: ModelConfig, site: str) -> tuple[str, str]:
    """Return the TransformerLens model class that has a site's rows, and its name for them.

    HookedTransformer takes `hook_mlp_out` and `hook_attn_out` after a post-norm if the model has
    one. So these sites get a TransformerBridge name, right for every architecture, unless the model
    is known to have no post-norms.
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


def files(run: Run, checkpoint: "Checkpoint") -> dict[str, Callable[[], Iterator[bytes]]]:
    """Return the weights for raw activations, in fp32 with SAELens's names and orientation.

    Args:
        run: The run as it was trained, for which `problem` is None.
        checkpoint: The exported checkpoint.

    Returns:
        Functions that yield the bytes of each file. Their iterators raise `CorruptObjectError` if
        the checkpoint is damaged.
    """
    from dist_sae.checkpoint.piecewise import safetensors_pieces

    return {"sae_weights.safetensors": lambda: safetensors_pieces(_tensors(run, checkpoint))}


def _tensors(run: Run, checkpoint: "Checkpoint") -> "Iterator[PiecewiseTensor]":
    from dist_sae.interop.raw import RawDictionary, in_memory_tensor

    raw, name = RawDictionary(run, checkpoint), str(architecture(run.sae))
    vectors = {"b_enc"}
    if name.startswith("jumprelu"):
        vectors |= {"threshold"}
    if name == "gated":
        vectors |= {"b_mag", "r_mag"}
    yield raw.encoder("W_enc", transpose=True)
    yield raw.decoder("W_dec")
    for key, tensor in raw.shared.items():
        yield in_memory_tensor(key, tensor)
    for key in vectors:
        gates = name == "gated" and key == "b_enc"
        yield in_memory_tensor("b_gate" if gates else key, raw.per_latent[key])
