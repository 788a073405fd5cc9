"""Matching of latents with words, by F1 on documents that did not choose the match.

The units of the index are dealt alternately to two halves. A document is in one unit, so no
document is in both halves. In the first half, each latent is matched with a word and a threshold
that maximize F1. In the second half, the F1 of that match is measured.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist_sae.analysis.words import Rows, WordRows

LEAST_OCCURRENCES = 5
"""Fewest occurrences of a word in each half for it to be judged."""
_LEAST_F1 = 0.3
"""Least F1 of a match in the first half."""


class Postings(Rows, Protocol):
    """The part of a latent index that matching reads; see `index.query.Index`."""

    def bucket_postings(self, bucket: int) -> Iterator[pa.Table]:
        """Yield all activations of a bucket's latents, by latent, unit and row."""
        ...

    def postings(self, latent: int) -> Iterator[pa.Table]:
        """Yield all activations of a latent."""
        ...


class Match(NamedTuple):
    """A word's best latent. The last three fields are measured in the second half."""

    concept: int
    latent: int
    threshold: float
    """Least activation that predicts the word."""
    f1_chosen: float
    """F1 in the first half, by which latent and threshold were chosen."""
    f1: float
    precision: float
    recall: float


class Matched(NamedTuple):
    """Words with the latents that match them."""

    occurrences: NDArray[np.int64]
    """Occurrences of each concept in each half, [2, concepts]."""
    matches: dict[int, Match]
    """Matches by concept. A match has an F1 of at least .3 in the first half."""

    @property
    def judged(self) -> NDArray[np.bool_]:
        """Mask of the concepts that occur often enough in both halves."""
        return np.asarray(self.occurrences.min(0) >= LEAST_OCCURRENCES)

    def recovered(self, least_f1: float) -> NDArray[np.bool_]:
        """Return a mask of the concepts whose match has at least this F1 in the second half."""
        found = np.zeros(self.occurrences.shape[1], np.bool_)
        for concept, match in self.matches.items():
            found[concept] = match.f1 >= least_f1
        return found


def match_words(index: Postings, words: WordRows, n_concepts: int) -> Matched:
    """Match words with latents, at most one word to a latent.

    A first pass over the postings counts on how many of a word's rows each latent fires, which
    bounds its F1. The latents that may reach .3, at most `6 L0` for each word, are read again. Both
    passes are linear in the postings. A bucket's counts and a latent's postings are in memory.

    Args:
        index: The index, with postings.
        words: Rows of the words.
        n_concepts: Number of words.
    """
    is_second = second_half(words, words.rows)
    at = words.is_last
    halves = [at & ~is_second, at & is_second]
    occurrences = np.stack([np.bincount(words.concept[h], minlength=n_concepts) for h in halves])
    judged = occurrences.min(0) >= LEAST_OCCURRENCES
    best: dict[int, Match] = {}
    for bucket in range(index.manifest.n_buckets):
        for latent, concepts in _candidates(index, bucket, words, halves[0], occurrences[0]):
            wanted = [concept for concept in concepts if judged[concept]]
            if not wanted:
                continue
            own = _best_word(index, latent, words, occurrences, wanted)
            if own is not None and (
                own.concept not in best or own.f1_chosen > best[own.concept].f1_chosen
            ):
                best[own.concept] = own
    return Matched(occurrences, best)


def second_half(words: WordRows, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return whether rows, numbered over the whole index, are in the second half."""
    unit = np.searchsorted(words.starts, rows, side="right") - 1
    return np.asarray(unit % 2 == 1)


def _candidates(
    index: Postings,
    bucket: int,
    words: WordRows,
    chosen: NDArray[np.bool_],
    occurrences: NDArray[np.int64],
) -> Iterator[tuple[int, list[int]]]:
    """Yield latents of a bucket with the concepts for which their hits allow the least F1."""
    n = len(occurrences)
    row_numbers = _RowNumbers(index, words)
    keys, counts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for piece in index.bucket_postings(bucket):
        place, is_hit = _hits(words, row_numbers.of(piece))
        is_hit[is_hit] = chosen[place[is_hit]]
        latents = piece["latent"].to_numpy()[is_hit].astype(np.int64)
        found = np.unique(latents * n + words.concept[place[is_hit]], return_counts=True)
        keys.append(found[0])
        counts.append(found[1])
    pairs, of_pair = np.unique(np.concatenate(keys), return_inverse=True)
    hits = np.bincount(of_pair, np.concatenate(counts), len(pairs))
    # with h hits of m occurrences F1 is at most 2 h / (h + m), if the latent fires nowhere else
    able = pairs[hits >= _LEAST_F1 / (2 - _LEAST_F1) * occurrences[pairs % n]]
    latents, first = np.unique(able // n, return_index=True)
    ends = [*first[1:].tolist(), len(able)][: len(first)]
    for latent, start, end in zip(latents.tolist(), first.tolist(), ends, strict=True):
        yield latent, (able[start:end] % n).tolist()


def _best_word(
    index: Postings,
    latent: int,
    words: WordRows,
    occurrences: NDArray[np.int64],
    concepts: Sequence[int],
) -> Match | None:
    """Find the concept for which a latent has the largest F1 in the first half; None below .3."""
    postings = pa.concat_tables(index.postings(latent))
    rows, acts = _RowNumbers(index, words).of(postings), postings["act"].to_numpy()
    place, is_hit = _hits(words, rows)
    is_second = second_half(words, rows)
    concept = np.where(is_hit, words.concept[place], -1)
    is_last = is_hit & words.is_last[place]
    falling = [np.sort(acts[is_second == half])[::-1] for half in (False, True)]

    def counts(number: int, half: int, thresholds: NDArray[np.float32]) -> list[NDArray[np.int64]]:
        """Count hits and false alarms at each threshold."""
        of_half = (concept == number) & (is_second == bool(half))
        hits = _count_reaching(np.sort(acts[of_half & is_last])[::-1], thresholds)
        other_tokens = _count_reaching(np.sort(acts[of_half & ~is_last])[::-1], thresholds)
        return [hits, _count_reaching(falling[half], thresholds) - hits - other_tokens]

    found: Match | None = None
    for number in concepts:
        # the best threshold is the activation of a hit, since lower ones only add false alarms
        thresholds = np.unique(acts[(concept == number) & is_last & ~is_second])
        hits, false = counts(number, 0, thresholds)
        f1 = 2 * hits / (hits + false + occurrences[0, number])
        at = int(f1.argmax())
        if f1[at] < max(_LEAST_F1, found.f1_chosen if found else 0):
            continue
        (hit,), (alarm,) = counts(number, 1, thresholds[at : at + 1])
        found = Match(
            concept=number,
            latent=latent,
            threshold=float(thresholds[at]),
            f1_chosen=float(f1[at]),
            f1=float(2 * hit / (hit + alarm + occurrences[1, number])),
            precision=float(hit / (hit + alarm)) if hit + alarm else math.nan,
            recall=float(hit / occurrences[1, number]),
        )
    return found


class _RowNumbers:
    """Converts a posting's unit and row to a row number over the whole index."""

    def __init__(self, index: Rows, words: WordRows) -> None:
        units = np.asarray(index.manifest.units)
        self._starts = np.zeros(units.max(initial=0) + 1, np.int64)
        self._starts[units] = words.starts[:-1]

    def of(self, postings: pa.Table) -> NDArray[np.int64]:
        found: NDArray[np.int64] = (
            self._starts[postings["unit"].to_numpy()] + postings["row"].to_numpy()
        )
        return found


def _hits(words: WordRows, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the position of each row in `words`, and whether a word occupies the row."""
    if not len(words.rows):
        return np.zeros(len(rows), np.int64), np.zeros(len(rows), np.bool_)
    place = np.searchsorted(words.rows, rows).clip(max=len(words.rows) - 1)
    return place, words.rows[place] == rows


def _count_reaching(
    falling: NDArray[np.float32], thresholds: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Count the activations that reach each threshold."""
    found: NDArray[np.int64] = np.searchsorted(-falling, -thresholds, side="right")
    return found
