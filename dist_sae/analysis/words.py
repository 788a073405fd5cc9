"""Lists of words, and the rows of an index at which the words occur.

A word is a run of letters and digits: one token, or several consecutive tokens of a document. It
occurs at the row of its last token, the first row at which the whole word is known.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist_sae.errors import ArgumentError
from dist_sae.index.layout import IndexManifest
from dist_sae.models import Tokenizer

LISTS = ("elements", "cities", "animals", "foods")
"""Names of the lists that come with the package."""
CORPUS = "corpus"
"""Category of words that are chosen from the corpus itself."""
_LEAST_SPACED = (
    0.02  # least share of tokens that begin or end with a space, in any language with spaces
)


class Rows(Protocol):
    """The part of a latent index with its rows; see `index.query.Index`."""

    manifest: IndexManifest

    def origins(self, unit: int) -> pa.Table:
        """Read token, position and document of a unit's rows."""
        ...

    def has_postings(self, unit: int, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return whether the index stores the activations on each of these rows of a unit."""
        ...


class Concept(NamedTuple):
    """A word to search for."""

    word: str
    """The word. A lowercase word matches in any case, others only as written."""
    category: str
    times: float | None = None
    """Number of occurrences in some large corpus, if the list gives it."""


class WordRows(NamedTuple):
    """Rows of the index with a token of a listed word, ascending."""

    rows: NDArray[np.int64]
    """Row numbers, counted over all units of the index."""
    concept: NDArray[np.int32]
    is_last: NDArray[np.bool_]
    """Whether the row has the word's last token, at which the word occurs."""
    starts: NDArray[np.int64]
    """Number of the first row of each unit, followed by the number of all rows."""


def read_lists(names: Iterable[str]) -> list[Concept]:
    """Read lists of words: names of `LISTS`, or files.

    A file has one word per line. A tab and a count of occurrences may follow, on every line or on
    none. Empty lines and lines that begin with # are skipped. A word in two lists belongs to the
    first.

    Raises:
        ArgumentError: A file cannot be read or is not a valid list, or only some lists have counts.
    """
    found: dict[str, Concept] = {}
    for name in names:
        for concept in _read_list(name):
            found.setdefault(concept.word, concept)
    with_count = [concept.times is not None for concept in found.values()]
    if any(with_count) and not all(with_count):
        lacks = next(c.category for c in found.values() if c.times is None)
        raise ArgumentError(
            f"{lacks}: has no counts but another list does; give counts in all lists or in none"
        )
    return list(found.values())


def _read_list(name: str) -> list[Concept]:
    if name in LISTS:
        text = files("dist_sae.analysis").joinpath(f"lists/{name}.txt").read_text()
    else:
        try:
            text = Path(name).read_text()
        except (OSError, UnicodeDecodeError) as exc:
            raise ArgumentError(
                f"{name}: is neither a built-in list ({', '.join(LISTS)}) nor a file that can "
                f"be read: {exc}"
            ) from exc
    concepts = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        word, _, count = (part.strip() for part in line.partition("\t"))
        if not word.isalnum():
            raise ArgumentError(f'{name}, line {number}: "{word}" is not a single word')
        if count and not re.fullmatch(r"\d+(\.\d+)?", count):
            raise ArgumentError(f'{name}, line {number}: "{count}" is not a count')
        concepts.append(Concept(word, Path(name).stem, float(count) if count else None))
    if not concepts:
        raise ArgumentError(f"{name}: has no words")
    counts = [concept.times is None for concept in concepts]
    if any(counts) and not all(counts):
        word = concepts[counts.index(True)].word
        raise ArgumentError(
            f'{name}: "{word}" has no count but other words do; give counts for all or none'
        )
    twice = [w for w, n in Counter(concept.word for concept in concepts).items() if n > 1]
    if twice:
        raise ArgumentError(f'{name}: has "{twice[0]}" twice')
    return concepts


def find_words(index: Rows, tokenizer: Tokenizer, concepts: Sequence[Concept]) -> WordRows:
    """Find the words of a list in the rows of an index, in one pass over the rows' tokens.

    Rows without postings are left out. So are words whose first tokens are not in the index,
    because the activation set excludes their rows.

    Raises:
        ArgumentError: The tokens do not show where words begin.
    """
    look_up, tokens = _look_up(concepts), TokenTexts(tokenizer, concepts)
    rows, found, last, starts = [], [], [], [0]
    for unit in index.manifest.units:
        table = index.origins(unit)
        for row, concept, is_last in _words_of(table, tokens, look_up):
            kept = index.has_postings(unit, row)
            rows.append(row[kept] + starts[-1])
            found.append(concept[kept])
            last.append(is_last[kept])
        starts.append(starts[-1] + table.num_rows)
    tokens.check()
    empty = np.zeros(0, np.int64)
    row = np.concatenate([empty, *rows])
    order = row.argsort(kind="stable")
    return WordRows(
        row[order],
        np.concatenate([empty, *found])[order].astype(np.int32),
        np.concatenate([empty, *last])[order].astype(np.bool_),
        np.asarray(starts),
    )


def corpus_words(
    index: Rows, tokenizer: Tokenizer, n: int, least: int, seed: int = 0
) -> list[Concept]:
    """Choose words of the corpus itself, evenly over log frequency.

    Only words of one token and of letters alone are counted, so the tokenizer's vocabulary bounds
    the memory. Case is ignored.

    Args:
        index: The index whose rows are counted.
        tokenizer: Tokenizer of the model.
        n: Most words to choose.
        least: Fewest occurrences of a word.
        seed: Seed of the choice.

    Raises:
        ArgumentError: The tokens do not show where words begin.
    """
    counts: Counter[str] = Counter()
    tokens = TokenTexts(tokenizer, [])
    for unit in index.manifest.units:
        parts = _segments(index.origins(unit), tokens)
        of_text = np.bincount(parts.place[parts.first[parts.of_one]], minlength=len(parts.texts))
        for text, count in zip(parts.texts, of_text.tolist(), strict=True):
            if count and (word := _bare(text).lower()).isalpha():
                counts[word] += count
    tokens.check()
    able = sorted(word for word, count in counts.items() if count >= least)
    logs = np.log([counts[word] for word in able])
    # cut the log frequency into n equal steps, and take words from the steps round-robin
    shuffled = np.random.default_rng(seed).permutation(len(able))
    step = ((logs - logs.min()) / (np.ptp(logs) or 1) * n).astype(int) if able else logs
    turn = np.zeros(len(able), np.int64)
    seen: Counter[int] = Counter()
    for place in shuffled.tolist():
        turn[place] = seen[int(step[place])]
        seen[int(step[place])] += 1
    chosen = shuffled[np.argsort(turn[shuffled], kind="stable")][:n]
    return [Concept(able[place], CORPUS) for place in sorted(chosen.tolist())]


class TokenTexts:
    """The texts of tokens, with a cache so that each token is decoded once."""

    def __init__(self, tokenizer: Tokenizer, concepts: Sequence[Concept]) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        self._stems = {c.word[:n].lower() for c in concepts for n in range(1, len(c.word) + 1)}
        self._seen = self._spaced = 0

    def texts(self, tokens: NDArray[np.int32]) -> tuple[list[str], NDArray[np.int64]]:
        """Return the texts of the distinct tokens, and for each token the position of its text."""
        distinct, place, counts = np.unique(tokens, return_inverse=True, return_counts=True)
        for token in distinct.tolist():
            if token not in self._known:
                self._known[token] = self._tokenizer.text([token])[0]
        texts = [self._known[token] for token in distinct.tolist()]
        self._seen += len(tokens)
        is_spaced = [text[:1].isspace() or text[-1:].isspace() for text in texts]
        self._spaced += int(counts[is_spaced].sum())
        return texts, place

    def may_begin(self, text: str) -> bool:
        """Return whether a word of the list may begin with this text."""
        return _bare(text).lower() in self._stems

    def check(self) -> None:
        if self._spaced < _LEAST_SPACED * self._seen:
            raise ArgumentError(
                "the model's tokens show no spaces, so this analysis cannot tell where words begin"
            )


class _Segments(NamedTuple):
    """The words of a unit, as ranges of its rows sorted by document and position."""

    order: NDArray[np.int64]
    """Rows of the unit in sorted order."""
    texts: list[str]
    """Texts of the unit's distinct tokens."""
    place: NDArray[np.int64]
    """Index into `texts` of each row's token, in sorted order."""
    first: NDArray[np.int64]
    """Start of each word in the sorted order."""
    stop: NDArray[np.int64]

    @property
    def of_one(self) -> NDArray[np.bool_]:
        """Mask of the words of one token."""
        return np.asarray(self.stop == self.first + 1)


def _segments(rows: pa.Table, tokens: "TokenTexts") -> _Segments:
    token, position, document = (rows[n].to_numpy() for n in ("token", "position", "document"))
    order = np.lexsort((position, document))
    texts, place = tokens.texts(token[order])
    position, document = position[order], document[order]
    begins = np.array([text[:1].isalnum() for text in texts], np.bool_)[place]
    ends = np.array([text[-1:].isalnum() for text in texts], np.bool_)[place]
    follows = np.zeros(len(order), np.bool_)
    follows[1:] = (document[1:] == document[:-1]) & (position[1:] == position[:-1] + 1)
    goes_on = begins & follows
    goes_on[1:] &= ends[:-1]
    first = np.flatnonzero(~goes_on)
    stop = np.append(first[1:], len(order))[: len(first)]
    # drop a text that continues a missing row, because it may be the rest of a word
    whole = ~begins[first] | follows[first] | (position[first] == 0)
    return _Segments(order, texts, place, first[whole], stop[whole])


_Found = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]


def _words_of(
    rows: pa.Table, tokens: TokenTexts, look_up: Callable[[str], int]
) -> Iterator[_Found]:
    """Yield rows, concepts and `is_last` of the listed words, those of one token first."""
    order, texts, place, first, stop = parts = _segments(rows, tokens)
    of_one = parts.of_one
    concept = np.array([look_up(text) for text in texts], np.int64)[place[first[of_one]]]
    there = concept >= 0
    yield order[first[of_one][there]], concept[there], np.ones(there.sum(), np.bool_)
    may = np.array([tokens.may_begin(text) for text in texts], np.bool_)
    longer = np.flatnonzero(~of_one & may[place[first]])
    for start, end in zip(first[longer].tolist(), stop[longer].tolist(), strict=True):
        number = look_up("".join(texts[i] for i in place[start:end].tolist()))
        if number >= 0:
            is_last = np.arange(start, end) == end - 1
            yield order[start:end], np.full(end - start, number), is_last


def _look_up(concepts: Sequence[Concept]) -> Callable[[str], int]:
    """Return a function that maps a text to the number of its concept; -1 if it has none."""
    exact = {concept.word: number for number, concept in enumerate(concepts)}

    def find(text: str) -> int:
        word = _bare(text)
        return exact.get(word, exact.get(word.lower(), -1))

    return find


def _bare(text: str) -> str:
    """Strip everything but letters and digits from both ends of a text."""
    return re.sub(r"^[\W_]+|[\W_]+$", "", text)
