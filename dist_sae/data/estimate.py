"""Estimate of the rows of each document, before anything is produced.

The sizes of all texts are known, because the planner has read them once. A small corpus is
tokenized whole, so its estimate is exact except for rows that are excluded by norm. Of a larger
corpus, `PIECES` pieces are tokenized. They are taken at equal distances along the whole text, with
the documents in random order. So a document gets pieces in proportion to its length, and the
longest documents get many. A document's ratio of tokens to bytes is estimated from its own pieces
and shrunk towards the ratio of its file, which is shrunk towards the ratio of the whole corpus.
"""

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_sae.config.data import ActivationsConfig
from dist_sae.data.corpus import Corpus, CorpusIndex, Document
from dist_sae.data.orders import permutation
from dist_sae.data.tokens import Context, Tokenize, cut
from dist_sae.errors import CorpusError

PIECES = 4096
"""Number of pieces of a large corpus that are tokenized."""
PIECE_BYTES = 2048
"""Length of a piece, in characters; these are bytes in ASCII text."""
_OWN_PRIOR = 0.5  # weight of the file's ratio, in pieces, relative to the document's own pieces
_FILE_PRIOR = 1.0  # weight of the corpus's ratio, in pieces, relative to the file's own pieces
_SPANS_AT_ONCE = 256

Progress = Callable[[int, int], None]
"""Progress callback, called with (done, total)."""


def estimate_rows(
    corpus: Corpus,
    index: CorpusIndex,
    activations: ActivationsConfig,
    tokenize: Tokenize,
    *,
    bos: int | None,
    special: AbstractSet[int],
    on_progress: Progress = lambda _done, _of: None,
) -> NDArray[np.int64]:
    """Estimate the rows of each span, before exclusions by norm.

    Args:
        activations: Settings of contexts and exclusions.
        bos: Token that begins each context, if any.
        special: Ids of special tokens.
        on_progress: Progress callback, in spans.
    """
    count = _Counter(activations, tokenize, bos, special)
    text_bytes = np.array(index.text_bytes)
    if text_bytes.sum() <= PIECES * PIECE_BYTES:
        rows = np.zeros(len(index.spans), dtype=np.int64)
        span_of = np.repeat(np.arange(len(rows)), [span.count for span in index.spans])
        for spans in _chunks(np.arange(len(rows)), on_progress):
            documents = corpus.read(index.files, [index.spans[i] for i in spans])
            spans_met = span_of[[document.number for document in documents]]
            np.add.at(rows, spans_met, count.rows([document.text for document in documents]))
        count.check(rows)
        return rows
    pieces = _pieces_of_spans(text_bytes, activations.seed)
    tokens, taken_bytes = np.zeros(len(pieces)), np.zeros(len(pieces))
    for spans in _chunks(np.flatnonzero(pieces), on_progress):
        found = [
            (i, text)
            for i in spans
            for text in _cut_out("\n".join(_texts(corpus, index, i)), int(pieces[i]))
        ]
        owners = [i for i, _ in found]
        np.add.at(tokens, owners, count.tokens([text for _, text in found]))
        np.add.at(taken_bytes, owners, [len(_encoded(text)) for _, text in found])
    count.check(tokens)
    files = np.array([span.file for span in index.spans])
    ratio = _shrink_ratios(tokens / np.maximum(1, taken_bytes), pieces, files)
    counts = np.array([span.count for span in index.spans])
    estimated = counts * rows_of_tokens(text_bytes * ratio / counts, activations, bos)
    rounded: NDArray[np.int64] = np.rint(estimated).astype(np.int64)
    return rounded


def _chunks(spans: NDArray[np.int64], on_progress: Progress) -> Iterator[list[int]]:
    for first in range(0, len(spans), _SPANS_AT_ONCE):
        on_progress(first, len(spans))
        yield spans[first : first + _SPANS_AT_ONCE].tolist()


def _texts(corpus: Corpus, index: CorpusIndex, span: int) -> list[str]:
    return [document.text for document in corpus.read(index.files, [index.spans[span]])]


def rows_of_tokens(
    tokens: NDArray[Any], activations: ActivationsConfig, bos: int | None
) -> NDArray[Any]:
    """Compute the rows of documents from their numbers of tokens, which do not include BOS."""
    n_bos = 0 if bos is None else 1
    whole, rest = np.divmod(tokens, activations.context_tokens - n_bos)
    lost = max(activations.exclude.first_positions, n_bos) - n_bos  # per context, beyond BOS
    rows: NDArray[Any] = whole * max(0, activations.context_tokens - n_bos - lost)
    rows += np.maximum(0, rest - lost)
    return rows


def _pieces_of_spans(text_bytes: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Return the number of sampled pieces of each span."""
    order = permutation(len(text_bytes), seed, 3)
    ends = np.cumsum(text_bytes[order])
    places = (np.arange(PIECES) + 0.5) * (ends[-1] / PIECES)
    met = order[np.searchsorted(ends, places, side="right")]
    return np.bincount(met, minlength=len(text_bytes))


def _cut_out(text: str, pieces: int) -> list[str]:
    """Cut out pieces at equal distances; return the whole text if they would cover it."""
    if len(text) <= pieces * PIECE_BYTES:
        return [text]
    starts = np.linspace(0, len(text) - PIECE_BYTES, pieces + 2)[1:-1].astype(int)
    return [text[start : start + PIECE_BYTES] for start in starts]


def _shrink_ratios(
    per_byte: NDArray[np.float64], pieces: NDArray[np.int64], files: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Estimate every span's tokens per byte from the sampled spans, by shrinkage."""
    weighted = pieces * per_byte
    overall = weighted.sum() / pieces.sum()
    of_file = (np.bincount(files, weighted) + _FILE_PRIOR * overall) / (
        np.bincount(files, pieces) + _FILE_PRIOR
    )
    ratio: NDArray[np.float64] = (weighted + _OWN_PRIOR * of_file[files]) / (pieces + _OWN_PRIOR)
    return ratio


class _Counter:
    """Counts the tokens and rows of texts."""

    def __init__(
        self,
        activations: ActivationsConfig,
        tokenize: Tokenize,
        bos: int | None,
        special: AbstractSet[int],
    ) -> None:
        self._refused: CorpusError | None = None
        self._tokenize = tokenize
        self._context = activations.context_tokens
        self._bos = bos
        self._n_bos = 0 if bos is None else 1
        self._skipped = max(activations.exclude.first_positions, self._n_bos)
        self._special = special if activations.exclude.special_tokens else frozenset[int]()

    def rows(self, texts: Sequence[str]) -> list[int]:
        """Count each text's rows. A text that the tokenizer refuses has 0; producers report it."""
        rows = [0] * len(texts)
        for context in self._contexts(texts):
            kept = context.tokens[self._skipped :]
            rows[context.document] += sum(token not in self._special for token in kept)
        return rows

    def tokens(self, texts: Sequence[str]) -> list[int]:
        """Count each text's tokens, without BOS."""
        tokens = [0] * len(texts)
        for context in self._contexts(texts):
            tokens[context.document] += len(context.tokens) - self._n_bos
        return tokens

    def check(self, found: NDArray[Any]) -> None:
        """Raise an error if no text has any tokens.

        Raises:
            CorpusError: No text has any tokens.
        """
        if not found.any():
            raise self._refused or CorpusError(
                "corpus: its documents contain no tokens; give files that contain text"
            )

    def _contexts(self, texts: Sequence[str]) -> Iterator[Context]:
        try:
            yield from cut(
                [Document(number, text) for number, text in enumerate(texts)],
                self._tokenize,
                context_tokens=self._context,
                bos=self._bos,
                failed=lambda *_: None,
            )
        except CorpusError as exc:  # the tokenizer refuses all of these texts
            self._refused = exc


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
