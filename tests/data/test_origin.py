"""`store verify --text` finds rows of other text, lost rows and repeated rows."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import dist_sae.producing.loop
import dist_sae.producing.verify
from dist_sae.config import Run
from dist_sae.data.corpus import Document
from dist_sae.data.origin import UnitText
from dist_sae.data.shard import SiteRows
from dist_sae.errors import CorpusError
from dist_sae.producing.verify import verify
from tests.producing.producers import LetterSource, letters_run, start, with_source
from tests.world import Letters

# all texts differ
TEXTS = ["abcdefgh" + "abcdefghijklm"[n % 13] * (1 + n // 13) for n in range(60)]


class Shouts(Letters):
    """A tokenizer that reads one text in capitals and drops the last letter of another."""

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        changed = [
            text.upper() if text == TEXTS[5] else text[:-1] if text == TEXTS[7] else text
            for text in texts
        ]
        return super().__call__(changed)


@pytest.fixture
def produced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Letters) -> Run:
    run = letters_run(tmp_path, monkeypatch, [*TEXTS, "half \ud800"])
    monkeypatch.setattr(dist_sae.producing.loop, "build_tokenizer", lambda *_: tokenizer)
    monkeypatch.setattr(dist_sae.producing.verify, "build_tokenizer", lambda *_: Letters())
    with_source(monkeypatch, LetterSource())
    start(run, "a")
    return run


@pytest.mark.parametrize("tokenizer", [Letters()])
def test_rows_of_the_planned_text_are_sound(produced: Run, tmp_path: Path) -> None:
    found = verify(produced, text=True)
    assert found["bad_objects"] == {}
    # all letters but the first of each context of 4
    assert found["rows_compared_with_text"] == sum(len(text) - -(-len(text) // 4) for text in TEXTS)
    assert verify(produced) == {
        key: value for key, value in found.items() if key != "rows_compared_with_text"
    }
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(corpus.read_text().upper())
    with pytest.raises(CorpusError, match="changed since the plan was made"):
        verify(produced, text=True)


@pytest.mark.parametrize("tokenizer", [Shouts()])
def test_rows_of_other_text_are_named(produced: Run) -> None:
    assert verify(produced)["bad_objects"] == {}
    bad = verify(produced, text=True)["bad_objects"]
    shards = [fault for key, fault in bad.items() if key.startswith("shards/")]
    assert len(shards) == 2  # both sites of the unit with the fifth document
    assert all("was produced from other text: its token" in fault for fault in shards)
    assert all("of document 5 at position" in fault for fault in shards)
    (manifest,) = (fault for key, fault in bad.items() if key.startswith("units/"))
    assert "excluded ones, but the text has" in manifest


def test_a_row_that_comes_twice_is_told() -> None:
    text = UnitText([Document(3, "abc")], Letters(), context_tokens=3, bos=1)
    origin = (torch.tensor([98, 99]), torch.tensor([1, 2]), torch.tensor([3, 3]))
    rows = SiteRows(torch.zeros(2, 2), *(column.int() for column in origin))
    assert text.rows_fault([rows]) is None
    assert text.rows_fault([rows, rows]) == "contains a row twice"
    assert text.rows_fault([rows._replace(documents=rows.documents - 1)]) == (
        "was produced from other text: its token 98 is not that of document 2 at position 1"
    )


def test_a_unit_without_rows_has_no_fault() -> None:
    """A unit without rows is sound, whether it has an empty block or no block.

    All rows of its document are excluded.
    """
    text = UnitText([Document(0, "a")], Letters(), context_tokens=4, bos=None)
    empty = torch.empty(0, dtype=torch.int32)
    nothing = SiteRows(torch.empty(0, 2), empty, empty, empty)
    for blocks in ([], [nothing]):
        assert text.rows_fault(blocks) is None
