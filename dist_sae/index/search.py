"""Search for latents by the tokens of their largest activations."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_sae.errors import ArgumentError
from dist_sae.index.layout import TOP
from dist_sae.index.query import Index
from dist_sae.models import Tokenizer

LEAST_EXAMPLES = 8
"""Fewest largest activations with which a latent can be found."""
TokenTest = Callable[[int], bool]
"""Function that returns whether a token matches the search."""


class Match(NamedTuple):
    """A latent with some of its largest activations on tokens that match a search."""

    latent: int
    hits: int
    """Number of its largest activations on a matching token."""
    examples: int
    """Number of its largest activations that the index stores."""

    @property
    def share(self) -> float:
        """Share of the largest activations that are on a matching token."""
        return self.hits / self.examples


class Matches(NamedTuple):
    """The latents that a search found, best first, as columns of `Match`."""

    latents: NDArray[np.int64]
    hits: NDArray[np.int64]
    examples: NDArray[np.int64]


class TopTokens:
    """The tokens of all latents' largest activations, in memory.

    Reads all examples of the index. Takes 10 bytes of memory for each distinct token of a latent,
    of which there are at most `index.examples`.

    Args:
        index: The index.

    Raises:
        CorruptObjectError: A table is damaged.
    """

    def __init__(self, index: Index) -> None:
        self._examples = np.zeros(index.n_latents, np.int64)
        parts = []
        for table in index.all_examples(["latent", "decile", "token"]):
            latents, deciles, tokens = (column.to_numpy() for column in table.columns)
            latents, tokens = latents[deciles == TOP].astype(np.int64), tokens[deciles == TOP]
            self._examples += np.bincount(latents, minlength=index.n_latents)
            pairs, first, counts = np.unique(
                latents << 32 | tokens, return_index=True, return_counts=True
            )
            order = np.lexsort((first, -counts, pairs >> 32))
            found = (pairs >> 32, pairs & (2**32 - 1), counts)
            kinds: tuple[Any, ...] = (np.int32, np.int32, np.int16)
            parts.append([c[order].astype(kind) for c, kind in zip(found, kinds, strict=True)])
        self._latents, self._tokens, self._counts = map(np.concatenate, zip(*parts, strict=True))
        counts = np.bincount(self._latents, minlength=index.n_latents)
        self._starts = np.concatenate([[0], counts.cumsum()])
        self.tokens: NDArray[np.int32] = np.unique(self._tokens)
        """All distinct tokens, in ascending order."""

    def of(self, latent: int, n: int) -> list[int]:
        """Return a latent's `n` most frequent tokens, ties by largest activation."""
        start, stop = self._starts[latent : latent + 2]
        found: list[int] = self._tokens[start : min(stop, start + n)].tolist()
        return found

    def search(self, is_match: TokenTest) -> Matches:
        """Find latents with a hit and at least `LEAST_EXAMPLES` largest activations.

        The result is sorted by share of hits, then number of hits (both descending), then latent.
        """
        wanted = np.zeros(self.tokens.max(initial=0) + 1, np.bool_)
        wanted[self.tokens] = [is_match(token) for token in self.tokens.tolist()]
        hit = wanted[self._tokens]
        examples = self._examples
        hits = np.bincount(self._latents[hit], self._counts[hit], len(examples)).astype(np.int64)
        able = np.flatnonzero((hits > 0) & (examples >= LEAST_EXAMPLES))
        # different shares of at most 4,096 examples differ by more than 1e-8, so hits only break
        # ties
        rank = hits[able] / examples[able] + 1e-13 * hits[able]
        order = able[np.argsort(-rank, kind="stable")]
        return Matches(order, hits[order], examples[order])


def search(index: Index, is_match: TokenTest) -> list[Match]:
    """Find latents by the tokens of their largest activations. See `TopTokens.search`."""
    found = TopTokens(index).search(is_match)
    return list(map(Match, *(column.tolist() for column in found)))


def token_test(tokenizer: Tokenizer, text: str) -> TokenTest:
    """Return a test for one token.

    Raises:
        ArgumentError: The text is not a single token of the model.
    """
    (ids,) = tokenizer([text])
    if len(ids) != 1:
        pieces = ", ".join(f'"{piece}"' for piece in tokenizer.text(ids)) or "none"
        raise ArgumentError(
            f'token: "{text}" is not one token of the model but {len(ids)}: {pieces}'
        )
    return lambda token: bool(token == ids[0])


def regex_test(text_of: Callable[[int], str], pattern: str) -> TokenTest:
    """Return a test for tokens whose text contains a match of a regular expression.

    Args:
        text_of: Function that returns the text of a token.
        pattern: The regular expression.

    Raises:
        ArgumentError: The pattern is not a valid regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as exc:
        raise ArgumentError(f"regex: {pattern!r} is not a regular expression: {exc}") from exc
    return lambda token: compiled.search(text_of(token)) is not None
