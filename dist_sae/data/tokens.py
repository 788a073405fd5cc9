"""Tokens of documents, cut into contexts and packed into batches of one shape."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dist_sae.data.corpus import Document

Tokenize = Callable[[Sequence[str]], list[list[int]]]
"""Texts to token ids, without special tokens."""


class Context(NamedTuple):
    """What the model sees in one go: a stretch of one document, after BOS where there is one."""

    document: int
    start: int
    """Position within the document of the first token after BOS."""
    tokens: list[int]


class TokenBatch(NamedTuple):
    """Contexts side by side, padded on the right to the longest."""

    tokens: Int[Tensor, "batch seq"]
    mask: Bool[Tensor, "batch seq"]
    """False at padding."""
    documents: Int[Tensor, "batch seq"]
    positions: Int[Tensor, "batch seq"]
    """Position within the document; -1 at BOS and padding."""
    offsets: Int[Tensor, "batch seq"]
    """Position within the context."""


def cut(
    documents: Iterable[Document], tokenize: Tokenize, *, context_tokens: int, bos: int | None
) -> Iterator[Context]:
    """Cut every document into contexts of at most `context_tokens`, BOS included.

    No token is lost and none appears twice. A document without tokens gives no context.
    """
    documents = list(documents)
    prefix = [] if bos is None else [bos]
    room = context_tokens - len(prefix)
    for document, ids in zip(documents, tokenize([d.text for d in documents]), strict=True):
        for start in range(0, len(ids), room):
            yield Context(document.number, start, prefix + ids[start : start + room])


def pack(
    contexts: Iterable[Context], *, batch_tokens: int, bos: int | None
) -> Iterator[TokenBatch]:
    """Group contexts of like length, so that little is padding.

    A batch has at most `batch_tokens`, unless one context alone has more.
    """
    group: list[Context] = []
    for context in sorted(contexts, key=lambda c: len(c.tokens), reverse=True):
        if group and len(group[0].tokens) * (len(group) + 1) > batch_tokens:
            yield _batch(group, bos)
            group = []
        group.append(context)
    if group:
        yield _batch(group, bos)


def _batch(group: list[Context], bos: int | None) -> TokenBatch:
    shape = (len(group), max(len(c.tokens) for c in group))
    tokens = torch.zeros(shape, dtype=torch.int32)
    mask = torch.zeros(shape, dtype=torch.bool)
    positions = torch.full(shape, -1, dtype=torch.int32)
    skip = 0 if bos is None else 1
    for i, context in enumerate(group):
        n = len(context.tokens)
        tokens[i, :n] = torch.tensor(context.tokens, dtype=torch.int32)
        mask[i, :n] = True
        positions[i, skip:n] = torch.arange(
            context.start, context.start + n - skip, dtype=torch.int32
        )
    documents = torch.tensor([c.document for c in group])[:, None].expand(shape)
    offsets = torch.arange(shape[1], dtype=torch.int32).expand(shape)
    return TokenBatch(tokens, mask, documents, positions, offsets)
