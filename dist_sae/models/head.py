"""The end of a language model: its final norm and its unembedding, without layers."""

import gc
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import xxhash
from jaxtyping import Float
from torch import Tensor, nn

from dist_sae.config.data import HuggingFaceModel, layer_of
from dist_sae.errors import HeadlessError, LacksWeightsError
from dist_sae.models.loading import HEADS, describe, errors_of, load, without_layers
from dist_sae.models.sites import blocks

WRITE_TO_RESIDUAL = ("resid_pre", "resid_post", "mlp_out", "attn_out")
"""Kinds of sites whose activations are the residual stream or are added to it."""
_FINAL_NORM = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm", "norm_f")
"""Names of the final norm in common architectures. It is a sibling of the stack of layers."""


class Head(NamedTuple):
    """A final norm and the linear head after it."""

    unembedding: Float[Tensor, "vocabulary d"]
    """Unembedding matrix, in the model's precision."""
    gain: Float[Tensor, " d"]
    """Factor of each channel in the final norm, fp32."""
    mean: Float[Tensor, " d"]
    """Mean of the unembedding over the vocabulary, fp32."""
    digest: str
    """Digest of norm and unembedding. Heads with the same digest predict the same tokens."""
    centres: bool
    """True if the norm subtracts the mean over channels (LayerNorm), False if not (RMSNorm)."""


def final_contributions(sites: Sequence[str]) -> tuple[str, ...]:
    """Select the sites that together are a dictionary's contribution to the final residual stream.

    Returns:
        The last residual stream if the sites include one, else all outputs of MLPs and attention.
        If no site is written to the residual stream, the first site.
    """
    names = {site: site.rpartition(".")[0] for site in sites}
    streams = [site for site, name in names.items() if name.startswith("resid")]
    if streams:  # resid_post of a layer is resid_pre of the next one
        return (max(streams, key=lambda site: layer_of(site) + (names[site] == "resid_post")),)
    added = tuple(site for site, name in names.items() if name in WRITE_TO_RESIDUAL)
    return added or (sites[0],)


def load_head(config: HuggingFaceModel, site: str) -> Head:
    """Load a model's head. The weights of its layers are not read.

    Raises:
        HeadlessError: The model has no linear head after a final norm, or the site's activations
            are not added to the residual stream directly.
        ModelError: The model cannot be loaded, or lacks the site.
    """
    name, _, _ = site.rpartition(".")
    if name not in WRITE_TO_RESIDUAL:
        raise HeadlessError(f"{site} is not written to the residual stream, which the head reads")
    description = describe(config, (site,))
    if name.endswith("_out") and hasattr(
        blocks(description.skeleton)[0], "post_feedforward_layernorm"
    ):
        raise HeadlessError(f"{site} goes through a norm before it joins the residual stream")
    reason = f"transformers has no head for {description.config.model_type} that predicts tokens"
    for heads, masked in HEADS:
        if masked or type(description.config) not in heads:
            continue
        with_layers: Any = heads[type(description.config)]
        try:
            with errors_of(config):
                model = load(without_layers(with_layers, above=-1), config, description)
                return _head(model, config.path)
        except LacksWeightsError as exc:
            reason = f"its files contain no head that predicts tokens (no {exc.names[0]})"
    raise HeadlessError(f"model.path {config.path}: {reason}")


@torch.no_grad()
def _head(model: Any, path: str) -> Head:
    stack = blocks(model)
    parent = next(m for m in model.modules() if any(child is stack for child in m.children()))
    norm = next((n for name in _FINAL_NORM if (n := getattr(parent, name, None))), None)
    unembedding = getattr(model.get_output_embeddings(), "weight", None)
    if norm is None or unembedding is None:
        lacking = "final norm" if norm is None else "linear head"
        raise HeadlessError(f"model.path {path}: has no {lacking} under a known name")
    unembedding = unembedding.detach()
    digest = _digest([*norm.state_dict().values(), unembedding])  # before float() changes the norm
    gain, centres = _measure(norm.float(), unembedding.shape[1], unembedding.device)
    del model, parent, stack
    # models contain reference cycles, and the input embedding is as large as the head
    gc.collect()
    mean = unembedding.mean(0, dtype=torch.float32)
    return Head(unembedding, gain, mean, digest, centres)


def _digest(tensors: Iterable[Tensor]) -> str:
    whole = xxhash.xxh3_128()
    for tensor in tensors:
        whole.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def _measure(norm: nn.Module, width: int, device: torch.device) -> tuple[Float[Tensor, " d"], bool]:
    """Measure a norm's gain and whether it subtracts the mean, by applying it to test rows.

    This needs no list of norm classes. For example, Gemma's gain is 1 + its weight, while other
    norms' gain is the weight.
    """
    sign = torch.ones(1, 1, width, device=device)
    sign[..., 1::2] = -1
    row = 1000 * sign  # mean 0, and so large that the norm's epsilon is negligible
    gain = (norm(row) - norm(-row)) / 2 / sign  # the difference cancels the bias
    shifted = (norm(row + 3000) - norm(-row - 3000)) / 2
    return gain[0, 0], bool((shifted - gain * sign).norm() < 0.01 * gain.norm())
