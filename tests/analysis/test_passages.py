"""How passages are cut, drawn, judged and labeled."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_sae.analysis.judges import Judge, Key, open_judge, write_sample
from dist_sae.analysis.passages import Sampling, draw_passages, judge_passages
from dist_sae.analysis.words import TokenTexts
from dist_sae.commands.cli import main
from dist_sae.config import Run
from dist_sae.errors import ArgumentError
from tests.analysis.in_memory import InMemoryIndex, Vocabulary
from tests.index.indexed import add_checkpoint, make_index, produced

TEXTS = [" the", " gold", "en", " Gold", "."]


def tokens() -> TokenTexts:
    return TokenTexts(Vocabulary(TEXTS), [])


def index_of(rows: list[int], latents: dict[int, tuple[list[int], list[float]]]) -> InMemoryIndex:
    codes = {
        latent: (np.array(at), np.array(acts, np.float32)) for latent, (at, acts) in latents.items()
    }
    return InMemoryIndex(np.array(rows, np.int32), 6, codes, 2)


def test_a_passage_is_a_piece_of_a_document_with_its_largest_activation() -> None:
    # two documents of six tokens, passages of four: "the gold en the", ". .", "the the the Gold"...
    rows = [0, 1, 2, 0, 4, 4, 0, 0, 0, 3, 0, 4]
    index = index_of(rows, {0: ([0, 1, 5, 9], [1, 3, 7, 2]), 1: ([11], [5])})
    gold = open_judge("re:(?i) gold(?!en)")
    golden = open_judge("re:golden")
    found = judge_passages(index, tokens(), [(0, gold), (1, golden)], Sampling(4))
    assert [each.document.tolist() for each in found] == [[0, 0, 1, 1]] * 2
    assert [each.act.tolist() for each in found] == [[3, 7, 2, 0], [0, 0, 0, 5]]
    assert [each.level.tolist() for each in found] == [[0, 0, 3, 0], [3, 0, 0, 0]]
    assert found[0].weight.tolist() == [1] * 4


def test_all_that_the_filter_passes_is_kept_and_a_share_of_the_rest() -> None:
    rows = np.random.default_rng(0).integers(0, 5, 30_000).tolist()
    index = index_of(rows, {})
    gold = open_judge("re: gold")
    sampling = Sampling(1, gold, 0.25)
    (found,) = judge_passages(index, tokens(), [(0, open_judge("re:[gG]old"))], sampling)
    assert found.in_filter.sum() == rows.count(1)
    assert set(found.weight[found.in_filter].tolist()) == {1}
    assert set(found.weight[~found.in_filter].tolist()) == {4}
    assert found.weight.sum() == pytest.approx(30_000, rel=0.03)  # the total number of passages
    assert found.weight[found.level == 3].sum() == pytest.approx(
        rows.count(1) + rows.count(3), rel=0.05
    )


def test_other_latents_are_measured_on_the_same_passages_with_their_weights() -> None:
    """Other latents' F1 matches a calculation from all their activations on the same passages."""
    generator = np.random.default_rng(1)
    rows = generator.integers(0, 5, 3000).tolist()
    codes = {latent: (np.flatnonzero(generator.random(3000) < 0.3), None) for latent in range(2)}
    made = {
        latent: (at.tolist(), generator.uniform(0, 4, len(at)).tolist())
        for latent, (at, _) in codes.items()
    }
    index = index_of(rows, made)
    sampling = Sampling(1, open_judge("re: gold"), 0.5)
    judge = open_judge("re:[gG]old")
    (one,) = judge_passages(index, tokens(), [(0, judge)], sampling, [1, 0])
    (other,) = judge_passages(index, tokens(), [(1, judge)], sampling)
    assert len(other.peers) == 0
    expected = []
    for found, latent in ((other, 1), (one, 0)):
        concept = found.weight * (found.level == 3)
        best = 0.0
        for share in (0, 0.1, 0.5):
            fires = found.act > share * np.float32(max(made[latent][1]))
            both = concept @ fires
            best = max(best, 2 * both / (concept.sum() + found.weight @ fires))
        expected.append(best)
    assert one.peers.tolist() == pytest.approx(expected)


def drawn(tmp_path: Path, index: InMemoryIndex, sampling: Sampling) -> list[dict[str, Any]]:
    write_sample(str(tmp_path / "sample"), draw_passages(index, tokens(), sampling))
    return [json.loads(line) for line in (tmp_path / "sample").read_text().splitlines()]


def labelled(path: Path, lines: list[dict[str, Any]]) -> Judge:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return open_judge(f"labels:{path}")


def test_a_drawn_sample_comes_back_with_labels(tmp_path: Path) -> None:
    """A labeled sample keeps the total weight even if only half of its lines have labels.

    Then each labeled line counts twice.
    """
    rows = np.random.default_rng(0).integers(0, 5, 6000).tolist()
    index = index_of(rows, {0: ([0], [1.0])})
    sampling = Sampling(2, open_judge("re: gold"), 0.5)
    lines = drawn(tmp_path, index, sampling)
    (whole,) = judge_passages(index, tokens(), [(0, open_judge("re:Gold"))], sampling)
    assert len(lines) == len(whole.level)
    half = lines[: len(lines) // 2]
    for line in half:
        line["label"] = 3 * ("Gold" in line["text"])
    judge = labelled(tmp_path / "labels", lines)
    (found,) = judge_passages(index, tokens(), [(0, judge)], Sampling(2))
    assert len(found.level) == len(half)
    assert found.weight.sum() == pytest.approx(whole.weight.sum())
    of_half = sum(line["label"] == 3 for line in half)
    assert (found.level == 3).sum() == of_half
    assert [line["document"] for line in lines] != sorted(line["document"] for line in lines)


def test_labels_of_other_passages_are_refused(tmp_path: Path) -> None:
    index = index_of([0, 1] * 6, {0: ([0], [1.0])})
    lines = drawn(tmp_path, index, Sampling(2))
    for line in lines:
        line["label"] = True
    judge = labelled(tmp_path / "labels", lines)
    with pytest.raises(ArgumentError, match=r"4 of 6 labeled passages are not in the index"):
        judge_passages(index, tokens(), [(0, judge)], Sampling(6))
    lines[0] |= {"filter": False, "label": None}
    judge = labelled(tmp_path / "labels", lines)
    with pytest.raises(ArgumentError, match="none of the 1 passages outside the filter has a"):
        judge_passages(index, tokens(), [(0, judge)], Sampling(2))


def test_judges_by_words_find_whole_words_in_their_case(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("gold\nParis\n")
    judge = open_judge(f"words:{tmp_path / 'words.txt'}")
    texts = ["of gold.", "GOLD", "Paris'", "paris", "golden", "marigold", "gold2", "_gold_"]
    assert judge.levels(texts) == [3, 3, 3, 0, 0, 0, 0, 3]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: is not a JSON object with document, position and label"),
        ('{"document": 1, "label": 1}', "is not a JSON object with document, position and label"),
        ('{"document": 1, "position": 0, "label": 4}', "label is 4, not a level"),
        ('{"document": 1, "position": 0, "label": "yes"}', "label is 'yes', not a level"),
        ('{"document": 1, "position": 0, "label": 1, "chance": 0}', "chance is 0, not above"),
        ('{"document": 1, "position": 0, "label": null}', "no line has a label"),
        (2 * '{"document": 1, "position": 0, "label": 1}\n', r"line 2: repeats passage \(1, 0\)"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "labels").write_text(line)
    with pytest.raises(ArgumentError, match=message):
        open_judge(f"labels:{tmp_path / 'labels'}")
    assert Key(1, 0) == (1, 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = produced(tmp_path_factory.mktemp("run"))
    add_checkpoint(made)
    make_index(made)
    return made


def asked(capsys: pytest.CaptureFixture[str], run: Run, *words: str) -> tuple[int, str, str]:
    code = main(["analyse", "sensitivity", f"{run.store.runs}/{run.name}", *words])
    return code, *capsys.readouterr()


@pytest.mark.system
def test_the_command_asks_and_draws(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`analyse sensitivity` judges passages and draws samples from the command line.

    This world's tokens are row numbers, so no latent knows a concept.
    """
    code, out, _ = asked(capsys, run, "--ask", "3=re:7 ", "--passage", "1", "--json")
    assert code == 0
    (numbers,) = json.loads(out)["asked"]
    # about a tenth of the numbers end with 7
    assert numbers["with_concept"] == pytest.approx(numbers["passages"] / 10, rel=0.1)
    assert numbers["tells"] is False
    sample = ["--draw", str(tmp_path / "s"), "--filter", "re:7 ", "--share", ".1"]
    code, out, _ = asked(capsys, run, *sample)
    assert code == 0
    assert f"{len((tmp_path / 's').read_text().splitlines()):,} passages" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--ask: name a latent and a judge"),
        (["--ask", "gold"], "--ask gold: is not LATENT=JUDGE"),
        (["--ask", "3=gold"], "gold: name a judge as re:PATTERN, words:LIST"),
        (["--ask", "3=re:("], "is not a regular expression"),
        (["--ask", "3=labels:nowhere"], "nowhere: cannot be read"),
        (["--ask", "64=re:7"], "latent 64: "),
        (["--ask", "3=re:x"], "re:x: 0 of "),
        (["--ask", "3=re:7", "--passage", "0"], "--passage 0: must be at least 1"),
        (["--ask", "3=re:7", "--filter", "re:7"], "--filter and --share must be used together"),
        (["--ask", "3=re:7", "--filter", "re:7", "--share", "0"], "--share 0: must be above 0"),
    ],
)
def test_what_cannot_be_answered_is_one_line(
    run: Run, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    code, _, errors = asked(capsys, run, *words)
    assert code == 2
    assert message in errors
    assert len(errors.strip().splitlines()) == 1


def test_an_index_with_a_part_of_the_postings_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = produced(tmp_path, index={"postings": 0.5})
    add_checkpoint(run)
    make_index(run)
    code, _, errors = asked(capsys, run, "--ask", "3=re:7")
    assert code == 2
    assert "has only a share of the postings (index.postings), and sensitivity would" in errors
