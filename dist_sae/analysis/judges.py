"""Judges, which decide whether a passage of text has a concept, and files of labels."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dist_sae.analysis.words import LISTS, read_lists
from dist_sae.errors import ArgumentError

HAS = 2
"""Lowest level at which a passage has the concept. Level 0 is not at all, 1 hardly, 2 clearly, 3
throughout. Judges by pattern give 0 or 3, classifiers the quarter of their label's probability."""
LEVELS = range(4)
LLM = "llm:"
"""Prefix of a judge that asks a language model; see `llm_judge`."""


class Key(NamedTuple):
    """The identity of a passage."""

    document: int
    position: int
    """Position of the passage's first token, a multiple of the length of passages."""


class Label(NamedTuple):
    """A drawn passage's level and chance of being drawn, as in a line of a labels file."""

    level: int | None
    """Level of the passage; None if it has not been judged."""
    chance: float
    """Probability with which the passage was drawn."""
    in_filter: bool


class Judge(NamedTuple):
    """A judge of whether passages have a concept."""

    text: str
    """Name of the judge, as the user gave it."""
    levels: Callable[[Sequence[str]], list[int]]
    """Function that returns the level of each text."""
    labels: Mapping[Key, Label] | None = None
    """Known labels. If given, their passages are the whole sample."""
    caveat: str = ""
    """Sentence on the limits of these labels, printed with the results."""


def open_judge(text: str) -> Judge:
    """Open a judge that a user names.

    Args:
        text: `re:PATTERN`, a regular expression; `words:LIST`, any word of a list (see
            `words.read_lists`); `labels:FILE`, lines that `write_sample` wrote, with labels;
            `model:FOLDER` or `model:FOLDER#LABEL`, a classifier of texts.

    Raises:
        ArgumentError: The judge is not one of these, or its pattern or file cannot be read.
        ModelError: The classifier cannot be loaded, or does not have the label.
    """
    kind, _, rest = text.partition(":")
    if kind == "re" and rest:
        try:
            found = re.compile(rest).search
        except re.error as exc:
            raise ArgumentError(f"{text}: is not a regular expression: {exc}") from exc
    elif kind == "words" and rest:
        found = _any_word([concept.word for concept in read_lists([rest])]).search
    elif kind == "labels" and rest:
        return Judge(text, lambda texts: [0] * len(texts), _read_labels(rest))
    elif kind == "model" and rest:
        from dist_sae.models.classifier import Classifier  # loads transformers

        folder, _, label = rest.partition("#")
        chances = Classifier(folder, label or None).probabilities
        return Judge(text, lambda texts: [quarter(chance) for chance in chances(texts)])
    else:
        raise ArgumentError(
            f"{text}: name a judge as re:PATTERN, words:LIST ({', '.join(LISTS)}, or a file), "
            f"labels:FILE, model:FOLDER#LABEL or llm:DESCRIPTION"
        )
    return Judge(text, lambda texts: [LEVELS[-1] if found(each) else 0 for each in texts])


def quarter(chance: float) -> int:
    """Return the quarter of a probability, from 0 to 3. From .5 a passage has the concept."""
    return min(LEVELS[-1], int(len(LEVELS) * chance))


def write_sample(path: str, drawn: Iterable[tuple[Key, Label, str]]) -> int:
    """Write passages to be judged elsewhere, as lines of JSON, and return their number.

    The lines are in the order of `drawn`. If that is random, labeling may stop at any line.
    """
    n = 0
    with Path(path).open("w") as file:
        for key, label, text in drawn:
            line = {**key._asdict(), "chance": label.chance, "filter": label.in_filter}
            file.write(json.dumps({**line, "label": None, "text": text}) + "\n")
            n += 1
    return n


def _any_word(words: Iterable[str]) -> re.Pattern[str]:
    """Compile a pattern for any of these words. Lowercase words match in any case."""
    parts = [f"(?i:{word})" if word == word.lower() else word for word in words]
    return re.compile(rf"(?<![^\W_])(?:{'|'.join(parts)})(?![^\W_])")


def _read_labels(path: str) -> dict[Key, Label]:
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ArgumentError(f"{path}: cannot be read: {exc}") from exc
    labels: dict[Key, Label] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            key, label = _read_label(line, f"{path}, line {number}")
            if key in labels:
                raise ArgumentError(f"{path}, line {number}: repeats passage {tuple(key)}")
            labels[key] = label
    if not any(label.level is not None for label in labels.values()):
        raise ArgumentError(f"{path}: no line has a label; set label to a level from 0 to 3")
    return labels


def _read_label(line: str, place: str) -> tuple[Key, Label]:
    try:
        content: Any = json.loads(line)
        key = Key(int(content["document"]), int(content["position"]))
        chance, level = float(content.get("chance", 1.0)), content["label"]
        in_filter = bool(content.get("filter", True))
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise ArgumentError(
            f"{place}: is not a JSON object with document, position and label: {exc}"
        ) from exc
    if isinstance(level, bool):
        level = LEVELS[-1] * level
    if level is not None and level not in LEVELS:
        raise ArgumentError(f"{place}: label is {level!r}, not a level from 0 to 3, true or false")
    if not 0 < chance <= 1:
        raise ArgumentError(f"{place}: chance is {chance:g}, not above 0 and at most 1")
    return key, Label(level, chance, in_filter)
