"""Scores of how well an explanation predicts on which passages its latent fires.

    recall             share of the active passages on which the judge says yes
    specificity        share of the random silent passages on which it says no
    balanced accuracy  (recall + specificity) / 2; .5 is the level of guessing
    F1                 2 TP / (2 TP + FP + FN), on the active and the random silent passages

Near misses are harder, so they are counted separately. Active passages are drawn evenly from the
deciles of all active passages, so recall estimates the recall on a random active passage. The
interval of the balanced accuracy combines the Wilson intervals of both shares, as in method 10 of
Newcombe (1998). With the balanced accuracy theta and the bounds l and u of each share p, it is

    theta - sqrt(sum (p - l)^2) / 2, theta + sqrt(sum (u - p)^2) / 2
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from dist_sae.index.layout import DECILES

Kind = Literal["active", "random", "near"]
KINDS: tuple[Kind, ...] = ("active", "random", "near")
"""Kinds of passages: the latent is active; it is silent in a random passage (random); it is silent
while a near latent is active (near)."""
_Z = 1.959964  # 95 %


class Verdict(NamedTuple):
    """A passage, and the judge's verdict on it."""

    kind: Kind
    decile: int | None
    """Decile of an active passage, from 0 (least active); None for a silent passage."""
    yes: bool | None
    """The verdict; None if the judge's answer could not be parsed."""
    document: int | None = None
    position: int | None = None
    """Position of the passage's first token in the document."""


class VerdictCounts(NamedTuple):
    """The verdicts on passages of one kind: `yes` of `of`."""

    yes: int
    of: int

    @property
    def share(self) -> float:
        """Share of the passages on which the judge says yes."""
        return self.yes / self.of


class Score(NamedTuple):
    """Verdicts, and scores. A score is None if there are no passages of a kind that it needs."""

    active: VerdictCounts
    random: VerdictCounts
    near: VerdictCounts
    deciles: tuple[VerdictCounts, ...]
    """Verdicts on the active passages by decile, from the least active."""
    unanswered: int
    """Number of passages without a verdict. They do not count in any other number."""
    balanced_accuracy: float | None
    low: float | None
    high: float | None
    """`low` and `high` are the bounds of the balanced accuracy's 95 % interval."""
    f1: float | None
    near_specificity: float | None
    """Share of the near misses on which the judge says no."""


def score(verdicts: Iterable[Verdict]) -> Score:
    """Count verdicts, and compute the scores."""
    verdicts = list(verdicts)
    answered = [each for each in verdicts if each.yes is not None]
    active, random, near = (
        _count([each for each in answered if each.kind == kind]) for kind in KINDS
    )
    balanced = low = high = f1 = None
    if active.of and random.of:
        shares = (active.share, 1 - random.share)
        bounds = (_wilson(active), _wilson(VerdictCounts(random.of - random.yes, random.of)))
        balanced = sum(shares) / 2
        down, up = (
            math.hypot(*(p - b[end] for p, b in zip(shares, bounds, strict=True))) / 2
            for end in (0, 1)
        )
        low, high = balanced - down, balanced + up
        f1 = 2 * active.yes / (active.yes + random.yes + active.of)
    return Score(
        active,
        random,
        near,
        tuple(_count([each for each in answered if each.decile == d]) for d in range(DECILES)),
        len(verdicts) - len(answered),
        balanced,
        low,
        high,
        f1,
        1 - near.share if near.of else None,
    )


def _count(verdicts: Sequence[Verdict]) -> VerdictCounts:
    return VerdictCounts(sum(bool(each.yes) for each in verdicts), len(verdicts))


def _wilson(counts: VerdictCounts) -> tuple[float, float]:
    """Compute the Wilson interval of a share."""
    p, n = counts.share, counts.of
    middle = p + _Z**2 / (2 * n)
    reach = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return (middle - reach) / (1 + _Z**2 / n), (middle + reach) / (1 + _Z**2 / n)
