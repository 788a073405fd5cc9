"""Explaining latents and judging the explanations with language models behind endpoints.

Answers are stored (`endpoint/answers.py`), and the seed decides the passages. So if the program is
stopped, the same command sends only the questions that are left.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dist_sae.endpoint.answers import Answer, Endpoint, Question
from dist_sae.explaining.passages import Passage, PassageSampler, PassageSettings, SampledPassages
from dist_sae.explaining.prompts import (
    VERSION,
    explain_messages,
    judge_messages,
    read_explanation,
    read_verdicts,
)
from dist_sae.explaining.scoring import Verdict, score
from dist_sae.explaining.stored import ExplanationSet, LatentExplanation, SetSettings
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


class ExplainPlan(NamedTuple):
    """The settings for explaining and judging latents."""

    passages: PassageSettings = PassageSettings()
    at_once: int = 10
    """Number of passages that are judged per request."""
    most_tokens: int = 500
    """Longest answer in tokens, including any reasoning that the endpoint counts."""
    seed: int = 0

    def settings_for(self, index: Index, explainer: str, judge: str) -> SetSettings:
        """Return the settings of a set of explanations for this index and these models."""
        return SetSettings(
            explainer=explainer,
            judge=judge,
            checkpoint=index.manifest.checkpoint,
            prompts=VERSION,
            settings={**self.passages._asdict(), "at_once": self.at_once},
            seed=self.seed,
        )


class ExplainSummary(NamedTuple):
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
    sampled: SampledPassages
    explanation: str | None = None


def list_questions(
    sampler: PassageSampler, plan: ExplainPlan, latents: Sequence[int], explainer: Endpoint
) -> tuple[list[Question], list[Question]]:
    """Return the questions to the explainer and to the judge, for an estimate.

    If a latent has no stored explanation yet, the questions to the judge contain a placeholder of
    typical length.
    """
    working = list(_sampled(sampler, latents))
    asked = [_explain_question(each, plan) for each in working]
    judging: list[Question] = []
    for each, answer in zip(working, explainer.cached(asked), strict=True):
        explanation = (
            _GUESS if answer is None else read_explanation(answer.text, is_whole=answer.is_whole)
        )
        if explanation is not None:
            questions = _judge_questions(each._replace(explanation=explanation), plan)
            judging += [question for question, _ in questions]
    return asked, judging


def explain(
    sampler: PassageSampler,
    plan: ExplainPlan,
    latents: Sequence[int],
    explainer: Endpoint,
    judge: Endpoint,
    found: ExplanationSet,
    settings: SetSettings,
) -> ExplainSummary:
    """Explain latents, judge the explanations, and store both.

    Args:
        sampler: Draws the passages.
        plan: The settings for explaining and judging.
        latents: Numbers of the latents.
        explainer: Endpoint of the model that explains.
        judge: Endpoint of the model that judges.
        found: The set that the explanations are added to.
        settings: The settings of the set.

    Raises:
        ConfigError: The set exists, and has other settings.
        EndpointUnavailableError: An endpoint is unavailable. The same command continues later.
        EndpointError: An endpoint refuses a request.
    """
    found.check(settings)
    stored: list[LatentExplanation] = []
    unread = list[Answer](), list[Answer]()
    for first in range(0, len(latents), LATENTS):
        some = latents[first : first + LATENTS]
        working = {each.latent: each for each in _sampled(sampler, some)}
        answers = explainer.ask([_explain_question(e, plan) for e in working.values()], "explain")
        for each, answer in zip(list(working.values()), answers, strict=True):
            explanation = read_explanation(answer.text, is_whole=answer.is_whole)
            working[each.latent] = each._replace(explanation=explanation)
            unread[0].extend([] if explanation else [answer])
        explained = [each for each in working.values() if each.explanation is not None]
        batches = [
            (each.latent, *asked) for each in explained for asked in _judge_questions(each, plan)
        ]
        replies = judge.ask([question for _, question, _ in batches], "judge")
        judged: dict[int, list[Verdict]] = {each.latent: [] for each in explained}
        for (latent, _, passages), answer in zip(batches, replies, strict=True):
            read = list(_verdicts(passages, answer))
            judged[latent] += read
            unread[1].extend([answer] if read[0].yes is None else [])
        new = [_explained(latent, working.get(latent), judged.get(latent, ())) for latent in some]
        found.add(settings, new)
        stored += new
    _warn(f"{explainer.model}: no explanation", unread[0])
    _warn(f"{judge.model}: no list of verdicts", unread[1])
    return summarize(stored)


def _warn(of_what: str, unread: Sequence[Answer]) -> None:
    if unread:
        logger.warning(
            "%s in %d answers, %d of them truncated at --most-tokens; the first starts with %r",
            of_what,
            len(unread),
            sum(not answer.is_whole for answer in unread),
            unread[0].text[:_SHOWN],
        )


def _sampled(sampler: PassageSampler, latents: Sequence[int]) -> Iterator[_Latent]:
    """Draw passages, and yield the latents that are active in at least `LEAST_ACTIVE`."""
    for latent in latents:
        sampled = sampler.sample(latent)
        if sampled.active >= LEAST_ACTIVE:
            yield _Latent(latent, sampled)


def _explain_question(each: _Latent, plan: ExplainPlan) -> Question:
    return Question(explain_messages(each.sampled.shown), plan.most_tokens)


def _judge_questions(each: _Latent, plan: ExplainPlan) -> Iterator[tuple[Question, list[Passage]]]:
    """Yield each question to the judge, with the passages that it is about."""
    assert each.explanation is not None
    for first in range(0, len(each.sampled.judged), plan.at_once):
        passages = each.sampled.judged[first : first + plan.at_once]
        messages = judge_messages(each.explanation, passages)
        yield Question(messages, plan.most_tokens), passages


def _verdicts(passages: Sequence[Passage], answer: Answer) -> Iterator[Verdict]:
    verdicts = read_verdicts(answer.text, len(passages))
    for passage, yes in zip(passages, verdicts or len(passages) * (None,), strict=True):
        yield Verdict(passage.kind, passage.decile, yes, passage.document, passage.position)


def _explained(latent: int, each: _Latent | None, judged: Sequence[Verdict]) -> LatentExplanation:
    if each is None:
        return LatentExplanation(latent, None, _TOO_RARE, ())
    if each.explanation is None:
        return LatentExplanation(latent, None, _UNREADABLE, ())
    return LatentExplanation(latent, each.explanation, "", judged)


def summarize(stored: Sequence[LatentExplanation]) -> ExplainSummary:
    """Count what was explained and judged."""
    scores = [score(each.judged) for each in stored if each.explanation is not None]
    known = [each.balanced_accuracy for each in scores if each.balanced_accuracy is not None]
    return ExplainSummary(
        latents=len(stored),
        explained=len(scores),
        too_rare=sum(each.why_none == _TOO_RARE for each in stored),
        unreadable=sum(each.why_none == _UNREADABLE for each in stored),
        judged_passages=sum(len(each.judged) for each in stored),
        unanswered_passages=sum(each.unanswered for each in scores),
        mean_balanced_accuracy=float(np.mean(known)) if known else None,
    )
