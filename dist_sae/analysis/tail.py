"""The tail: energy of the features that a dictionary is too narrow for, by a power law.

The energy of a latent is its part of the variance, Var(f) |d|^2. For a rare latent this is about
p E[f^2 | on] |d|^2. Energies by rank follow a power law if frequencies do (Zipf). Extrapolating the
law shows what wider dictionaries can still gain. It does not show the total, because with an
exponent of at most 1 the sum diverges. So the energy that is missing now is measured (`pursuit`),
and only the gain comes from the law.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist_sae.index.layout import HISTOGRAM_BARS

Floats = NDArray[np.float64]

_FLAT = 1e-9  # for exponents this near to 1 the integral is the logarithm
LEAST_ALIVE = 64
"""Fewest alive latents that a law is fitted to."""
_WINDOWS = ((1 / 16, 1 / 2), (1 / 16, 1 / 4), (1 / 8, 1 / 2), (1 / 4, 1 / 2), (1 / 8, 3 / 4))
"""Windows of ranks that lines are fitted to, as shares of the alive latents. The first gives the
estimate. Windows exclude the most frequent latents, which follow no law, and the rarest, which are
mixed or not trained yet."""
_PLACES = 32  # ranks of a window, evenly spaced in the logarithm
COLUMNS = ("density", "mean", "max", "histogram", "decoder_norm")
"""Columns of the index's table of latents that `energies` needs."""


class Span(NamedTuple):
    """An estimate with an interval."""

    value: float
    low: float
    high: float

    def numbers(self) -> list[float]:
        """Return estimate, low and high, for JSON."""
        return [float(x) for x in self]


class Law(NamedTuple):
    """A power law, value = level * rank^-exponent, as several lines that fit about equally well."""

    levels: Floats
    exponents: Floats
    """Exponent of each line. The first is the estimate."""

    @property
    def exponent(self) -> Span:
        """The exponent, with the lowest and highest over all lines."""
        return _span(self.exponents)

    def between(self, first: float, last: float) -> Span:
        """Return the sum of the values of the ranks after `first`, up to `last`."""
        return _span(self.levels * _integral(self.exponents, first + 0.5, last + 0.5))

    def rank_of(self, first: float, total: Span) -> Span:
        """Return the rank at which the values after `first` sum to a total; may be infinite.

        The interval covers all lines, with the lowest and the highest total.
        """
        ends = [_last(self.levels, self.exponents, first + 0.5, t) - 0.5 for t in total]
        return Span(float(ends[0][0]), float(ends[1].min()), float(ends[2].max()))


def energies(table: pa.Table) -> tuple[Floats, Floats]:
    """Return density and energy of each latent of an index, in the scale of the checkpoint.

    The index does not store E[f^2 | on]. It is estimated from the histogram, with activations
    spread evenly within a bar, and corrected by the mean, which is exact.

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
    """Fit a power law to values of alive latents by rank, the largest first.

    Each line is a least-squares fit of log(value) to log(rank). Lines are fitted to several windows
    of ranks, and repeated with slopes changed by two standard errors. So the interval covers both
    the scatter about a line and the bend of the curve, but is not a confidence interval.

    Raises:
        ValueError: There are fewer than `LEAST_ALIVE` values.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))[::-1]
    if len(ordered) < LEAST_ALIVE:
        raise ValueError(f"{len(ordered)} latents are alive; a law needs {LEAST_ALIVE}")
    lines = [line for window in _WINDOWS for line in _lines(ordered, *window)]
    levels, exponents = np.array(lines).T
    return Law(np.exp(levels), exponents)


def exponent_of(firings: NDArray[np.int64]) -> float | None:
    """Return the exponent s of the alive latents' rank-frequency curve, frequency ~ rank^-s.

    It is None if too few latents are alive for a law.
    """
    alive = firings[firings > 0].astype(np.float64)
    return fit_law(alive).exponent.value if len(alive) >= LEAST_ALIVE else None


def _lines(ordered: Floats, start: float, stop: float) -> Iterator[tuple[float, float]]:
    """Yield (log level, exponent) of a window's line, and of a flatter and a steeper one."""
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
    """Integrate x^-exponent from `first` to `last`. With half ranks this approximates a sum."""
    power = 1 - exponents
    flat = np.abs(power) < _FLAT
    safe = np.where(flat, 1.0, power)
    return np.asarray(np.where(flat, np.log(last / first), (last**safe - first**safe) / safe))


def _last(levels: Floats, exponents: Floats, first: float, total: float) -> Floats:
    """Return the bound at which level x `_integral` reaches a total; infinite if it never does."""
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
    """Predict the least tail of a wider dictionary, as a share of the variance.

    Args:
        tail: The measured tail, as a share of the variance.
        unique: Share of unique energy in additional latents, see `dark_matter.Tail.unique`.
        law: Law of the energies, as shares of the variance.
        alive: Number of alive latents of the measured dictionary.
        wider: Number of alive latents of the wider dictionary.
    """
    gain = law.between(alive, wider)
    return Span(
        max(0.0, tail.value - unique.value * gain.value),
        max(0.0, tail.low - unique.high * gain.high),
        max(0.0, tail.high - unique.low * gain.low),
    )


def forecast(tails: tuple[Span, Span], law: Law, alive: tuple[int, int, int]) -> Span:
    """Predict the tail of a third dictionary of a sweep, from two narrower ones.

    The law gives how the gain falls with the rank. Its level comes from the gain between the two
    narrower dictionaries. The interval includes the interval of the second tail.

    Args:
        tails: Tails of the two narrower dictionaries.
        law: Law of the energies of the second dictionary.
        alive: Numbers of alive latents of the three, ascending.
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
