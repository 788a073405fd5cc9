"""Functions that cut documents into contexts of tokens and pack the contexts into batches."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dist_sae.data.corpus import Document, is_encodable
from dist_sae.errors import CorpusError

_MOST_PADDING = 0.05
_LIKENESS = (0.0, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)

Tokenize = Callable[[Sequence[str]], list[list[int]]]
"""Maps texts to token ids, without special tokens."""


class Context(NamedTuple):
    """One sequence of a forward pass: consecutive tokens of one document, after BOS if any."""

    document: int
    start: int
    """Position within the document of the context's first token after BOS."""
    tokens: list[int]


class TokenBatch(NamedTuple):
    """A batch of contexts, padded on the right to the longest."""

    tokens: Int[Tensor, "batch seq"]
    mask: Bool[Tensor, "batch seq"]
    """True at tokens, False at padding."""
    documents: Int[Tensor, "batch seq"]
    positions: Int[Tensor, "batch seq"]
    """Position within the document; -1 at BOS and padding."""
    offsets: Int[Tensor, "batch seq"]
    """Position within the context."""


def cut(
    documents: Iterable[Document],
    tokenize: Tokenize,
    *,
    context_tokens: int,
    bos: int | None,
    failed: Callable[[Document, Exception], None] | None = None,
) -> Iterator[Context]:
    """Cut every document into contexts of at most `context_tokens`, BOS included.

    No token is lost and none appears twice. A document without tokens gives no context.

    Args:
        context_tokens: Maximum length of a context.
        bos: Token that begins each context, if any.
        failed: Callback for each document that is left out because the tokenizer refuses it or it
            cannot be encoded (half a surrogate pair). Without a callback the error is raised.

    Raises:
        CorpusError: The tokenizer refuses all documents.
    """
    documents = list(_encodable(documents, failed))
    prefix = [] if bos is None else [bos]
    room = context_tokens - len(prefix)
    for document, ids in _tokenized(documents, tokenize, failed) if documents else ():
        for start in range(0, len(ids), room):
            yield Context(document.number, start, prefix + ids[start : start + room])


def _encodable(
    documents: Iterable[Document], failed: Callable[[Document, Exception], None] | None
) -> Iterator[Document]:
    """Yield the documents without half surrogate pairs, which only some tokenizers accept."""
    for document in documents:
        if is_encodable(document.text):
            yield document
            continue
        problem = CorpusError("it contains half a surrogate pair, which is not a character")
        if failed is None:
            raise problem
        failed(document, problem)


def _tokenized(
    documents: Sequence[Document],
    tokenize: Tokenize,
    failed: Callable[[Document, Exception], None] | None,
) -> Iterator[tuple[Document, list[int]]]:
    try:
        together = tokenize([document.text for document in documents])
    except (MemoryError, OSError):  # not the text's fault
        raise
    except Exception as exc:
        if failed is None:
            raise
        first = exc
    else:
        yield from zip(documents, together, strict=True)
        return
    refused = 0
    for document in documents:  # one by one, to find the refused ones
        try:
            (ids,) = tokenize([document.text])
        except (MemoryError, OSError):
            raise
        except Exception as exc:
            refused += 1
            failed(document, exc)
        else:
            yield document, ids
    if refused == len(documents):  # the tokenizer is at fault, not the texts
        raise CorpusError(
            f"the tokenizer refuses all {refused} documents ({str(first).strip()}); "
            f"check model.path, or remove them from the corpus"
        ) from first


def pack(
    contexts: Iterable[Context], *, batch_tokens: int, bos: int | None
) -> Iterator[TokenBatch]:
    """Group contexts of similar length into few batches with little padding.

    A batch has at most `batch_tokens` tokens with padding, unless one context alone has more. All
    padding is at most 5% of the tokens, or a sixteenth of `batch_tokens` if that is more.
    """
    contexts = sorted(contexts, key=lambda c: len(c.tokens), reverse=True)
    real = sum(len(context.tokens) for context in contexts)
    for likeness in _LIKENESS:
        groups = list(_groups(contexts, batch_tokens, likeness))
        padded = sum(len(group) * len(group[0].tokens) for group in groups)
        if padded - real <= max(_MOST_PADDING * padded, batch_tokens / 16):
            break
    yield from (_batch(group, bos) for group in groups)


def _groups(
    contexts: Sequence[Context], batch_tokens: int, likeness: float
) -> Iterator[list[Context]]:
    """Group contexts of descending length; none is below `likeness` times its group's longest."""
    group: list[Context] = []
    for context in contexts:
        if group:
            longest = len(group[0].tokens)
            full = longest * (len(group) + 1) > batch_tokens
            if full or len(context.tokens) < likeness * longest:
                yield group
                group = []
        group.append(context)
    if group:
        yield group


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
