"""Passages of the corpus, drawn in two stages, with judged levels and activations of latents.

First stage: a cheap filter. All passages that it passes are kept, and a random share of the others.
Second stage: the kept passages are judged. Each is weighted by one over the probability with which
it was kept (Horvitz and Thompson 1952). So passages that the filter misses are represented, and
estimates are unbiased even if the filter is bad.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist_sae.analysis.judges import HAS, Judge, Key, Label
from dist_sae.analysis.words import Rows, TokenTexts
from dist_sae.errors import ArgumentError
from dist_sae.index.codes import hash_bound, row_hashes

SHARES = (0.0, 0.1, 0.5)
"""Thresholds of a latent, as shares of its largest activation."""
PEERS = 99
"""Number of other latents that a latent is compared with."""
_DRAW = 7  # purpose number of the seeded draw, different from those of the index


class Latents(Rows, Protocol):
    """The part of a latent index that is read here; see `index.query.Index`."""

    def postings(self, latent: int) -> Iterator[pa.Table]:
        """Yield all activations of a latent."""
        ...


class Sampling(NamedTuple):
    """How the corpus is cut into passages, and how they are drawn."""

    tokens: int = 32
    """Tokens of a passage. With 1, single tokens are judged."""
    filter: Judge | None = None
    """The cheap filter. None keeps every passage, so there is no sampling."""
    share: float = 1.0
    """Share that is kept of the passages that the filter rejects."""
    seed: int = 0


class Judged(NamedTuple):
    """Judged passages, with the largest activation of one latent on each."""

    document: NDArray[np.int64]
    level: NDArray[np.int8]
    act: NDArray[np.float32]
    """Largest activation on each passage; 0 where the latent does not fire."""
    weight: NDArray[np.float64]
    """One over the probability with which each passage was kept."""
    in_filter: NDArray[np.bool_]
    peers: NDArray[np.float64] = np.zeros(0)
    """Best F1 over `SHARES` of each other latent, on the same passages and concept."""


class _Passages(NamedTuple):
    """Passages of a unit."""

    keys: list[Key]
    texts: list[str]
    of_row: NDArray[np.int64]
    """Passage of each row."""


def judge_passages(
    index: Latents,
    tokens: TokenTexts,
    pairs: Sequence[tuple[int, Judge]],
    sampling: Sampling,
    peers: Sequence[int] = (),
) -> list[Judged]:
    """Judge passages for each pair of a latent and a judge, in one pass over the rows.

    Memory contains the postings of these latents and of the peers, one unit's text, and an entry
    for each judged passage.

    Args:
        index: The index, with all postings.
        tokens: Texts of the model's tokens.
        pairs: Latents, each with a judge of its concept.
        sampling: How passages are drawn. Judges with labels have their own sample instead.
        peers: Other latents, to compare with.

    Raises:
        ArgumentError: Some labeled passages do not exist, or one side of the filter has no label.
    """
    firings = {latent: _Firings(index, latent) for latent in {*peers, *(pair[0] for pair in pairs)}}
    scores = [_Scores([firings[peer].max_act for peer in peers]) for _ in pairs]
    parts: list[list[Judged]] = [[] for _ in pairs]
    chances_of = [_judged_shares(judge) for _, judge in pairs]
    for unit in index.manifest.units:
        passages = _passages_of(index.origins(unit), tokens, sampling.tokens)
        drawn = _drawn(passages, sampling, unit)
        acts = {
            latent: of.largest(unit, passages.of_row, len(passages.keys))
            for latent, of in firings.items()
        }
        for part, score, own, (latent, judge) in zip(parts, scores, chances_of, pairs, strict=True):
            labels = drawn if judge.labels is None else _labelled(passages, judge.labels, own)
            here = np.array(list(labels), np.int64)
            part.append(
                Judged(
                    np.array([passages.keys[i].document for i in here], np.int64),
                    np.array(_levels(judge, passages, labels), np.int8),
                    acts[latent][here],
                    np.array([1 / label.chance for label in labels.values()]),
                    np.array([label.in_filter for label in labels.values()], np.bool_),
                )
            )
            score.add(part[-1], [acts[peer][here] for peer in peers])
    judged = [
        Judged(*(np.concatenate(columns) for columns in zip(*part, strict=True)))._replace(
            peers=score.f1
        )
        for part, score in zip(parts, scores, strict=True)
    ]
    for (_, judge), found in zip(pairs, judged, strict=True):
        if judge.labels is not None:
            wanted = sum(label.level is not None for label in judge.labels.values())
            if wanted > len(found.level):
                raise ArgumentError(
                    f"{judge.text}: {wanted - len(found.level)} of {wanted} labeled passages are "
                    f"not in the index; was the sample drawn from another index, or with a "
                    f"--passage other than {sampling.tokens}?"
                )
    return judged


def _levels(judge: Judge, passages: _Passages, labels: Mapping[int, Label]) -> list[int]:
    known = {place: label.level for place, label in labels.items() if label.level is not None}
    unknown = [place for place in labels if place not in known]
    judged = judge.levels([passages.texts[place] for place in unknown]) if unknown else []
    levels = known | dict(zip(unknown, judged, strict=True))
    return [levels[place] for place in labels]


def draw_passages(
    index: Rows, tokens: TokenTexts, sampling: Sampling
) -> list[tuple[Key, Label, str]]:
    """Draw passages to be judged elsewhere, in random order."""
    drawn = []
    for unit in index.manifest.units:
        passages = _passages_of(index.origins(unit), tokens, sampling.tokens)
        for place, label in _drawn(passages, sampling, unit).items():
            drawn.append((passages.keys[place], label, passages.texts[place]))
    order = np.random.default_rng(sampling.seed).permutation(len(drawn))
    return [drawn[i] for i in order.tolist()]


def _passages_of(rows: pa.Table, tokens: TokenTexts, length: int) -> _Passages:
    token, position, document = (rows[n].to_numpy() for n in ("token", "position", "document"))
    order = np.lexsort((position, document))
    position, document = position[order] // length, document[order]
    starts = np.ones(len(order), np.bool_)
    starts[1:] = (document[1:] != document[:-1]) | (position[1:] != position[:-1])
    first = np.flatnonzero(starts)
    texts, place = tokens.texts(token[order])
    pieces = [texts[i] for i in place.tolist()]
    ends = [*first[1:].tolist(), len(order)][: len(first)]
    of_row = np.empty(len(order), np.int64)
    of_row[order] = starts.cumsum() - 1
    return _Passages(
        [
            Key(*key)
            for key in zip(
                document[first].tolist(), (position[first] * length).tolist(), strict=True
            )
        ],
        ["".join(pieces[a:b]) for a, b in zip(first.tolist(), ends, strict=True)],
        of_row,
    )


def _drawn(passages: _Passages, sampling: Sampling, unit: int) -> dict[int, Label]:
    """Draw the passages of a unit that are kept, by position in the unit."""
    n = len(passages.keys)
    if sampling.filter is None:
        return dict.fromkeys(range(n), Label(None, 1.0, in_filter=True))
    number = row_hashes(sampling.seed, _DRAW, unit, np.arange(n))
    lucky = number < hash_bound(sampling.share)
    drawn = {}
    for place, level in enumerate(sampling.filter.levels(passages.texts)):
        if level >= HAS:
            drawn[place] = Label(None, 1.0, in_filter=True)
        elif lucky[place]:
            drawn[place] = Label(None, sampling.share, in_filter=False)
    return drawn


def _judged_shares(judge: Judge) -> dict[bool, float]:
    """Return the share of the drawn passages that were judged, inside and outside the filter.

    Judging may stop early because passages are in random order. The judged ones then represent the
    rest.

    Raises:
        ArgumentError: No passage inside the filter was judged, or none outside.
    """
    found = {}
    for inside in (True, False):
        of_file = (judge.labels or {}).values()
        levels = [label.level for label in of_file if label.in_filter == inside]
        found[inside] = sum(level is not None for level in levels) / max(1, len(levels))
        if levels and not found[inside]:
            where = "inside" if inside else "outside"
            raise ArgumentError(
                f"{judge.text}: none of the {len(levels)} passages {where} the filter has a "
                f"label, so they cannot be estimated; label more lines, starting at the top"
            )
    return found


def _labelled(
    passages: _Passages, labels: Mapping[Key, Label], judged_share: Mapping[bool, float]
) -> dict[int, Label]:
    """Return the labels of a unit's passages that have a level, by position in the unit."""
    found = {}
    for place, key in enumerate(passages.keys):
        label = labels.get(key)
        if label is not None and label.level is not None:
            chance = label.chance * judged_share[label.in_filter]
            found[place] = label._replace(chance=chance)
    return found


class _Firings:
    """Activations of a latent, by unit."""

    def __init__(self, index: Latents, latent: int) -> None:
        table = pa.concat_tables(index.postings(latent))
        self._unit, self._row, self._act = (
            table[name].to_numpy() for name in ("unit", "row", "act")
        )

    @property
    def max_act(self) -> float:
        """Largest activation on any row; 0 if the latent never fires."""
        return float(self._act.max(initial=0))

    def largest(self, unit: int, of_row: NDArray[np.int64], n: int) -> NDArray[np.float32]:
        """Return the largest activation in each of a unit's `n` passages."""
        start, stop = np.searchsorted(self._unit, [unit, unit + 1])
        found = np.zeros(n, np.float32)
        np.maximum.at(found, of_row[self._row[start:stop]], self._act[start:stop])
        return found


class _Scores:
    """F1 of several latents for one concept, from sums over units.

    Args:
        most: Largest activation of each latent.
    """

    def __init__(self, most: Sequence[float]) -> None:
        self._thresholds = np.outer(most, SHARES)
        self._both, self._firing = np.zeros((2, len(most), len(SHARES)))
        self._concept = 0.0

    def add(self, judged: Judged, acts: Sequence[NDArray[np.float32]]) -> None:
        concept = judged.weight * (judged.level >= HAS)
        self._concept += float(concept.sum())
        for i, act in enumerate(acts):
            fires = act > self._thresholds[i, :, None]
            self._both[i] += fires @ concept
            self._firing[i] += fires @ judged.weight

    @property
    def f1(self) -> NDArray[np.float64]:
        total = np.maximum(self._concept + self._firing, 1e-300)
        return np.asarray((2 * self._both / total).max(1, initial=0))
