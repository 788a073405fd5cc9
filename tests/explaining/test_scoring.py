"""Scores computed by hand, and the parsing of answers."""

import pytest

from dist_sae.explaining.passages import Passage
from dist_sae.explaining.prompts import (
    explain_messages,
    judge_messages,
    read_explanation,
    read_verdicts,
)
from dist_sae.explaining.scoring import Kind, Verdict, VerdictCounts, score


def judged(kind: Kind, answers: str, decile: int | None = None) -> list[Verdict]:
    said = {"y": True, "n": False, "?": None}
    return [Verdict(kind, decile, said[answer]) for answer in answers]


def test_scores_are_those_worked_by_hand() -> None:
    """The judge says yes to 10 of 20 active passages, 0 of 20 silent ones and 5 of 10 near misses.

    Wilson's 95 % interval (z = 1.96) is .2993 to .7007 for 10/20, and .8389 to 1 for 20/20. So the
    balanced accuracy is .75, from .75 - sqrt(.2007^2 + .1611^2) / 2 to .75 + sqrt(.2007^2 + 0) / 2.
    F1 = 2 * 10 / (2 * 10 + 0 + 10).
    """
    told = score(
        [
            *judged("active", 10 * "n", 0),
            *judged("active", 10 * "y", 9),
            *judged("random", 20 * "n"),
            *judged("near", "nnnnnyyyyy"),
        ]
    )
    assert (told.active, told.random, told.near) == (
        VerdictCounts(10, 20),
        VerdictCounts(0, 20),
        VerdictCounts(5, 10),
    )
    assert told.deciles[0] == VerdictCounts(0, 10)
    assert told.deciles[9] == VerdictCounts(10, 10)
    assert told.deciles[5] == VerdictCounts(0, 0)
    assert told.balanced_accuracy == 0.75
    assert told.low == pytest.approx(0.6213, abs=1e-4)
    assert told.high == pytest.approx(0.8503, abs=1e-4)
    assert told.f1 == pytest.approx(2 / 3)
    assert told.near_specificity == 0.5


def test_passages_without_an_answer_are_counted_apart() -> None:
    told = score([*judged("active", "yy?"), *judged("random", "n???")])
    assert (told.active, told.random, told.unanswered) == (
        VerdictCounts(2, 2),
        VerdictCounts(0, 1),
        4,
    )
    assert told.balanced_accuracy == 1
    assert told.near_specificity is None
    told = score(judged("active", "yy"))  # a latent that is active everywhere
    assert (told.balanced_accuracy, told.low, told.f1) == (None, None, None)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("[1, 0, 1]", [True, False, True]),
        ("Passage 1 [fits]. ```json\n[1,0,true]\n```", [True, False, True]),
        ("[1, 0]", None),
        ("[1, 0, 2]", None),
        ("[1, 0, 0.5]", None),
        ('[1, 0, "1"]', None),
        ("1 0 1", None),
        ("", None),
    ],
)
def test_verdicts_are_a_list_of_so_many(answer: str, found: list[bool] | None) -> None:
    assert read_verdicts(answer, 3) == found


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("Maybe.\nEXPLANATION: rivers\nof Africa\n", "rivers of Africa"),
        ("EXPLANATION: one\n**EXPLANATION: two**", "two"),
        ("rivers", "rivers"),
        ("I am not sure.\nIt may be rivers.", None),
        ("**EXPLANATION:**\n\nrivers", "rivers"),
        ("EXPLANATION: rivers\n\nPassage 21: The Nile", "rivers"),
        ("EXPLANATION:", None),
        ("", None),
    ],
)
def test_an_explanation_is_the_paragraph_after_the_word(answer: str, found: str | None) -> None:
    assert read_explanation(answer) == found


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("The passages are about rivers and", None),
        ("Maybe.\nEXPLANATION: rivers of", None),
        ("Maybe.\nEXPLANATION: rivers\n\nPassage 21: The", "rivers"),
    ],
)
def test_the_last_line_of_a_cut_answer_is_no_explanation(answer: str, found: str | None) -> None:
    assert read_explanation(answer, is_whole=False) == found


def test_marks_and_strengths_are_for_the_explainer_alone() -> None:
    """Tokens with at least 0.3 of the passage's largest activation are marked.

    Adjacent marked tokens share one mark.
    """
    passage = Passage(
        0, 0, 3, "active", ["The", " Nile", " River", "\nis", " long"], [0, 2, 4, 1, 1.25]
    )
    quiet = Passage(1, 0, 9, "active", ["a", " creek"], [0.0, 0.5])
    _, user = explain_messages([passage, quiet])
    assert user.content == (
        "Passage 1: The<< Nile River>> is<< long>>\n"
        'Strengths: "River" 10, "Nile" 5, "long" 3\n\n'
        "Passage 2: a<< creek>>\n"
        'Strengths: "creek" 1'
    )
    system, user = judge_messages("rivers", [passage, quiet])
    assert "rivers" in system.content
    assert "list of 2 numbers" in system.content
    assert user.content == "Passage 1: The Nile River is long\n\nPassage 2: a creek"
