"""Prompts for the explainer and the judge, and parsing of their answers.

Marked tokens with strengths from 0 to 10 are from "Language models can explain neurons in language
models" (Bills et al. 2023). Showing several unmarked passages and asking on which of them a latent
fires is the detection score of "Automatically interpreting millions of features in large language
models" (Paulo et al. 2024). The wording is ours.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from dist_sae.endpoint.answers import Message
from dist_sae.explaining.passages import Passage

VERSION = 1
"""Version of the prompts. Increment it with every change of their wording, so that answers to
different prompts are not compared."""
MARKED = 0.3
"""Least activation of a marked token, as a share of the passage's largest activation."""
_STRENGTHS = 10
_MOST_STRENGTHS = 8  # most tokens per passage whose strengths are listed
_LIST = re.compile(r"\[[^\[\]]*\]")
_ANSWER = "EXPLANATION:"
_AROUND = "*\"' \n"  # characters that are stripped from both ends of an explanation

_EXPLAIN = f"""\
One unit inside a language model is active on some tokens of text. You get passages of text on \
which it is active. Tokens on which it is active are between << and >>, and after each passage its \
strongest tokens are listed, with strengths from 1 to {_STRENGTHS}. Passages with large strengths \
come first.

Find out what the tokens, or the text before them, have in common, and say it in one short phrase. \
Be specific: someone who reads the phrase will have to tell on which of many other passages the \
unit is active. Say it of the text, and do not mention the marks, the strengths or the unit. \
If only some passages fit a pattern, name what the strongest share.

You may think first. End with one line that begins with {_ANSWER}"""

_JUDGE = """\
One unit inside a language model is active on some tokens of text. This describes what it is \
active on:

{explanation}

You get {n} numbered passages. For each tell whether some token of it fits the description. Any \
number of them may, none and all included.

Answer with a JSON list of {n} numbers and nothing else, in the order of the passages: 1 if the \
passage fits, else 0."""


def explain_messages(shown: Sequence[Passage]) -> tuple[Message, ...]:
    """Build the messages for the explainer."""
    most = max(act for passage in shown for act in passage.acts)
    parts = [f"Passage {n}: {_marked(passage, most)}" for n, passage in enumerate(shown, 1)]
    return Message("system", _EXPLAIN), Message("user", "\n\n".join(parts))


def judge_messages(explanation: str, passages: Sequence[Passage]) -> tuple[Message, ...]:
    """Build the messages for the judge."""
    asked = _JUDGE.format(explanation=explanation, n=len(passages))
    parts = [f"Passage {n}: {_one_line(each.text)}" for n, each in enumerate(passages, 1)]
    return Message("system", asked), Message("user", "\n\n".join(parts))


def read_explanation(answer: str, *, is_whole: bool = True) -> str | None:
    """Parse the explanation in an answer. Return None if there is none.

    Small models forget `EXPLANATION:`, so a single line without it is accepted. They also continue
    after the explanation, so only its first paragraph counts.

    Args:
        answer: Text of the answer.
        is_whole: False if the answer was truncated. Then its last line is ignored.
    """
    if not is_whole:
        answer = answer.rpartition("\n")[0]
    _, found, after = answer.rpartition(_ANSWER)
    text = (after if found else answer).strip(_AROUND)
    if not found and ("\n" in text or not is_whole):
        return None
    return " ".join(text.partition("\n\n")[0].split()).strip(_AROUND) or None


def read_verdicts(answer: str, n: int) -> list[bool] | None:
    """Parse the verdicts on `n` passages. Return None if there is no list of n zeros and ones."""
    for found in reversed(_LIST.findall(answer)):
        try:
            values: list[Any] = json.loads(found)
        except ValueError:
            continue
        if len(values) == n and all(value in (0, 1) for value in values):
            return [bool(value) for value in values]
    return None


def _marked(passage: Passage, most: float) -> str:
    """Format a passage with marks and strengths."""
    text, listed = "", list[tuple[float, str]]()
    least = MARKED * max(passage.acts)
    was_marked = False
    for token, act in zip(passage.tokens, passage.acts, strict=True):
        is_marked = act > 0 and act >= least
        if is_marked != was_marked:
            text += "<<" if is_marked else ">>"
        text += token
        was_marked = is_marked
        if is_marked:
            listed.append((act, token))
    text += ">>" if was_marked else ""
    listed = sorted(listed, key=lambda each: -each[0])[:_MOST_STRENGTHS]
    strengths = (
        f'"{_one_line(token).strip()}" {max(1, round(_STRENGTHS * act / most))}'
        for act, token in listed
    )
    return f"{_one_line(text)}\nStrengths: {', '.join(strengths)}"


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())
