"""Requests that an index cannot serve fail with one line that names what is missing."""

from pathlib import Path

import pytest

from dist_sae.commands.cli import main
from dist_sae.config import Run
from tests.index.indexed import add_checkpoint, make_index, produced


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An indexed run whose tokens are row numbers, so each token occurs once."""
    run = produced(tmp_path_factory.mktemp("whole"))
    add_checkpoint(run)
    make_index(run)
    return run


@pytest.fixture(scope="module")
def without_postings(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = produced(tmp_path_factory.mktemp("none"), index={"postings": "none"})
    add_checkpoint(run)
    make_index(run)
    return run


def refused(capsys: pytest.CaptureFixture[str], run: Run, *words: str) -> str:
    what, *options = words
    code = main(["analyse", what, f"{run.store.runs}/{run.name}", *options])
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    (error,) = (line for line in lines if " INFO " not in line)
    return error


@pytest.mark.parametrize(
    ("what", "options"),
    [("coverage", []), ("manifolds", []), ("sensitivity", ["--ask", "3=re:7"])],
)
def test_an_index_without_postings(
    without_postings: Run, capsys: pytest.CaptureFixture[str], what: str, options: list[str]
) -> None:
    said = refused(capsys, without_postings, what, *options)
    assert "has no postings (index.postings: none); build an index with postings" in said


@pytest.mark.parametrize(
    ("content", "others", "message"),
    [
        (
            "gold\t5\nsilver\n",
            [],
            '"silver" has no count but other words do; give counts for all or none',
        ),
        ("gold\t5\nsilver\t3\n", ["elements"], "elements: has no counts but another list does"),
        ("gold\tmany\n", [], 'line 1: "many" is not a count'),
        ("gold rush\n", [], 'line 1: "gold rush" is not a single word'),
        ("gold\ngold\n", [], 'has "gold" twice'),
        ("# none\n", [], "has no words"),
        ("gold\nsilver\n", [], "none of the 2 words occurs in the"),
        (
            "".join(f"{number}\n" for number in range(100, 130)),
            [],
            "only 0 of the 30 words occur 5 times in each half of the index, but a curve needs "
            "20; give more words",
        ),
    ],
)
def test_lists_that_do_not_serve(
    whole: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str,
    others: list[str],
    message: str,
) -> None:
    (tmp_path / "list.txt").write_text(content)
    said = refused(capsys, whole, "coverage", "--concepts", str(tmp_path / "list.txt"), *others)
    assert message in said


def test_one_width_where_a_law_needs_three(whole: Run, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, whole, "coverage", "--frequency", "1e-6")
    assert "a forecast needs dictionaries of 3 widths, but there is only 1" in said


def test_fewer_rows_than_are_needed(whole: Run, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, whole, "dark-matter", "--rows", "100")
    assert "100 rows to fit to; 16 input dimensions need at least 160 (10 each), better 800" in said
    said = refused(capsys, whole, "sensitivity", "--ask", "3=re:^100")
    assert "judged passages have the concept; estimates need 10 with it and 10 without" in said
    said = refused(capsys, whole, "manifolds", "--rows", "5")
    assert "--rows 5: a group needs at least" in said


def test_a_control_that_is_none(whole: Run, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, whole, "coverage", "--truth", "--control", "nowhere")
    assert "--truth: cannot be used with --control" in said
    said = refused(capsys, whole, "coverage", "--control", "/nowhere/at/all")
    assert "/nowhere/at/all" in said
