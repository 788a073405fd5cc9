"""Output tokens of latents: the direct effect of a decoder row on the logits.

    effect = ((W_dec[i] - mean) * gain) @ W_U,    less its mean over the vocabulary

W_U is the unembedding, and gain is the weight of the final norm. `mean` is the mean over channels
if that norm is a LayerNorm, and 0 for an RMSNorm. This is the logit lens with the norm folded into
the centered unembedding, as in TransformerLens and Neuronpedia. It ignores later layers, and the
division by the norm of the whole residual stream. So the effects of one latent can be compared with
each other, but not with logits.

If several sites are written, W_dec[i] is what the latent adds to the residual stream. That is the
part for the last residual stream if one is written, since it contains the earlier ones. Otherwise
it is the sum over the outputs of MLPs and attention. Rows are in the scale of the first site of
this sum. With two models, only the sites of the first model count.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_sae.config.data import HuggingFaceModel, ModelConfig
from dist_sae.dictionaries.normaliser import SiteNormalisers
from dist_sae.errors import ConfigError, ModelError
from dist_sae.index.layout import IndexManifest

if TYPE_CHECKING:  # transformers takes 3 s
    from dist_sae.models.head import Head

logger = logging.getLogger(__name__)

LATENTS = 1024
VOCABULARY = 8192
"""`LATENTS` and `VOCABULARY` are the numbers of latents and tokens whose effects are computed at a
time, in 32 MiB."""


_Parts = Sequence[tuple[slice, float]]
"""Columns of decoder rows that are summed in the residual stream, with their factors."""


class ExtremeTokens(NamedTuple):
    """The tokens with the most extreme effects of some latents at one end, most extreme first."""

    tokens: Int[Tensor, "latents n"]
    effects: Float[Tensor, "latents n"]


class OutputTokens:
    """Finds the output tokens of latents.

    Args:
        head: The model's head; with None there are no output tokens.
        n: Number of tokens at either end.
        parts: The columns of a decoder row that reach the head.
    """

    def __init__(self, head: "Head | None", n: int, parts: _Parts = ((slice(None), 1.0),)) -> None:
        self._head = head
        self._n = n
        self._parts = parts

    @torch.no_grad()
    def of(self, rows: Float[Tensor, "latents d_out"]) -> dict[str, ExtremeTokens]:
        """Find the tokens whose logits a decoder row raises (`top`) or lowers (`bottom`) most."""
        if self._head is None:
            none = ExtremeTokens(torch.empty(len(rows), 0).long(), torch.empty(len(rows), 0))
            return {"top": none, "bottom": none}
        rows = torch.stack([factor * rows[:, part] for part, factor in self._parts]).sum(0)
        blocks = [_ends(part, self._head, self._n) for part in torch.split(rows, LATENTS)]
        top, bottom = (
            ExtremeTokens(*(torch.cat(parts).cpu() for parts in zip(*end, strict=True)))
            for end in zip(*blocks, strict=True)
        )
        return {"top": top, "bottom": bottom._replace(effects=-bottom.effects)}


def head_digest(model: ModelConfig, manifest: IndexManifest, normalisers: SiteNormalisers) -> str:
    """Return the digest of the model's head for a new index; see `IndexManifest.head`.

    If the head cannot be used, a warning gives the reason.
    """
    head, _ = _load(model, manifest, normalisers)
    if isinstance(head, str) and head:
        logger.warning("output tokens of latents are left out: %s", head)
    return "" if isinstance(head, str) else head.digest


def open_outputs(
    model: ModelConfig, manifest: IndexManifest, normalisers: SiteNormalisers
) -> OutputTokens:
    """Load the head that the index was created with.

    Args:
        model: The model.
        manifest: The manifest of the index.
        normalisers: The normalisers of the dictionary's sites.

    Raises:
        ConfigError: This worker's model has another head.
    """
    n = int(manifest.settings["output_tokens"])
    if manifest.head == "":
        return OutputTokens(None, n)
    head, parts = _load(model, manifest, normalisers)
    found = "" if isinstance(head, str) else head.digest
    if manifest.head is not None and found != manifest.head:
        why = head if isinstance(head, str) else "the weights differ"
        raise ConfigError(
            f"index {manifest.name}: was created with a different output head than this worker's "
            f"model: {why}; use the same model (model.path, model.dtype), or set a different "
            f"index.name"
        )
    return OutputTokens(None if isinstance(head, str) else head, n, parts)


def _load(
    model: ModelConfig, manifest: IndexManifest, normalisers: SiteNormalisers
) -> "tuple[Head | str, _Parts]":
    """Load a model's head, with the columns of decoder rows that reach it and their factors.

    In place of a head that cannot be used, return the reason. It is empty if no output tokens are
    wanted.
    """
    if not manifest.settings["output_tokens"] or not isinstance(model, HuggingFaceModel):
        return "", ()
    from dist_sae.models.head import final_contributions, load_head  # takes 3 s

    of, columns = normalisers.by_site, normalisers.columns
    model, sites = model.by_model(normalisers.writes)[0]
    names = final_contributions(tuple(sites))
    try:
        head = load_head(model, names[0])
    except ModelError as error:
        return str(error), ()
    for site in (sites[name] for name in names):
        if (width := len(of[site].mean)) != len(head.gain):
            there = f"the head of {model.path} is {len(head.gain)} wide"
            return f"decoder rows are {width} wide, but {there}", ()
    scale = of[sites[names[0]]].scale
    return head, [(columns[sites[name]], scale / of[sites[name]].scale) for name in names]


def _ends(
    rows: Float[Tensor, "latents d"], head: "Head", n: int
) -> tuple[ExtremeTokens, ExtremeTokens]:
    """Find the tokens with the largest effects, and those with the largest negated effects."""
    rows = rows.to(head.gain.device, torch.float32)
    if head.centres:
        rows = rows - rows.mean(1, keepdim=True)
    rows = rows * head.gain
    average = rows @ head.mean
    none = torch.empty(len(rows), 0, device=rows.device)
    top = bottom = ExtremeTokens(none.long(), none)
    for first in range(0, len(head.unembedding), VOCABULARY):
        part = head.unembedding[first : first + VOCABULARY].float()
        effects = rows @ part.T - average[:, None]
        top = _more_extreme(top, effects, first, n)
        bottom = _more_extreme(bottom, -effects, first, n)
    return top, bottom


def _more_extreme(
    so_far: ExtremeTokens, effects: Float[Tensor, "latents m"], first: int, n: int
) -> ExtremeTokens:
    found = effects.topk(min(n, effects.shape[1]))
    tokens = torch.cat([so_far.tokens, found.indices + first], 1)
    values = torch.cat([so_far.effects, found.values], 1)
    best = values.topk(min(n, values.shape[1]))
    return ExtremeTokens(tokens.gather(1, best.indices), best.values)
