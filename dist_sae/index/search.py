"""Search for latents by the tokens of their largest activations."""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dist_sae.errors import ArgumentError
from dist_sae.index.layout import TOP
from dist_sae.index.query import Index
from dist_sae.models import Tokenizer

LEAST_EXAMPLES = 8
"""Largest activations that a latent must have to be found."""
IsWanted = Callable[[int], bool]
"""Tells whether a token is one that is searched for."""


class Match(NamedTuple):
    """A latent with some of its largest activations on tokens that are searched for."""

    latent: int
    hits: int
    """Largest activations on such a token."""
    examples: int
    """All of its largest activations that the index keeps."""

    @property
    def share(self) -> float:
        """Share of the largest activations that are on such a token."""
        return self.hits / self.examples


def search(index: Index, is_wanted: IsWanted) -> list[Match]:
    """Find latents by the tokens of their largest activations.

    Returns:
        Latents with a hit and at least `LEAST_EXAMPLES` largest activations, sorted by share of
        hits, then number of hits (both falling), then latent.
    """
    known: dict[int, bool] = {}
    hits = np.zeros(index.n_latents, np.int64)
    all_ = np.zeros_like(hits)
    for table in index.all_examples(["latent", "decile", "token"]):
        latents, deciles, tokens = (c.to_numpy() for c in table.columns)
        latents, tokens = latents[deciles == TOP], tokens[deciles == TOP]
        present, place = np.unique(tokens, return_inverse=True)
        known |= {token: is_wanted(token) for token in present.tolist() if token not in known}
        hit = np.array([known[token] for token in present.tolist()], dtype=bool)
        hits += np.bincount(latents[hit[place]], minlength=len(hits))
        all_ += np.bincount(latents, minlength=len(hits))
    able = np.flatnonzero((hits > 0) & (all_ >= LEAST_EXAMPLES))
    order = able[np.lexsort((able, -hits[able], -hits[able] / all_[able]))]
    return [
        Match(*numbers)
        for numbers in zip(
            *(part.tolist() for part in (order, hits[order], all_[order])), strict=True
        )
    ]


def is_token(tokenizer: Tokenizer, text: str) -> IsWanted:
    """Search for one token.

    Raises:
        ArgumentError: The text is not one token of the model.
    """
    (ids,) = tokenizer([text])
    if len(ids) != 1:
        pieces = ", ".join(f'"{piece}"' for piece in tokenizer.text(ids)) or "none"
        raise ArgumentError(
            f'token: "{text}" is not one token of the model but {len(ids)}: {pieces}'
        )
    return lambda token: bool(token == ids[0])


def has_pattern(tokenizer: Tokenizer, pattern: str) -> IsWanted:
    """Search for tokens in which a regular expression matches.

    Raises:
        ArgumentError: It is not a regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as exc:
        raise ArgumentError(f"regex: {pattern!r} is not a regular expression: {exc}") from exc
    return lambda token: compiled.search(tokenizer.text([token])[0]) is not None
