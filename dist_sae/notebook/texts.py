"""The text around a row, and the latents that are active on a text."""

import logging
from collections import Counter
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from dist_sae.config import Run
from dist_sae.config.data import HuggingFaceModel
from dist_sae.data.corpus import Document
from dist_sae.data.row_filters import kept_by_token_rules
from dist_sae.data.tokens import cut, pack
from dist_sae.errors import ArgumentError, ConfigError
from dist_sae.models import build_source, build_tokenizer

logger = logging.getLogger(__name__)


@runtime_checkable
class Origin(Protocol):
    """The origin of a row. Examples from a latent index have these properties."""

    @property
    def unit(self) -> int: ...
    @property
    def document(self) -> int: ...
    @property
    def position(self) -> int: ...
    @property
    def token(self) -> int: ...


class RowText(NamedTuple):
    """A row's token and the text around it."""

    before: str
    token: str
    after: str

    def __str__(self) -> str:
        return f"{self.before}[{self.token}]{self.after}"


class TokenLatents(NamedTuple):
    """A token and the latents that are most active on it, strongest first."""

    token: str
    """Text of the token; empty if the token only completes the character before it."""
    latents: list[int]
    """Latent indices. Empty if training leaves out this row, such as a context's first."""
    acts: list[float]
    """Activation of each of these latents."""


class TextRows(NamedTuple):
    """Raw activations of a text's tokens."""

    tokens: list[str]
    acts: Float[Tensor, "rows d_in"]
    trained: list[int]
    """Index into `tokens` for each row. Training leaves out the other tokens."""


@runtime_checkable
class Codes(Protocol):
    """Active entries of codes; see `SparseCodes`."""

    @property
    def acts(self) -> Tensor: ...
    @property
    def latents(self) -> Tensor: ...
    @property
    def rows(self) -> Tensor: ...


class TextReader:
    """The run's model and tokenizer, which read texts the way producers do.

    Args:
        run: The run, with the model's commit pinned.

    Raises:
        ConfigError: The run's model is synthetic.
        ModelError: The model cannot be loaded.
    """

    def __init__(self, run: Run) -> None:
        if not isinstance(run.model, HuggingFaceModel):
            raise ConfigError(
                f"model.kind: {run.model.kind}: run {run.name} has no language model, so no text "
                f"can be read"
            )
        self._run = run
        self._tokenizer = build_tokenizer(run)
        self._source = build_source(run.model.model_copy(update={"tensor_parallel": 1}), run.reads)

    def read(self, text: str) -> TextRows:
        """Compute a text's activations at the read sites, concatenated.

        Raises:
            ArgumentError: The text has no tokens.
        """
        rules = self._run.activations
        bos = self._tokenizer.bos if rules.prepend_bos else None
        (ids,) = self._tokenizer([text])
        if not ids:
            raise ArgumentError("text: has no tokens; give some text")
        contexts = list(
            cut([Document(0, text)], self._tokenizer, context_tokens=rules.context_tokens, bos=bos)
        )
        if len(contexts) > 1:
            logger.warning(
                "the text has %d tokens and is read as %d contexts of at most %d, as in training",
                len(ids),
                len(contexts),
                rules.context_tokens,
            )
        acts, trained = [], []
        for context in contexts:
            (batch,) = pack([context], batch_tokens=len(context.tokens), bos=bos)
            keep = kept_by_token_rules(batch, self._tokenizer.special, rules.exclude, Counter())
            found = self._source.run(batch.tokens, batch.mask)
            sites = [found[site] for site in self._run.reads]
            acts.append(torch.cat([of[keep.to(of.device)].float() for of in sites], 1))
            trained += batch.positions[keep].tolist()
        return TextRows(self._tokenizer.text(ids), torch.cat(acts), trained)


def strongest(rows: TextRows, codes: Codes, top: int) -> list[TokenLatents]:
    """Find up to `top` most active latents of each token."""
    found = [TokenLatents(token, [], []) for token in rows.tokens]
    order = codes.acts.argsort(descending=True, stable=True)
    for row, latent, act in zip(
        *(part[order].tolist() for part in (codes.rows, codes.latents, codes.acts)), strict=True
    ):
        of_token = found[rows.trained[row]]
        if len(of_token.latents) < top:
            of_token.latents.append(latent)
            of_token.acts.append(act)
    return found
