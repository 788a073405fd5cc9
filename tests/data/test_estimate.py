"""Estimates of the documents' rows, before any activation is produced."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest

from dist_sae.config.data import ActivationsConfig, FilesCorpus, S3Config
from dist_sae.data import estimate
from dist_sae.data.corpus import Corpus
from dist_sae.data.estimate import estimate_rows
from dist_sae.data.tokens import cut
from dist_sae.errors import CorpusError
from tests.world import Letters

ACTIVATIONS = ActivationsConfig(sites=("resid_post.0",), context_tokens=64)


def text(chance: random.Random, n: int, share: float) -> str:
    """Return n characters: letters, which are tokens, and "!", which the tokenizer drops."""
    return "".join("a" if chance.random() < share else "!" for _ in range(n))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Two files of one-liners, one with twice the tokens per byte, and a file of six books."""
    folder, chance = tmp_path_factory.mktemp("corpus"), random.Random(0)
    names = [folder / name for name in ("a.txt", "b.txt", "books.txt")]
    for name, share in zip(names[:2], (0.3, 0.6), strict=True):
        lines = [
            "a" + text(chance, chance.randrange(20, 200), share * chance.uniform(0.8, 1.2))
            for _ in range(1500)
        ]
        name.write_text("\n".join(lines))
    books = [text(chance, chance.randrange(20_000, 60_000), 0.2 + 0.1 * i) for i in range(6)]
    names[2].write_text("\n".join(books))
    return Corpus(FilesCorpus(files=tuple(map(str, names)), txt_documents="line"), S3Config())


def true_rows(corpus: Corpus) -> np.ndarray:
    index, tokenizer = corpus.index(), Letters()
    rows = np.zeros(len(index.spans), dtype=int)
    for document in corpus.read(index.files, index.spans):
        for context in cut([document], tokenizer, context_tokens=64, bos=1):
            rows[document.number] += len(context.tokens) - 1
    return rows


def estimated(corpus: Corpus) -> np.ndarray:
    tokenizer = Letters()
    return estimate_rows(
        corpus, corpus.index(), ACTIVATIONS, tokenizer, bos=1, special=tokenizer.special
    )


def test_a_small_corpus_is_counted(corpus: Corpus) -> None:
    assert estimated(corpus).tolist() == true_rows(corpus).tolist()


def test_pieces_of_a_large_one_tell_its_rows_and_those_of_each_book(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling a tenth of the text estimates the rows of the corpus, of each file and of each book.

    With 600 pieces of 100 bytes, the corpus is within 3 %, files within 5 % and books within 10 %.
    """
    monkeypatch.setattr(estimate, "PIECES", 600)
    monkeypatch.setattr(estimate, "PIECE_BYTES", 100)
    true, found = true_rows(corpus), estimated(corpus)
    assert found.sum() == pytest.approx(true.sum(), rel=0.03)
    for file in (slice(0, 1500), slice(1500, 3000)):
        assert found[file].sum() == pytest.approx(true[file].sum(), rel=0.05)
    assert found[3000:] == pytest.approx(true[3000:], rel=0.1)


def test_twice_the_files_are_twice_the_work(tmp_path: Path) -> None:
    """Indexing and reading, also of moved files, take time linear in the number of files."""

    def steps(n: int) -> int:
        here, moved = tmp_path / f"{n}", tmp_path / f"{n}-moved"
        for folder in (here, moved):
            folder.mkdir()
            for i in range(n):
                (folder / f"{i}.txt").write_text(f"a{i}")
        taken = 0

        def step(_frame: object, event: str, _argument: object) -> None:
            nonlocal taken
            taken += event in ("call", "c_call")

        sys.setprofile(step)
        try:
            corpora = [Corpus(FilesCorpus(files=(f"{f}/*",)), S3Config()) for f in (here, moved)]
            index = corpora[0].index()
            for of in corpora:
                for span in index.spans:
                    of.read(index.files, [span])
        finally:
            sys.setprofile(None)
        return taken

    assert steps(120) < 2.2 * steps(60)


def test_texts_that_the_tokenizer_refuses_give_no_rows(corpus: Corpus) -> None:
    """Texts that the tokenizer refuses count as zero rows, because producers leave them out.

    If it refuses all texts, an error says so.
    """

    class Refusing(Letters):
        def __call__(self, texts: object) -> list[list[int]]:
            assert isinstance(texts, list)
            if any(len(text) > 10_000 for text in texts):
                raise ValueError("too long for me")
            return super().__call__(texts)

    def rows(corpus: Corpus) -> np.ndarray:
        tokenizer = Refusing()
        return estimate_rows(
            corpus, corpus.index(), ACTIVATIONS, tokenizer, bos=1, special=tokenizer.special
        )

    found = rows(corpus)
    assert found[:3000].tolist() == true_rows(corpus)[:3000].tolist()
    assert not found[3000:].any()
    books = corpus.index().files[2].name
    alone = Corpus(FilesCorpus(files=(books,), txt_documents="line"), S3Config())
    with pytest.raises(CorpusError, match="refuses all 6 documents"):
        rows(alone)


def test_what_is_excluded_at_the_beginning_of_a_context_is_not_counted(tmp_path: Path) -> None:
    """Excluded first positions are not counted as rows.

    130 letters in contexts of 64 with BOS are 63 + 63 + 4 tokens. Each context loses up to 7 tokens
    after BOS.
    """
    (tmp_path / "a.txt").write_text("a" * 130)
    corpus = Corpus(FilesCorpus(files=(str(tmp_path / "a.txt"),)), S3Config())
    activations = ACTIVATIONS.model_copy(
        update={"exclude": ACTIVATIONS.exclude.model_copy(update={"first_positions": 8})}
    )
    for pieces in (4096, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(estimate, "PIECES", max(1, pieces))
            patch.setattr(estimate, "PIECE_BYTES", 2048 if pieces else 10)
            (rows,) = estimate_rows(
                corpus, corpus.index(), activations, Letters(), bos=1, special=frozenset({1, 2})
            )
        assert rows == 56 + 56
