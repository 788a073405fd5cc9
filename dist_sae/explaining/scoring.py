"""How well an explanation tells on which passages its latent fires.

    recall             share of the active passages on which the judge says yes
    specificity        share of the silent passages, drawn by chance, on which it says no
    balanced accuracy  (recall + specificity) / 2: .5 says nothing
    F1                 2 TP / (2 TP + FP + FN), of the active passages and those by chance

Near misses, which are harder, are counted apart. Active passages are drawn evenly from the deciles
of the passages in which the latent fires, so recall is that of a passage by chance. The interval of
the balanced accuracy has both shares' Wilson intervals, joined as Newcombe (1998, method 10) does:
with bounds l and u of each share p,

    theta - sqrt(sum (p - l)^2) / 2, theta + sqrt(sum (u - p)^2) / 2
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from dist_sae.index.layout import DECILES

Kind = Literal["active", "random", "near"]
KINDS: tuple[Kind, ...] = ("active", "random", "near")
"""The latent is active; silent, by chance; silent, while a near latent is active."""
_Z = 1.959964  # 95 %


class Judged(NamedTuple):
    """A passage, and what the judge said of it."""

    kind: Kind
    decile: int | None
    """Of an active passage, from 0, the least active tenth."""
    yes: bool | None
    """None: there is no answer that can be read."""
    document: int | None = None
    position: int | None = None
    """Position of the passage's first token in the document."""


class Said(NamedTuple):
    """Answers on passages of one kind."""

    yes: int
    of: int

    @property
    def share(self) -> float:
        """Share of yes."""
        return self.yes / self.of


class Score(NamedTuple):
    """Answers, and what follows from them. Numbers are None where passages of a kind lack."""

    active: Said
    random: Said
    near: Said
    deciles: tuple[Said, ...]
    """Of the active passages, from the least active tenth."""
    unanswered: int
    """Passages without an answer that can be read; in no other number."""
    balanced_accuracy: float | None
    low: float | None
    high: float | None
    """Bounds of its 95 % interval."""
    f1: float | None
    near_specificity: float | None
    """Share of the near misses on which the judge says no."""


def score(judged: Iterable[Judged]) -> Score:
    """Count answers, and compute what follows from them."""
    told = list(judged)
    answered = [each for each in told if each.yes is not None]
    active, random, near = (
        _said([each for each in answered if each.kind == kind]) for kind in KINDS
    )
    balanced = low = high = f1 = None
    if active.of and random.of:
        shares = (active.share, 1 - random.share)
        bounds = (_wilson(active), _wilson(Said(random.of - random.yes, random.of)))
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
        tuple(_said([each for each in answered if each.decile == d]) for d in range(DECILES)),
        len(told) - len(answered),
        balanced,
        low,
        high,
        f1,
        1 - near.share if near.of else None,
    )


def _said(judged: Sequence[Judged]) -> Said:
    return Said(sum(bool(each.yes) for each in judged), len(judged))


def _wilson(said: Said) -> tuple[float, float]:
    """Wilson's interval of a share."""
    p, n = said.share, said.of
    middle = p + _Z**2 / (2 * n)
    reach = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return (middle - reach) / (1 + _Z**2 / n), (middle + reach) / (1 + _Z**2 / n)
