"""Explaining latents and judging the explanations with language models behind endpoints.

Answers are stored (`endpoint/answers.py`), and the seed decides the passages. So if the program is
stopped, the same command sends only the questions that are left.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dist_sae.endpoint.answers import Answer, Endpoint, Question
from dist_sae.explaining.passages import Drawer, Drawn, Passage, Wanted
from dist_sae.explaining.prompts import (
    VERSION,
    explain_messages,
    judge_messages,
    read_explanation,
    read_verdicts,
)
from dist_sae.explaining.scoring import Judged, score
from dist_sae.explaining.stored import Explained, ExplanationSet, Made
from dist_sae.index.query import Index

logger = logging.getLogger(__name__)

LEAST_ACTIVE = 10
"""Fewest active passages with which a latent is explained."""
LATENTS = 64
"""Number of latents that are explained, judged and stored at a time."""
_SHOWN = 100  # characters shown of an answer that cannot be parsed
_GUESS = "g" * 120  # stands for an explanation that does not exist yet, in an estimate of tokens
_TOO_RARE = f"active in fewer than {LEAST_ACTIVE} passages"
_UNREADABLE = "the answer has no explanation"


class Plan(NamedTuple):
    """The settings for explaining and judging latents."""

    wanted: Wanted = Wanted()
    at_once: int = 10
    """Number of passages that are judged per request."""
    most_tokens: int = 500
    """Longest answer in tokens, including any reasoning that the endpoint counts."""
    seed: int = 0

    def made(self, index: Index, explainer: str, judge: str) -> Made:
        """Return the settings of a set of explanations for this index and these models."""
        return Made(
            explainer=explainer,
            judge=judge,
            checkpoint=index.manifest.checkpoint,
            prompts=VERSION,
            settings={**self.wanted._asdict(), "at_once": self.at_once},
            seed=self.seed,
        )


class Outcome(NamedTuple):
    """Counts of what was explained and judged."""

    latents: int
    explained: int
    too_rare: int
    """Number of latents that are active in too few passages."""
    unreadable: int
    """Number of latents whose explanation could not be parsed."""
    judged_passages: int
    """Number of passages that were sent to the judge."""
    unanswered_passages: int
    """Number of these passages for which the judge's answer could not be parsed."""
    mean_balanced_accuracy: float | None


class _Latent(NamedTuple):
    """A latent that is being explained."""

    latent: int
    drawn: Drawn
    explanation: str | None = None


def count(
    drawer: Drawer, plan: Plan, latents: Sequence[int], explainer: Endpoint
) -> tuple[list[Question], list[Question]]:
    """Return the questions to the explainer and to the judge, for an estimate.

    If a latent has no stored explanation yet, the questions to the judge contain a placeholder of
    typical length.
    """
    working = list(_drawn(drawer, latents))
    asked = [_explaining(each, plan) for each in working]
    judging: list[Question] = []
    for each, answer in zip(working, explainer.kept(asked), strict=True):
        explanation = (
            _GUESS if answer is None else read_explanation(answer.text, is_whole=answer.is_whole)
        )
        if explanation is not None:
            questions = _judging(each._replace(explanation=explanation), plan)
            judging += [question for question, _ in questions]
    return asked, judging


def explain(
    drawer: Drawer,
    plan: Plan,
    latents: Sequence[int],
    explainer: Endpoint,
    judge: Endpoint,
    found: ExplanationSet,
    made: Made,
) -> Outcome:
    """Explain latents, judge the explanations, and store both.

    Args:
        drawer: Draws the passages.
        plan: The settings for explaining and judging.
        latents: Numbers of the latents.
        explainer: Endpoint of the model that explains.
        judge: Endpoint of the model that judges.
        found: The set that the explanations are added to.
        made: The settings of the set.

    Raises:
        ConfigError: The set exists, and has other settings.
        EndpointUnavailableError: An endpoint is unavailable. The same command continues later.
        EndpointError: An endpoint refuses a request.
    """
    found.check(made)
    stored: list[Explained] = []
    unread = list[Answer](), list[Answer]()
    for first in range(0, len(latents), LATENTS):
        some = latents[first : first + LATENTS]
        working = {each.latent: each for each in _drawn(drawer, some)}
        answers = explainer.ask([_explaining(e, plan) for e in working.values()], "explain")
        for each, answer in zip(list(working.values()), answers, strict=True):
            explanation = read_explanation(answer.text, is_whole=answer.is_whole)
            working[each.latent] = each._replace(explanation=explanation)
            unread[0].extend([] if explanation else [answer])
        told = [each for each in working.values() if each.explanation is not None]
        batches = [(each.latent, *asked) for each in told for asked in _judging(each, plan)]
        verdicts = judge.ask([question for _, question, _ in batches], "judge")
        judged: dict[int, list[Judged]] = {each.latent: [] for each in told}
        for (latent, _, passages), answer in zip(batches, verdicts, strict=True):
            read = list(_judged(passages, answer))
            judged[latent] += read
            unread[1].extend([answer] if read[0].yes is None else [])
        new = [_explained(latent, working.get(latent), judged.get(latent, ())) for latent in some]
        found.add(made, new)
        stored += new
    _warn(f"{explainer.model}: no explanation", unread[0])
    _warn(f"{judge.model}: no list of verdicts", unread[1])
    return outcome(stored)


def _warn(of_what: str, unread: Sequence[Answer]) -> None:
    if unread:
        logger.warning(
            "%s in %d answers, %d of them truncated at --most-tokens; the first starts with %r",
            of_what,
            len(unread),
            sum(not answer.is_whole for answer in unread),
            unread[0].text[:_SHOWN],
        )


def _drawn(drawer: Drawer, latents: Sequence[int]) -> Iterator[_Latent]:
    """Draw passages, and yield the latents that are active in at least `LEAST_ACTIVE`."""
    for latent in latents:
        drawn = drawer.draw(latent)
        if drawn.active >= LEAST_ACTIVE:
            yield _Latent(latent, drawn)


def _explaining(each: _Latent, plan: Plan) -> Question:
    return Question(explain_messages(each.drawn.shown), plan.most_tokens)


def _judging(each: _Latent, plan: Plan) -> Iterator[tuple[Question, list[Passage]]]:
    """Yield each question to the judge, with the passages that it is about."""
    assert each.explanation is not None
    for first in range(0, len(each.drawn.judged), plan.at_once):
        passages = each.drawn.judged[first : first + plan.at_once]
        messages = judge_messages(each.explanation, passages)
        yield Question(messages, plan.most_tokens), passages


def _judged(passages: Sequence[Passage], answer: Answer) -> Iterator[Judged]:
    verdicts = read_verdicts(answer.text, len(passages))
    for passage, yes in zip(passages, verdicts or len(passages) * (None,), strict=True):
        yield Judged(passage.kind, passage.decile, yes, passage.document, passage.position)


def _explained(latent: int, each: _Latent | None, judged: Sequence[Judged]) -> Explained:
    if each is None:
        return Explained(latent, None, _TOO_RARE, ())
    if each.explanation is None:
        return Explained(latent, None, _UNREADABLE, ())
    return Explained(latent, each.explanation, "", judged)


def outcome(stored: Sequence[Explained]) -> Outcome:
    """Count what was explained and judged."""
    scores = [score(each.judged) for each in stored if each.explanation is not None]
    known = [told.balanced_accuracy for told in scores if told.balanced_accuracy is not None]
    return Outcome(
        latents=len(stored),
        explained=len(scores),
        too_rare=sum(each.why_none == _TOO_RARE for each in stored),
        unreadable=sum(each.why_none == _UNREADABLE for each in stored),
        judged_passages=sum(len(each.judged) for each in stored),
        unanswered_passages=sum(told.unanswered for told in scores),
        mean_balanced_accuracy=float(np.mean(known)) if known else None,
    )
