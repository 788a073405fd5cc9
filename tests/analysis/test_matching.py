"""Matching words to latents, on artificial activations where the answer is known."""

import numpy as np
import pytest
from numpy.typing import NDArray

from dist_sae.analysis.coverage import cover_words, coverage, frequencies
from dist_sae.analysis.matching import match_words
from dist_sae.analysis.words import Concept, WordRows, find_words
from dist_sae.errors import ArgumentError
from tests.analysis.in_memory import InMemoryIndex, Vocabulary

UNITS, UNIT_ROWS = 8, 2000
WORDS = [f" w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(30)]
"""Thirty words, most frequent first."""
CONCEPTS = [Concept(word.strip(), "made") for word in WORDS]
Codes = dict[int, tuple[NDArray[np.int64], NDArray[np.float32]]]


def text(generator: np.random.Generator) -> NDArray[np.int32]:
    """Return tokens: word i with probability .06 / (1 + i), else one that is not in the list."""
    p = 0.06 / (1 + np.arange(len(WORDS)))
    draws = generator.choice(len(WORDS) + 1, UNITS * UNIT_ROWS, p=[*p, 1 - p.sum()])
    return draws.astype(np.int32)


def noise(generator: np.random.Generator, n: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return firings on random rows, with activations up to 1."""
    rows = np.sort(generator.choice(UNITS * UNIT_ROWS, n, replace=False))
    return rows, generator.uniform(0.01, 1, n).astype(np.float32)


def detector(
    tokens: NDArray[np.int32], word: int, generator: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return firings at 2 or more on 90 % of a word's rows, and below 1 on 200 random rows."""
    hits = np.flatnonzero(tokens == word)
    hits = hits[generator.random(len(hits)) < 0.9]
    acts = np.zeros(len(tokens), np.float32)
    other, weak = noise(generator, 200)
    acts[other] = weak
    acts[hits] = generator.uniform(2, 3, len(hits))
    rows = np.flatnonzero(acts)
    return rows, acts[rows]


def made(codes: Codes, tokens: NDArray[np.int32], n_latents: int) -> InMemoryIndex:
    return InMemoryIndex(tokens, UNIT_ROWS, codes, n_latents, piece_entries=97)


@pytest.fixture(scope="module")
def tokens() -> NDArray[np.int32]:
    return text(np.random.default_rng(1))


@pytest.fixture(scope="module")
def words(tokens: NDArray[np.int32]) -> WordRows:
    return find_words(made({}, tokens, 1), Vocabulary([*WORDS, " the"]), CONCEPTS)


def test_detectors_are_found_with_the_threshold_that_parts_signal_from_noise(
    tokens: NDArray[np.int32], words: WordRows
) -> None:
    generator = np.random.default_rng(2)
    codes: Codes = {7 * word: detector(tokens, word, generator) for word in range(12)}
    codes |= {latent: noise(generator, 300) for latent in range(84) if latent % 7}
    codes[83] = (codes[0][0][::2], codes[0][1][::2])  # a worse detector of word 0
    matched = match_words(made(codes, tokens, 84), words, len(WORDS))
    counts = np.bincount(tokens)[:30]
    assert matched.occurrences.sum(0).tolist() == counts.tolist()
    assert set(matched.matches) == set(range(12))
    for word, match in matched.matches.items():
        assert match.latent == 7 * word
        assert 1 < match.threshold < 2.2
        assert match.precision == 1
    recall = np.mean([match.recall for match in matched.matches.values()])
    assert recall == pytest.approx(0.9, abs=0.04)
    # F1 at precision 1 and recall r
    expected = [2 * m.recall / (1 + m.recall) for m in matched.matches.values()]
    assert [m.f1 for m in matched.matches.values()] == pytest.approx(expected)


def test_a_latent_of_two_words_belongs_to_one(tokens: NDArray[np.int32], words: WordRows) -> None:
    """A latent that fires on two words matches the more frequent one.

    Its precision is about 2/3 for the first and 1/3 for the second.
    """
    rows = np.flatnonzero(tokens <= 1)
    codes = {0: (rows, np.ones(len(rows), np.float32))}
    matched = match_words(made(codes, tokens, 1), words, len(WORDS))
    assert set(matched.matches) == {0}
    share = (tokens == 0).sum() / len(rows)
    assert matched.matches[0].precision == pytest.approx(share, abs=0.05)
    assert matched.matches[0].recall == 1


def test_other_tokens_of_a_word_are_neither_hits_nor_false_alarms() -> None:
    """A latent that fires on both tokens of a two-token word has F1 = 1."""
    texts = [" hel", "ium", " the"]
    tokens = np.tile(np.array([0, 1, 2, 2, 2], np.int32), 100)
    rows = np.flatnonzero(tokens < 2)
    index = InMemoryIndex(tokens, 50, {0: (rows, np.ones(len(rows), np.float32))})
    concepts = [Concept("helium", "elements")]
    found = match_words(index, find_words(index, Vocabulary(texts), concepts), 1)
    assert found.matches[0].f1 == 1


@pytest.mark.parametrize("control", ["shuffled rows", "random dictionary"])
def test_controls_find_nothing(control: str, tokens: NDArray[np.int32], words: WordRows) -> None:
    """Latents that fire on random rows, or detect words of shuffled rows, recover no word."""
    generator = np.random.default_rng(3)
    if control == "shuffled rows":
        shuffled = generator.permutation(tokens)
        codes = {i: detector(shuffled, i % 30, generator) for i in range(300)}
    else:
        codes = {i: noise(generator, int(n)) for i, n in enumerate(np.geomspace(5, 3000, 300))}
    index = made(codes, tokens, 300)
    matched = match_words(index, words, len(WORDS))
    assert not matched.recovered(0.5).any()
    frequency = frequencies(CONCEPTS, words, 1.0)
    firings = np.full(300, 99)
    covered = cover_words("made", firings, 10**6, CONCEPTS, frequency, matched, 0.5)
    findings = coverage([covered], [])
    assert findings.numbers["runs"]["made"]["recovered"] == 0
    assert (
        findings.summary[1] == "made: nothing found: no concept has a latent, so there is no curve"
    )


def test_frequencies_are_counted_or_are_the_counts_of_the_list(words: WordRows) -> None:
    seen = np.bincount(words.concept, minlength=30)
    own = frequencies(CONCEPTS, words, 1.0)
    assert own.tolist() == pytest.approx(seen / (UNITS * UNIT_ROWS))
    assert frequencies(CONCEPTS, words, 0.5).tolist() == pytest.approx(2 * own)
    counted = [concept._replace(times=3.0 * (i + 1)) for i, concept in enumerate(CONCEPTS)]
    by_list = frequencies(counted, words, 1.0)
    assert by_list.sum() == pytest.approx(own.sum())
    assert (by_list / by_list[0]).tolist() == pytest.approx(list(range(1, 31)))


def test_too_few_words_or_rows_are_refused_with_the_number(
    tokens: NDArray[np.int32], words: WordRows
) -> None:
    absent = words._replace(
        rows=words.rows[:0], concept=words.concept[:0], is_last=words.is_last[:0]
    )
    with pytest.raises(ArgumentError, match=r"none of the 30 words occurs in the 16,000 rows"):
        frequencies(CONCEPTS, absent, 1.0)
    rarer = find_words(made({}, tokens[:3000], 1), Vocabulary([*WORDS, " the"]), CONCEPTS)
    matched = match_words(made({}, tokens[:3000], 1), rarer, 30)
    n = int(matched.judged.sum())
    assert 0 < n < 20
    message = rf"only {n} of the 30 words occur 5 times in each half of the index, but a curve"
    with pytest.raises(ArgumentError, match=message):
        cover_words(
            "made", np.ones(1, int), 1, CONCEPTS, rarer.starts[:1] + np.ones(30), matched, 0.5
        )


def test_a_share_of_the_frequent_words_gives_a_curve_and_its_sentences(
    tokens: NDArray[np.int32], words: WordRows
) -> None:
    generator = np.random.default_rng(4)
    codes: Codes = {word: detector(tokens, word, generator) for word in range(15)}
    matched = match_words(made(codes, tokens, 15), words, len(WORDS))
    frequency = frequencies(CONCEPTS, words, 1.0)
    covered = cover_words("made", np.ones(15, int), 5000, CONCEPTS, frequency, matched, 0.5)
    findings = coverage([covered], [])
    numbers = findings.numbers["runs"]["made"]
    judged = int(matched.judged.sum())
    assert (numbers["recovered"], numbers["concepts"]) == (15, judged)
    # words 14 and 15, counted from 0, occur at rates .06 / 15 and .06 / 16
    assert numbers["f50"]["value"] == pytest.approx(0.06 / 15.5, rel=0.15)
    assert numbers["f50_firings"] == pytest.approx(5000 * numbers["f50"]["value"])
    assert judged == 30
    assert findings.caveats == []
    assert any(": undertrained: " in line for line in findings.summary)
    assert findings.tables["concepts"].num_rows == 30
    assert numbers["recovered_by_category"] == {"made": [15, judged]}
    assert len(findings.figures) == 2
