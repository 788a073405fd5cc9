"""The explanations of a latent as pages show them, each with its score."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from dist_sae.explaining.scoring import Said, Score, score
from dist_sae.explaining.stored import ExplanationSet, sets
from dist_sae.index.query import Index


class Told(NamedTuple):
    """An explanation of a latent, with its score."""

    name: str
    """Name of the set of explanations."""
    explanation: str
    score: Score

    @property
    def judged(self) -> str:
        """The score in words; empty if nothing was judged."""
        told = self.score
        parts = []
        if told.balanced_accuracy is not None:
            parts.append(
                f"detection {told.balanced_accuracy:.2f} ({told.low:.2f} to {told.high:.2f})"
            )
        parts += [
            f"yes on {said.yes} of {said.of} {what}"
            for said, what in (
                (told.active, "active"),
                (told.random, "silent"),
                (told.near, "near misses"),
            )
            if said.of
        ]
        if told.unanswered:
            parts.append(f"{told.unanswered} without an answer")
        return ", ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """Convert to JSON types."""
        numbers = {
            name: value._asdict() if isinstance(value, Said) else value
            for name, value in self.score._asdict().items()
            if name != "deciles"
        }
        deciles = [said._asdict() for said in self.score.deciles]
        return {"set": self.name, "explanation": self.explanation, **numbers, "deciles": deciles}


def told_of(latent: int, among: Iterable[ExplanationSet]) -> list[Told]:
    """Read the explanations of a latent from some sets.

    Raises:
        CorruptObjectError: An explanation is damaged.
    """
    found = ((each.name, each.get(latent)) for each in among)
    return [
        Told(name, there.explanation, score(there.judged))
        for name, there in found
        if there is not None and there.explanation is not None
    ]


def told_of_all(latents: Iterable[int], index: Index) -> list[list[Told]]:
    """Read the explanations of latents from all sets of an index.

    Raises:
        CorruptObjectError: An explanation is damaged.
    """
    there = sets(index)
    return [told_of(latent, there) for latent in latents]
