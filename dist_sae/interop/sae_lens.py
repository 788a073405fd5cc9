"""`dist-sae export`: a checkpoint as two files that SAELens loads (`SAE.load_from_disk`).

The scale of the activations is folded in, so that the exported dictionary takes raw activations x,
and the decoder's norms, so that its rows have length 1 / s and f says what a latent contributes:

    z = W_enc (s x - b_dec) + b_enc = (s W_enc) (x - b_dec / s) + b_enc
    x_hat = (W_dec^T f + b_dec) / s = ((W_dec / |d|)^T (|d| f) + b_dec) / s

BatchTopK goes out as the JumpReLU that it is at inference.
"""

import json
import logging
from typing import Any

import safetensors.torch
from torch import Tensor

from dist_sae import __version__
from dist_sae.checkpoint.layout import Checkpoint
from dist_sae.checkpoint.trained import find_checkpoint, read_trained, suffix, trained_run
from dist_sae.config import Run, differences
from dist_sae.config.data import HuggingFaceModel
from dist_sae.data.identity import plan_settings
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.recipes.batchtopk import BatchTopK
from dist_sae.errors import ConfigError, ObjectNotFoundError
from dist_sae.storage import UNMETERED, Meter, ObjectStore, open_store

logger = logging.getLogger(__name__)

_CONFIG = "cfg.json"
_WEIGHTS = "sae_weights.safetensors"
# The SAELens format this follows. Below 6, its loader drops the metadata without a word.
_SAELENS_VERSION = "6.54.12"
_ARCHITECTURES = {
    "topk": "topk",
    "batchtopk": "jumprelu",
    "jumprelu": "jumprelu",
    "jumprelu_tanh": "jumprelu",
    "relu": "standard",
}
# TransformerLens's names of our sites.
_HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "mlp_in": "ln2.hook_normalized",
    "mlp_inner": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
    "attn_z": "attn.hook_z",
}


def export(run: Run, meter: Meter = UNMETERED, step: int | None = None) -> str:
    """Write `<run>/export/cfg.json` and `sae_weights.safetensors`; returns where.

    What is there already is not written again. A step that is not the newest has a folder of its
    own, `<run>/export-step-<step>/`.

    Args:
        run: The run.
        meter: Takes the metrics.
        step: Of the checkpoint; None takes the newest.

    Raises:
        ConfigError: There is no checkpoint, or SAELens has no such kind.
        PlanMismatchError: The run was trained with other settings.
    """
    if run.sae.kind not in _ARCHITECTURES:
        raise ConfigError(
            f"sae.kind: {run.sae.kind}: SAELens has nothing like it; use the checkpoint, "
            f"`dist-sae checkpoints convert` makes one file of it"
        )
    runs = open_store(run.store.runs, run.store.s3, meter)
    checkpoint = find_checkpoint(runs, run, step)
    if checkpoint is None:
        raise ConfigError(
            f"{runs.url}/{run.name}: holds no checkpoint yet; run `dist-sae train` first"
        )
    own = trained_run(checkpoint, run).model_copy(update={"export": run.export})
    typed = run.filled(checkpoint.scalars["run"])  # what the file leaves open is no difference
    if changed := differences(plan_settings(own), plan_settings(typed)):
        logger.warning("what the run was trained on is written, not %s", "; ".join(changed))
    folder = f"{run.name}/export{suffix(runs, run, checkpoint.step)}"
    if _is_there(runs, folder, saelens_config(own, checkpoint)):
        logger.info("step %d was exported before: %s/%s", checkpoint.step, runs.url, folder)
    elif trained := read_trained(runs, run, step):
        weights = safetensors.torch.save(folded(trained.sae, trained.scale))
        runs.put(f"{folder}/{_WEIGHTS}", weights)
        config = saelens_config(own, trained.checkpoint)
        runs.put(f"{folder}/{_CONFIG}", json.dumps(config, indent=2).encode())
    return f"{runs.url}/{folder}"


def _is_there(runs: ObjectStore, folder: str, config: dict[str, Any]) -> bool:
    """Whether just this was exported; the configuration is written last."""
    try:
        there = json.loads(runs.get(f"{folder}/{_CONFIG}"))
    except (ObjectNotFoundError, ValueError):
        return False
    return bool(there == config) and runs.size(f"{folder}/{_WEIGHTS}") is not None


def folded(sae: Dictionary, scale: float) -> dict[str, Tensor]:
    """Tensors in SAELens's names and orientation, for raw activations."""
    p = {name: parameter.detach().double() for name, parameter in sae.named_parameters()}
    norms = p["W_dec"].norm(dim=1).clamp_min(1e-30)
    exported = {
        "W_enc": scale * (norms[:, None] * p["W_enc"]).T,
        "b_enc": norms * p["b_enc"],
        "W_dec": p["W_dec"] / (norms[:, None] * scale),
        "b_dec": p["b_dec"] / scale,
    }
    if isinstance(sae, BatchTopK):
        exported["threshold"] = norms * sae.theta
    elif "theta" in p:
        exported["threshold"] = norms * p["theta"] * len(p["b_dec"]) ** 0.5
    return {name: tensor.float().contiguous() for name, tensor in exported.items()}


def saelens_config(run: Run, checkpoint: Checkpoint) -> dict[str, Any]:
    """`cfg.json`, with every key that SAELens writes itself, and what else one should know.

    Args:
        run: As it was trained.
        checkpoint: What is exported.
    """
    site, _, layer = run.site.rpartition(".")
    hugging_face = isinstance(run.model, HuggingFaceModel)
    topk = {"k": run.sae.k, "rescale_acts_by_decoder_norm": False} if run.sae.kind == "topk" else {}
    return {
        "architecture": _ARCHITECTURES[run.sae.kind],
        "d_in": len(checkpoint.scalars["mean"]),
        "d_sae": run.sae.n_latents,
        **topk,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": run.sae.kind in ("topk", "batchtopk"),
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if site == "attn_z" else "none",
        "metadata": {
            "sae_lens_version": _SAELENS_VERSION,
            "sae_lens_training_version": None,
            "model_name": run.export.model_name
            or (run.model.path if isinstance(run.model, HuggingFaceModel) else "synthetic"),
            "model_class_name": "HookedTransformer",
            "hook_name": f"blocks.{layer}.{_HOOKS[site]}" if hugging_face else run.site,
            "hook_head_index": None,
            "context_size": run.activations.context_tokens,
            "prepend_bos": run.activations.prepend_bos,
            "exclude_special_tokens": run.activations.exclude.special_tokens,
            "seqpos_slice": [None],
            "dataset_path": _corpus_name(run),
            "model_from_pretrained_kwargs": {},
            "dist_sae_version": __version__,
            "site": run.site,
            "activation_scale": float(checkpoint.scalars["scale"]),
            "trained_rows": checkpoint.step * run.train.batch_rows,
            "checkpoint": checkpoint.digest,
        },
    }


def _corpus_name(run: Run) -> str:
    match run.corpus.kind:
        case "files":
            return ", ".join(run.corpus.files)
        case "dataset":
            return run.corpus.name
        case _:
            return "synthetic"
