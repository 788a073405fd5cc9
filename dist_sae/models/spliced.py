"""A whole language model with its head, whose activations at some sites can be replaced."""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dist_sae.config.data import HuggingFaceModel
from dist_sae.device import moved
from dist_sae.errors import HeadlessError, LacksWeightsError
from dist_sae.models.loading import (
    DTYPES,
    HEADS,
    Description,
    buffers_of,
    check_tokens,
    describe,
    errors_of,
    inputs,
    load,
    load_tokenizer,
)
from dist_sae.models.sharding import Divider, choose_divider, divide, whole_of_ranks
from dist_sae.models.sites import Edit, attach, width

logger = logging.getLogger(__name__)

_MASK_EVERY = 7  # one in 7 tokens is masked, close to the 15 % of BERT's training
_ROUNDING = {torch.float32: 1e-4}
"""Largest relative change of the first token's logits that counts as rounding (with experts)."""
_HALF_ROUNDING = 0.03


class SplicedModel:
    """A language model that predicts tokens while activations at some sites are edited.

    Attributes:
        masked: True if the model predicts masked tokens, as encoders do, instead of the next ones.
    """

    def __init__(
        self, config: HuggingFaceModel, sites: tuple[str, ...], *, divided: bool = False
    ) -> None:
        """Load the whole model.

        Args:
            config: The model.
            sites: Sites that can be edited.
            divided: Divide the model over `config.tensor_parallel` ranks. Then all methods are
                collective.

        Raises:
            HeadlessError: The model predicts no tokens.
            ModelError: The model cannot be loaded, or lacks a site.
        """
        description = describe(config, sites)
        self._name = config.path
        self._vocabulary = description.vocabulary
        divider = None
        if divided and config.tensor_parallel > 1:
            divider = choose_divider(config, description.config)
            logger.info(
                "%s: divided over %d ranks (%s)", config.path, config.tensor_parallel, divider
            )
        self._model, self.masked = load_with_head(config, description, divider)
        self._divided = divider is not None
        self._mask_token = load_tokenizer(config).mask if self.masked else None
        if self.masked and self._mask_token is None:
            raise HeadlessError(f"model.path {config.path}: its tokenizer has no mask token")
        self._edits: Mapping[str, Edit] = {}
        self._widths = {site: width(description.skeleton, site) for site in sites}
        """Widths of whole rows. In a divided model, a rank may have only parts of them."""
        for site in sites:
            attach(self._model, site, partial(self._replace, site))

    def predicted(
        self, tokens: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
    ) -> Bool[Tensor, "batch next"]:
        """Return the mask of the tokens that have a loss, without the context's first token.

        A bidirectional model predicts every seventh token. The offset depends only on the context's
        own tokens, so batching does not change it.
        """
        if self._mask_token is None:
            return mask[:, 1:]
        places = torch.arange(1, tokens.shape[1]) + (tokens * mask).sum(1, keepdim=True)
        every = (mask.sum(1, keepdim=True) - 1).clamp(1, _MASK_EVERY)
        return (places % every == 0) & mask[:, 1:]

    @torch.inference_mode()
    def losses(
        self,
        tokens: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"],
        edits: Mapping[str, Edit] | None = None,
    ) -> Float[Tensor, "batch next"]:
        """Compute the cross-entropy in nats of every predicted token, fp32; NaN elsewhere.

        The result excludes the context's first token. All masked tokens of a context are masked at
        the same time.

        Args:
            tokens: Token ids.
            mask: False at padding.
            edits: Functions that replace the activations at some of the sites. They are called in
                the order in which the model computes the sites.
        """
        check_tokens(tokens, self._vocabulary, self._name)
        self._edits = edits or {}
        predicted, shown, targets = self.predicted(tokens, mask), tokens, tokens[:, 1:].long()
        if self._mask_token is not None:
            shown = tokens.clone()
            shown[:, 1:][predicted] = self._mask_token
        logits = self._model(**inputs(self._model, shown, mask)).logits
        logits = logits[:, :-1] if self._mask_token is None else logits[:, 1:]
        losses = [  # one context at a time, because fp32 logits of a whole batch are large
            nn.functional.cross_entropy(of_context.float(), wanted, reduction="none")
            for of_context, wanted in zip(logits, moved(targets, logits.device), strict=True)
        ]
        return torch.stack(losses).cpu().masked_fill(~predicted, torch.nan)

    def _replace(self, site: str, acts: Tensor) -> Tensor:
        edit = self._edits.get(site)
        if edit is None:
            return acts
        if not self._divided:
            return edit(acts)
        whole, own = whole_of_ranks(acts, self._widths[site])
        return edit(whole)[..., own]


def load_with_head(
    config: HuggingFaceModel, description: Description, divider: Divider | None = None
) -> tuple[Any, bool]:
    """Load the model with a token head. Returns the model, and True if it predicts masked tokens.

    Raises:
        HeadlessError: The model predicts no tokens.
        ModelError: The model cannot be loaded.
    """
    reason = f"transformers has no head for {description.config.model_type} that predicts tokens"
    for heads, masked in HEADS:
        if type(description.config) not in heads:
            continue
        model_class: Any = heads[type(description.config)]
        try:
            with errors_of(config):
                model = load(model_class, config, description, divider)
        except LacksWeightsError as exc:
            if any(name.startswith(f"{model_class.base_model_prefix}.") for name in exc.names):
                raise
            reason = f"its files contain no head that predicts tokens (no {exc.names[0]})"
            continue
        if divider == "deepspeed":
            buffers = buffers_of(model, description.config, DTYPES[config.dtype], model_class)
            model = divide(model, DTYPES[config.dtype], buffers)
        if masked or not _looks_ahead(model, description.vocabulary):
            return model, masked
        reason = "it attends to later tokens, and has no head that predicts masked tokens"
        del model
    raise HeadlessError(f"model.path {config.path}: {reason}")


@torch.inference_mode()
def _looks_ahead(model: Any, vocabulary: int) -> bool:
    """Return whether a token's prediction depends on the tokens after it."""
    one = torch.arange(8)[None] % vocabulary
    other = torch.cat([one[:, :1], one[:, 1:].flip(1)], dim=1)
    mask = torch.ones_like(one, dtype=torch.bool)
    first, second = (model(**inputs(model, t, mask)).logits[0, 0].float() for t in (one, other))
    least = _ROUNDING.get(model.dtype, _HALF_ROUNDING)
    return bool((first - second).norm() > least * first.norm())
