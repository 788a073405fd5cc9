"""The explanations of a latent as pages show them, each with its score."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from dist_sae.explaining.scoring import Score, VerdictCounts, score
from dist_sae.explaining.stored import ExplanationSet, sets
from dist_sae.index.query import Index


class ScoredExplanation(NamedTuple):
    """An explanation of a latent, with its score."""

    name: str
    """Name of the set of explanations."""
    explanation: str
    score: Score

    @property
    def score_text(self) -> str:
        """The score in words; empty if nothing was judged."""
        score = self.score
        parts = []
        if score.balanced_accuracy is not None:
            parts.append(
                f"detection {score.balanced_accuracy:.2f} ({score.low:.2f} to {score.high:.2f})"
            )
        parts += [
            f"yes on {counts.yes} of {counts.of} {what}"
            for counts, what in (
                (score.active, "active"),
                (score.random, "silent"),
                (score.near, "near misses"),
            )
            if counts.of
        ]
        if score.unanswered:
            parts.append(f"{score.unanswered} without an answer")
        return ", ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """Convert to JSON types."""
        numbers = {
            name: value._asdict() if isinstance(value, VerdictCounts) else value
            for name, value in self.score._asdict().items()
            if name != "deciles"
        }
        deciles = [counts._asdict() for counts in self.score.deciles]
        return {"set": self.name, "explanation": self.explanation, **numbers, "deciles": deciles}


def explanations_of(latent: int, among: Iterable[ExplanationSet]) -> list[ScoredExplanation]:
    """Read the explanations of a latent from some sets.

    Raises:
        CorruptObjectError: An explanation is damaged.
    """
    found = ((each.name, each.get(latent)) for each in among)
    return [
        ScoredExplanation(name, there.explanation, score(there.judged))
        for name, there in found
        if there is not None and there.explanation is not None
    ]


def explanations_of_all(latents: Iterable[int], index: Index) -> list[list[ScoredExplanation]]:
    """Read the explanations of latents from all sets of an index.

    Raises:
        CorruptObjectError: An explanation is damaged.
    """
    there = sets(index)
    return [explanations_of(latent, there) for latent in latents]
