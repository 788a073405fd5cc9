"""Names of latents: the tokens that are most frequent among their largest activations."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from dist_sae.index.layout import TOP
from dist_sae.index.query import Index
from dist_sae.models import Tokenizer


def frequent_tokens(index: Index, n: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Find the tokens that are most frequent among each latent's largest activations.

    Args:
        index: Index with examples.
        n: Most tokens of a latent.

    Returns:
        Tokens, [n_latents, n], the most frequent first, ties by lower token number, padded with -1;
        how many of each latent's largest activations are on its first token, [n_latents].
    """
    tokens = np.full((index.n_latents, n), -1, np.int32)
    counts = np.zeros(index.n_latents, np.int32)
    for table in index.all_examples(["latent", "decile", "token"]):
        latent, decile, token = (column.to_numpy().astype(np.int64) for column in table.columns)
        keys = (latent << 32) + token
        found, times = np.unique(keys[decile == TOP], return_counts=True)
        latents, values = found >> 32, found & (2**32 - 1)
        order = np.lexsort((values, -times, latents))
        latents, values, times = latents[order], values[order], times[order]
        first = np.flatnonzero(np.diff(latents, prepend=-1))
        place = np.arange(len(latents)) - np.repeat(first, np.diff(first, append=len(latents)))
        kept = place < n
        tokens[latents[kept], place[kept]] = values[kept]
        counts[latents[first]] = times[first]
    return tokens, counts


def distinct(texts: Sequence[str]) -> list[str]:
    """Strip texts, and remove those that repeat an earlier one except for case."""
    first: dict[str, str] = {}
    for text in texts:
        stripped = text.strip() or repr(text)
        first.setdefault(stripped.lower(), stripped)
    return list(first.values())


def token_names(tokenizer: Tokenizer | None) -> Callable[[Iterable[int]], list[str]]:
    """Return a function that names tokens by text, or by number if there is no tokenizer."""
    known: dict[int, str] = {}

    def name(tokens: Iterable[int]) -> list[str]:
        wanted = [int(token) for token in tokens if token >= 0]
        for token in set(wanted) - known.keys():
            known[token] = tokenizer.text([token])[0] if tokenizer else f"#{token}"
        return [known[token] for token in wanted]

    return name
