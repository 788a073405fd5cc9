"""Excluded documents and rows, and text that gives no rows."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import dist_sae.producing.loop
from dist_sae.config import Run
from dist_sae.data.shard import read_manifest
from dist_sae.errors import CorpusError
from dist_sae.producing.planner import plan
from dist_sae.storage import ObjectStore, open_store
from tests.producing.producers import (
    SITES,
    TEXTS,
    LetterSource,
    letters_run,
    rows_of,
    start,
    stored_units,
    with_source,
)
from tests.world import Letters


def test_what_is_left_out_is_counted_and_adds_up(letters: tuple[Run, ObjectStore]) -> None:
    """Excluded rows are counted by reason, and all counts add up.

    Each context loses its BOS and the next position. The letter "z" has too large a norm at the
    second site.
    """
    run, store = letters
    start(run, "a")
    tokens = "".join(TEXTS)
    contexts = sum(-(-len(text) // 4) for text in TEXTS)
    counts: Counter[str] = Counter()
    stored = ""
    slots = 0
    for unit in stored_units(store):
        manifest = read_manifest(store, unit)
        counts.update(manifest.excluded)
        stored += "".join(map(chr, rows_of(store, unit, SITES[0]).tokens.tolist()))
        slots += manifest.rows + sum(manifest.excluded.values())
        assert manifest.documents == len(plan(run).units[unit])
    assert counts["special_token"] == contexts
    assert counts["first_position"] == contexts
    first = Counter(text[i] for text in TEXTS for i in range(0, len(text), 4))
    expected = Counter(tokens) - first
    assert counts["over_norm"] == expected.pop("z") > 0
    assert Counter(stored) == expected
    assert slots == len(tokens) + contexts + counts["padding"]


def test_all_sites_hold_the_same_rows_in_the_same_order(letters: tuple[Run, ObjectStore]) -> None:
    run, store = letters
    start(run, "a")
    for unit in stored_units(store):
        one, other = (rows_of(store, unit, site) for site in SITES)
        assert torch.equal(one.acts, -other.acts)
        for a, b in zip(one[1:], other[1:], strict=True):
            assert torch.equal(a, b)


def test_a_refused_document_is_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Fussy(Letters):
        def __call__(self, texts: Sequence[str]) -> list[list[int]]:
            if any("?" in text for text in texts):
                raise TypeError("TextEncodeInput must be text")
            return super().__call__(texts)

    run = letters_run(tmp_path, monkeypatch, [*TEXTS, "ab?", "cdefghij?", "k\ud800"])
    monkeypatch.setattr(dist_sae.producing.loop, "build_tokenizer", lambda *_: Fussy())
    with_source(monkeypatch, LetterSource())
    start(run, "a")
    store = open_store(run.store.activations)
    manifests = [read_manifest(store, unit) for unit in stored_units(store)]
    assert sum(m.refused for m in manifests) == 3
    assert sum(m.documents for m in manifests) == len(TEXTS) + 3
    assert sum("the tokenizer refuses it" in message for message in caplog.messages) == 3
    documents = torch.cat([rows_of(store, m.unit, SITES[0]).documents for m in manifests])
    assert not set(documents.tolist()) & {60, 61, 62}
    assert (
        sum("1 of 63 documents contain half a surrogate" in text for text in caplog.messages) == 1
    )


def test_a_corpus_that_changed_is_an_error_and_writes_nothing(
    letters: tuple[Run, ObjectStore], tmp_path: Path
) -> None:
    run, store = letters
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n" + corpus.read_text())  # shifts all documents by one byte
    with pytest.raises(CorpusError, match=r"corpus\.jsonl"):
        start(run, "a")
    assert list(store.keys()) == ["plan.json"]


class FirstLetters(Letters):
    """A tokenizer that returns only the first `n` tokens of every document.

    The plan may have expected more.
    """

    def __init__(self, n: int) -> None:
        self._n = n

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return [ids[: self._n] for ids in super().__call__(texts)]


def test_a_unit_without_a_token_is_an_error_that_says_so(
    letters: tuple[Run, ObjectStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = letters
    monkeypatch.setattr(dist_sae.producing.loop, "build_tokenizer", lambda *_: FirstLetters(0))
    with pytest.raises(CorpusError, match=r"unit 0: its .* documents contain no tokens"):
        start(run, "a")
    assert list(store.keys()) == ["plan.json"]


def test_a_unit_whose_rows_are_all_left_out_exists_and_is_empty(
    letters: tuple[Run, ObjectStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit whose rows are all excluded is stored without rows.

    Documents of one letter have no row after BOS and the first position.
    """
    run, store = letters
    monkeypatch.setattr(dist_sae.producing.loop, "build_tokenizer", lambda *_: FirstLetters(1))
    start(run, "a")
    manifests = [read_manifest(store, unit) for unit in stored_units(store)]
    assert len(manifests) == len(plan(run).units)
    assert {manifest.rows for manifest in manifests} == {0}
