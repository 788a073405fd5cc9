"""The tail: energy of the features that a dictionary is too narrow for, by a power law.

The energy of a latent is its part of the variance, Var(f) |d|^2, which is about p E[f^2 | on] |d|^2
for a rare one. Energies over their rank follow a power law where frequencies do (Zipf), and its
continuation says what wider dictionaries can still gain. It does not say what is left in the end:
with an exponent of at most 1 the sum has no limit, so the energy that is left now is measured
(`pursuit`), and only the gain comes from the law.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist_sae.index.layout import HISTOGRAM_BARS

Floats = NDArray[np.float64]

_FLAT = 1e-9  # exponents this near to 1 have the logarithm as their integral
LEAST_ALIVE = 64
"""Fewest alive latents that a law is fitted to."""
_WINDOWS = ((1 / 16, 1 / 2), (1 / 16, 1 / 4), (1 / 8, 1 / 2), (1 / 4, 1 / 2), (1 / 8, 3 / 4))
"""Ranks that lines are fitted to, as shares of the alive latents; the first is the estimate. The
most frequent latents follow no law, and the last ones are at the frontier: mixed, or not trained
yet."""
_PLACES = 32  # of a window, evenly spaced in the logarithm of the rank
COLUMNS = ("density", "mean", "max", "histogram", "decoder_norm")
"""Columns of the index's table of latents that `energies` needs."""


class Span(NamedTuple):
    """An estimate with an interval."""

    value: float
    low: float
    high: float

    def numbers(self) -> list[float]:
        """Estimate, low, high: for JSON."""
        return [float(x) for x in self]


class Law(NamedTuple):
    """A power law, value = level * rank^-exponent, as several lines that fit about as well."""

    levels: Floats
    exponents: Floats
    """Of each line; the first is the estimate."""

    @property
    def exponent(self) -> Span:
        """The exponent, and the least and greatest of all lines."""
        return _span(self.exponents)

    def between(self, first: float, last: float) -> Span:
        """Sum of the values of the ranks above `first`, up to `last`."""
        return _span(self.levels * _integral(self.exponents, first + 0.5, last + 0.5))

    def rank_of(self, first: float, total: Span) -> Span:
        """The rank at which the values beyond `first` have come to a total; may be infinite.

        The interval is of all lines, with the least and with the greatest total.
        """
        ends = [_last(self.levels, self.exponents, first + 0.5, t) - 0.5 for t in total]
        return Span(float(ends[0][0]), float(ends[1].min()), float(ends[2].max()))


def energies(table: pa.Table) -> tuple[Floats, Floats]:
    """Density and energy of each latent of an index, in the scale of the checkpoint.

    The index has no E[f^2 | on]. It is estimated from the histogram, with activations spread
    evenly within a bar, and with the mean, which is exact.

    Args:
        table: `COLUMNS` of the table of latents.
    """
    columns = {name: table[name].combine_chunks() for name in COLUMNS}
    density, mean, largest, norm = (
        columns[name].to_numpy(zero_copy_only=False).astype(np.float64)
        for name in ("density", "mean", "max", "decoder_norm")
    )
    counts = columns["histogram"].flatten().to_numpy().reshape(-1, HISTOGRAM_BARS)
    shares = counts / np.maximum(counts.sum(1), 1)[:, None]
    width = largest / HISTOGRAM_BARS
    middles = (np.arange(HISTOGRAM_BARS) + 0.5) * width[:, None]
    about = (shares * middles).sum(1)
    second = (shares * (middles**2 + width[:, None] ** 2 / 12)).sum(1)
    second *= np.divide(mean, about, out=np.ones_like(mean), where=about > 0) ** 2
    return density, (density * second - (density * mean) ** 2) * norm**2


def fit_law(values: Sequence[float] | Floats) -> Law:
    """Fit a power law to values of alive latents over their rank, the largest first.

    Each line is a least-squares fit of log(value) to log(rank). The lines are of several windows of
    ranks, each also with its slope changed by two standard errors, so the interval has both the
    scatter about a line and the bend of the curve. It is no confidence interval.

    Raises:
        ValueError: There are fewer than `LEAST_ALIVE`.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))[::-1]
    if len(ordered) < LEAST_ALIVE:
        raise ValueError(f"{len(ordered)} latents are alive; a law needs {LEAST_ALIVE}")
    lines = [line for window in _WINDOWS for line in _lines(ordered, *window)]
    levels, exponents = np.array(lines).T
    return Law(np.exp(levels), exponents)


def exponent_of(firings: NDArray[np.int64]) -> float | None:
    """Exponent s of the rank-frequency curve of the alive latents, frequency ~ rank^-s.

    None if too few are alive for a law.
    """
    alive = firings[firings > 0].astype(np.float64)
    return fit_law(alive).exponent.value if len(alive) >= LEAST_ALIVE else None


def _lines(ordered: Floats, start: float, stop: float) -> Iterator[tuple[float, float]]:
    """(Logarithm of the level, exponent) of the line of a window, and of two steeper or flatter."""
    first, last = max(1.0, start * len(ordered)), stop * len(ordered)
    ranks = np.unique(np.round(np.geomspace(first, last, _PLACES)).astype(int))
    x, y = np.log(ranks), np.log(np.maximum(ordered[ranks - 1], 1e-300))
    slope, _ = np.polyfit(x, y, 1)
    rest = y - y.mean() - slope * (x - x.mean())
    error = np.sqrt((rest**2).sum() / (len(x) - 2) / ((x - x.mean()) ** 2).sum())
    for change in (0.0, 2 * error, -2 * error):
        tilted = slope + change
        yield y.mean() - tilted * x.mean(), -tilted


def _integral(exponents: Floats, first: float, last: float) -> Floats:
    """Integral of x^-exponent from `first` to `last`; midpoints make it a sum over ranks."""
    power = 1 - exponents
    flat = np.abs(power) < _FLAT
    safe = np.where(flat, 1.0, power)
    return np.asarray(np.where(flat, np.log(last / first), (last**safe - first**safe) / safe))


def _last(levels: Floats, exponents: Floats, first: float, total: float) -> Floats:
    """The bound at which `_integral` has come to a total; infinite if it never does."""
    power = 1 - exponents
    flat = np.abs(power) < _FLAT
    safe = np.where(flat, 1.0, power)
    inside = first**safe + safe * max(0.0, total) / levels
    with np.errstate(over="ignore", divide="ignore"):
        curved = np.where(inside > 0, np.maximum(inside, 1e-300) ** (1 / safe), np.inf)
        return np.asarray(np.where(flat, first * np.exp(max(0.0, total) / levels), curved))


def _span(values: Floats) -> Span:
    return Span(float(values[0]), float(values.min()), float(values.max()))


def floor(tail: Span, unique: Span, law: Law, alive: int, wider: int) -> Span:
    """The tail that a wider dictionary would leave at least, as a share of the variance.

    Args:
        tail: What the pursuit leaves now, as a share of the variance.
        unique: Share of the energy of further latents that those before do not describe as well.
        law: Of the energies, as shares of the variance.
        alive: Alive latents now.
        wider: Alive latents of the other.
    """
    gain = law.between(alive, wider)
    return Span(
        max(0.0, tail.value - unique.value * gain.value),
        max(0.0, tail.low - unique.high * gain.high),
        max(0.0, tail.high - unique.low * gain.low),
    )


def forecast(tails: tuple[Span, Span], law: Law, alive: tuple[int, int, int]) -> Span:
    """The tail of a third dictionary of a sweep, from two narrower ones.

    The law says how the gain falls with the rank; its level comes from the gain between the two.
    The interval has that of the second's tail.

    Args:
        tails: Of the narrower two.
        law: Of the energies of the second.
        alive: Alive latents of the three, rising.
    """
    first, second, third = (a + 0.5 for a in alive)
    ratios = _integral(law.exponents, second, third) / _integral(law.exponents, first, second)
    now = tails[1]
    found = _span(now.value - (tails[0].value - now.value) * ratios)
    return Span(
        max(0.0, found.value),
        max(0.0, found.low - (now.value - now.low)),
        max(0.0, found.high + (now.high - now.value)),
    )
