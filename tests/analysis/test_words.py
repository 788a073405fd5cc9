"""Word lists, and where words occur in rows."""

from pathlib import Path

import numpy as np
import pytest

from dist_sae.analysis.words import LISTS, Concept, corpus_words, find_words, read_lists
from dist_sae.errors import ArgumentError
from tests.analysis.in_memory import VOCABULARY, InMemoryIndex, Vocabulary

CONCEPTS = [Concept("gold", "elements"), Concept("helium", "elements"), Concept("Paris", "cities")]


def tokens_of(texts: list[str]) -> list[int]:
    return [VOCABULARY.index(text) for text in texts]


def test_a_word_stands_at_its_last_token() -> None:
    # gold; helium as two tokens; golds, golden and paris are other words; gold-en contains gold
    texts = [" gold", ".", " hel", "ium", " gold", "s", " gold", "en", " paris", " Paris"]
    texts += [" gold", "-", "en"]
    index = InMemoryIndex(np.array(tokens_of(texts)), 100, {})
    found = find_words(index, Vocabulary(), [*CONCEPTS, Concept("en", "x")])
    assert found.rows.tolist() == [0, 2, 3, 9, 10, 12]
    assert found.concept.tolist() == [0, 1, 1, 2, 0, 3]
    assert found.is_last.tolist() == [True, False, True, True, True, True]
    assert found.starts.tolist() == [0, 13]


def test_words_end_with_their_document_and_need_all_their_tokens() -> None:
    """Words end with their document, and a word whose first token is missing does not count.

    Rows of a unit may be in any order.
    """
    texts = ["ium", " hel", "ium", " hel", " gold", "s"]
    documents = np.array([0, 0, 1, 2, 3, 4])
    positions = np.array([1, 0, 5, 9, 7, 0], np.int32)
    index = InMemoryIndex(
        np.array(tokens_of(texts)), 100, {}, documents=documents, positions=positions
    )
    found = find_words(index, Vocabulary(), [*CONCEPTS, Concept("ium", "x"), Concept("s", "x")])
    # " hel" + "ium" of document 0 counts; the "ium" of document 1 does not, because its beginning
    # is missing; "s" begins document 4
    assert found.rows.tolist() == [0, 1, 4, 5]
    assert found.concept.tolist() == [1, 1, 0, 4]
    assert found.is_last.tolist() == [True, False, True, True]


def test_words_of_the_corpus_are_chosen_evenly_over_log_frequency() -> None:
    """Corpus words are spread evenly over log frequency.

    Of 80 words the n-th occurs 1600 / n times. 10 words with at least 20 occurrences are requested.
    """
    texts = [f" w{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(80)]
    texts[1] = " 1999"  # not a word
    times = [1600 // (n + 1) for n in range(80)]
    times[79] = 19  # too rare
    tokens = np.repeat(np.arange(80, dtype=np.int32), times)
    index = InMemoryIndex(np.random.default_rng(0).permutation(tokens), 1000, {})
    chosen = corpus_words(index, Vocabulary(texts), 10, 20)
    numbers = [texts.index(f" {concept.word}") for concept in chosen]
    assert len(set(numbers)) == 10
    assert not {1, 79} & set(numbers)
    assert 0 in numbers  # the only word in its tenth of the range
    logs = np.log([times[number] for number in numbers])
    # only 11 % of all words are in this half
    assert 0.3 < np.mean(logs > np.log([20, 1600]).mean()) < 0.6
    assert len(corpus_words(index, Vocabulary(texts), 500, 20)) == 78


def test_rows_are_counted_over_units() -> None:
    index = InMemoryIndex(np.array(tokens_of([".", " the", " gold", " the"])), 2, {})
    found = find_words(index, Vocabulary(), CONCEPTS)
    assert (found.rows.tolist(), found.starts.tolist()) == ([2], [0, 2, 4])


def test_a_tokenizer_that_shows_no_spaces_is_refused() -> None:
    index = InMemoryIndex(np.arange(100, dtype=np.int32) % 3, 100, {})
    with pytest.raises(ArgumentError, match="show no spaces"):
        find_words(index, Vocabulary(["gold", "silver", "en"]), CONCEPTS)


def test_the_lists_that_come_along_are_words_and_disjoint() -> None:
    concepts = read_lists(LISTS)
    sizes = {name: len(read_lists([name])) for name in LISTS}
    assert sizes["elements"] == 118
    assert min(sizes.values()) >= 100
    assert len(concepts) == sum(sizes.values())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "list.txt: has no words"),
        ("# none\n\n", "list.txt: has no words"),
        ("New York\n", 'list.txt, line 1: "New York" is not a single word'),
        ("gold\t7\nsilver\n", 'list.txt: "silver" has no count but other words do'),
        ("gold\tmany\n", 'list.txt, line 1: "many" is not a count'),
        ("gold\ngold\n", 'list.txt: has "gold" twice'),
    ],
)
def test_a_list_that_is_none_is_refused_in_one_line(
    tmp_path: Path, lines: str, message: str
) -> None:
    path = tmp_path / "list.txt"
    path.write_text(lines)
    with pytest.raises(ArgumentError) as refused:
        read_lists([str(path)])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_counts_are_given_for_all_lists_or_for_none(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("gold\t7\nsilver\t2.5\n")
    assert [c.times for c in read_lists([str(tmp_path / "one.txt")])] == [7, 2.5]
    with pytest.raises(ArgumentError, match="cities: has no counts but another list does"):
        read_lists([str(tmp_path / "one.txt"), "cities"])
    with pytest.raises(ArgumentError, match="nowhere: is neither a built-in list"):
        read_lists(["nowhere"])
