import random
from collections.abc import Sequence

import pytest
import torch

from dist_sae.data.corpus import Document
from dist_sae.data.tokens import Context, TokenBatch, cut, pack
from dist_sae.errors import CorpusError
from tests.world import Letters

LETTERS = Letters()
BOS = 1


def documents(*lengths: int) -> list[Document]:
    """Return documents in which no letter occurs twice, within or between documents."""
    first, result = 1000, []
    for number, length in enumerate(lengths):
        result.append(Document(number, "".join(map(chr, range(first, first + length)))))
        first += length
    return result


@pytest.mark.parametrize("bos", [None, BOS])
def test_cut_loses_and_doubles_no_token(bos: int | None) -> None:
    texts = documents(0, 1, 7, 8, 9, 100, 15, 16)
    contexts = list(cut(texts, LETTERS, context_tokens=8, bos=bos))
    found = [t for c in contexts for t in c.tokens if t != BOS]
    assert found == list(range(1000, 1000 + 156))
    assert all(len(c.tokens) <= 8 for c in contexts)
    assert {c.document for c in contexts} == {1, 2, 3, 4, 5, 6, 7}


def test_cut_puts_bos_before_every_context_and_counts_it() -> None:
    """9 tokens fill three contexts of 5 with BOS: 4 + 4 + 1."""
    contexts = list(cut(documents(9), LETTERS, context_tokens=5, bos=BOS))
    assert [c.tokens[0] for c in contexts] == [BOS] * 3
    assert [len(c.tokens) for c in contexts] == [5, 5, 2]
    assert [c.start for c in contexts] == [0, 4, 8]


def test_cut_without_bos_fills_contexts_with_text() -> None:
    contexts = list(cut(documents(9), LETTERS, context_tokens=5, bos=None))
    assert [len(c.tokens) for c in contexts] == [5, 4]
    assert [c.start for c in contexts] == [0, 5]


def packed(lengths: list[int], batch_tokens: int, bos: int | None = BOS) -> list[TokenBatch]:
    contexts = cut(documents(*lengths), LETTERS, context_tokens=64, bos=bos)
    return list(pack(contexts, batch_tokens=batch_tokens, bos=bos))


@pytest.mark.parametrize("bos", [None, BOS])
def test_pack_loses_and_doubles_no_token_and_says_where_each_is(bos: int | None) -> None:
    """Each token is packed once, with its correct document and position.

    Token 1000 + i is the corpus's i-th, which determines both.
    """
    lengths = [random.Random(n).randint(0, 200) for n in range(40)]
    places = [(d, p) for d, length in enumerate(lengths) for p in range(length)]
    seen = []
    for batch in packed(lengths, 512, bos):
        text = batch.mask & (batch.tokens != BOS)
        assert torch.equal(text, batch.positions >= 0)
        for token, document, position in zip(
            batch.tokens[text], batch.documents[text], batch.positions[text], strict=True
        ):
            assert places[int(token) - 1000] == (int(document), int(position))
            seen.append(int(token))
    assert sorted(seen) == list(range(1000, 1000 + sum(lengths)))


def test_pack_puts_padding_on_the_right_and_bos_at_offset_zero() -> None:
    (batch,) = packed([3, 1], 100)
    assert batch.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.tokens[:, 0].tolist() == [BOS, BOS]
    assert batch.positions.tolist() == [[-1, 0, 1, 2], [-1, 0, -1, -1]]
    assert batch.offsets.tolist() == [[0, 1, 2, 3]] * 2
    assert batch.documents.tolist() == [[0] * 4, [1] * 4]


def test_positions_go_on_in_later_contexts_of_a_document() -> None:
    contexts = cut(documents(9), LETTERS, context_tokens=5, bos=BOS)
    (batch,) = pack(contexts, batch_tokens=100, bos=BOS)
    assert batch.positions.tolist() == [[-1, 0, 1, 2, 3], [-1, 4, 5, 6, 7], [-1, 8, -1, -1, -1]]


def test_batches_are_within_the_limit() -> None:
    lengths = [random.Random(n).randint(1, 60) for n in range(300)]
    assert all(batch.tokens.numel() <= 256 for batch in packed(lengths, 256))


def test_a_context_longer_than_the_limit_goes_alone() -> None:
    assert [batch.tokens.shape for batch in packed([50, 50, 3], 40)] == [(1, 51), (1, 51), (1, 4)]


def test_little_is_padding_when_lengths_differ() -> None:
    """Contexts are sorted by length, so under 5 % of a batch is padding.

    Lengths are uniform in 1 to 63, with about 32 contexts per batch. In arrival order half would be
    padding.
    """
    lengths = [random.Random(n).randint(1, 63) for n in range(1000)]
    batches = packed(lengths, 1024)
    slots = sum(batch.mask.numel() for batch in batches)
    padding = sum(int((~batch.mask).sum()) for batch in batches)
    assert padding / slots < 0.05


def test_the_order_of_rows_does_not_depend_on_the_size_of_a_batch() -> None:
    """`model.batch_tokens` is not part of the plan, so it must not change the order of rows."""
    lengths = [random.Random(n).randint(1, 60) for n in range(100)]

    def rows(batch_tokens: int) -> list[int]:
        return [int(t) for b in packed(lengths, batch_tokens) for t in b.tokens[b.mask]]

    assert rows(64) == rows(1000) == rows(100_000)


def test_nothing_gives_nothing() -> None:
    assert list(cut(documents(0, 0), LETTERS, context_tokens=8, bos=BOS)) == []
    assert list(pack([], batch_tokens=8, bos=BOS)) == []
    (batch,) = pack([Context(4, 0, [BOS, 7])], batch_tokens=8, bos=BOS)
    assert batch.tokens.tolist() == [[BOS, 7]]


@pytest.mark.parametrize("seed", range(5))
def test_little_is_padding_and_batches_are_large_all_the_same(seed: int) -> None:
    """Under 5 % is padding and batches are nearly full for lengths like those of articles.

    Many contexts reach the limit, and the rest have all kinds of lengths.
    """
    chance = random.Random(seed)
    lengths = [64] * 100 + [chance.randint(1, 64) for _ in range(150)]
    contexts = [Context(n, 0, [7] * length) for n, length in enumerate(lengths)]
    batches = list(pack(contexts, batch_tokens=512, bos=None))
    padded = sum(batch.tokens.numel() for batch in batches)
    assert sum(int(batch.mask.sum()) for batch in batches) == sum(lengths)
    assert padded - sum(lengths) <= 0.05 * padded
    assert len(batches) <= 2 * sum(lengths) / 512


class Fussy(Letters):
    """A tokenizer that refuses text with a question mark."""

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        if any("?" in text for text in texts):
            raise TypeError("TextEncodeInput must be a text\nand this is none")
        return super().__call__(texts)


def test_a_document_that_the_tokenizer_refuses_is_told_and_left_out() -> None:
    texts = [Document(0, "ab"), Document(1, "c?"), Document(2, "de")]
    told: list[tuple[int, str]] = []
    contexts = cut(
        texts,
        Fussy(),
        context_tokens=8,
        bos=None,
        failed=lambda document, exc: told.append((document.number, type(exc).__name__)),
    )
    assert [c.document for c in contexts] == [0, 2]
    assert told == [(1, "TypeError")]
    with pytest.raises(TypeError):
        list(cut(texts, Fussy(), context_tokens=8, bos=None))


def test_half_a_surrogate_pair_reaches_no_tokenizer() -> None:
    """Half a surrogate pair is refused before tokenizing.

    The tokenizer `Letters` would accept it as a letter.
    """
    texts = [Document(0, "a\ud800"), Document(1, "b")]
    told: list[int] = []
    contexts = cut(
        texts,
        Letters(),
        context_tokens=8,
        bos=None,
        failed=lambda document, _: told.append(document.number),
    )
    assert [(c.document, c.tokens) for c in contexts] == [(1, [ord("b")])]
    assert told == [0]
    with pytest.raises(CorpusError, match="half a surrogate pair"):
        list(cut(texts, Letters(), context_tokens=8, bos=None))


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (MemoryError("no room"), MemoryError),
        (OSError("disk"), OSError),
        (TypeError("broken"), CorpusError),
    ],
)
def test_a_tokenizer_that_refuses_everything_is_broken(
    error: Exception, raised: type[Exception]
) -> None:
    """An error that is not about a single text is raised, and no document is dropped for it."""

    def broken(texts: Sequence[str]) -> list[list[int]]:
        raise error

    texts = [Document(0, "ab"), Document(1, "cd")]
    with pytest.raises(raised, match=str(error)):
        list(cut(texts, broken, context_tokens=8, bos=None, failed=lambda *_: None))
