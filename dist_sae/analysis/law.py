"""The law of missing features: which concepts have a latent, by frequency and width.

The probability that a concept has its own latent is modeled as a logistic function of its log
frequency. `f50` is the frequency at which the probability is one half. Over several widths, f50
falls as a power of the number of alive latents. An ideal dictionary of n latents has the n most
frequent features. So if frequencies fall as rank^-s, the power is -s, and f50 * alive is constant
only if s is 1.

Source: the measurement by frequency is from Templeton et al. 2024, "Scaling Monosemanticity"
(missing features); fit, power, intervals and forecast are a reconstruction and our own.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

REPLICATES = 1000
_RIDGE = 1e-2  # keeps the standardized slope finite if a frequency separates the concepts
_STEPS, _CONVERGED = 40, 1e-6  # most steps and tolerance of Newton's method
_LARGEST_LOG = 700  # larger logarithms overflow a float64
LEAST_WIDTHS = 3
"""Fewest widths that a power is fitted to."""
ENOUGH_FIRINGS = 2000
"""Firings in training after which a feature is found as well as the width allows, as measured in
synthetic worlds. With fewer, f50 still falls with more training."""


class Width(NamedTuple):
    """Which concepts one dictionary has."""

    name: str
    n_latents: int
    alive: int
    """Number of latents that fire at least once on the rows of the index."""
    trained_rows: int
    frequency: NDArray[np.float64]
    """Occurrences of each concept per row. The concepts are the same for all dictionaries."""
    judged: NDArray[np.bool_]
    """Whether each concept is judged."""
    recovered: NDArray[np.bool_]
    """Whether each concept has a latent."""


class Interval(NamedTuple):
    """A number with the range of 95 % of its bootstrap replicates."""

    value: float | None
    """None if it cannot be estimated."""
    low: float | None
    high: float | None


class Curve(NamedTuple):
    """The logistic curve of one dictionary. All intervals are over concepts."""

    f50: Interval
    f50_alive: Interval
    """Product of f50 and the number of alive latents."""
    slope: Interval
    """Change of the log odds from one decade of frequency to the next."""
    firings: float | None
    """Occurrences in training of a concept of frequency f50."""


class Forecast(NamedTuple):
    """Alive latents and training rows needed for half of the concepts of one frequency."""

    frequency: float
    latents: Interval
    rows: float
    """Number of rows in which a concept of this frequency fires `ENOUGH_FIRINGS` times."""


class Law(NamedTuple):
    """The law of f50 over several widths: f50 = scale * alive^exponent."""

    exponent: Interval
    scale: float
    forecasts: Sequence[Forecast]
    ten_times: Interval
    """f50 of a dictionary with ten times the alive latents of the widest."""


class Fitted(NamedTuple):
    """Curves of all widths, and their law."""

    curves: Sequence[Curve]
    law: Law | None
    """None if fewer than three widths have an f50."""


def logistic(
    x: NDArray[np.float64], y: NDArray[np.bool_], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fit slopes and intercepts of the log odds of y, for several weightings at once.

    Args:
        x: Predictor, [n]. Values must not all be equal.
        y: Outcome, [n].
        weights: Weights of each replicate, [replicates, n].
    """
    mean, spread = x.mean(), x.std()
    z = (x - mean) / spread
    slope = np.zeros(len(weights))
    intercept = np.zeros(len(weights))
    for _ in range(_STEPS):
        p = 1 / (1 + np.exp(-np.clip(slope[:, None] * z + intercept[:, None], -500, 500)))
        error, curvature = weights * (y - p), weights * p * (1 - p)
        g0, g1 = error.sum(1), error @ z - _RIDGE * slope
        h00 = curvature.sum(1) + 1e-9
        h01, h11 = curvature @ z, curvature @ z**2 + _RIDGE
        determinant = h00 * h11 - h01**2
        step = np.stack([h11 * g0 - h01 * g1, h00 * g1 - h01 * g0]) / determinant
        step = np.clip(step, -2, 2)
        intercept, slope = intercept + step[0], slope + step[1]
        if np.abs(step).max() < _CONVERGED:
            break
    slope /= spread
    return slope, intercept - slope * mean


def fit(widths: Sequence[Width], frequencies: Sequence[float] = (), seed: int = 0) -> Fitted:
    """Fit the curve of each dictionary, and their law.

    A bootstrap replicate draws the same concepts for all widths. So the interval of the exponent
    accounts for correlations between widths.

    Args:
        widths: Dictionaries.
        frequencies: Frequencies of concepts, per row, to forecast a width for.
        seed: Seed of the replicates.
    """
    n = len(widths[0].frequency)
    weights = bootstrap_counts(n, seed)
    curves, logs = [], []
    for width in widths:
        log_f50, slope = _replicates(width, weights)
        f50 = np.exp(log_f50)
        logs.append(log_f50)
        middle = interval(f50)
        curves.append(
            Curve(
                middle,
                interval(f50 * width.alive),
                interval(slope * math.log(10)),
                None if middle.value is None else middle.value * width.trained_rows,
            )
        )
    usable = [i for i, curve in enumerate(curves) if curve.f50.value is not None]
    alive = np.log([max(1, widths[i].alive) for i in usable])
    if len(set(alive.tolist())) < LEAST_WIDTHS:
        return Fitted(curves, None)
    return Fitted(curves, _law(alive, np.stack([logs[i] for i in usable]), frequencies))


def _replicates(
    width: Width, weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fit log f50 and slope for each weighting; log f50 is NaN where it cannot be estimated."""
    of, y = weights[:, width.judged], width.recovered[width.judged]
    x = np.log(width.frequency[width.judged])
    if not len(x) or x.min() == x.max():
        nothing = np.full(len(weights), math.nan)
        return nothing, nothing
    slope, intercept = logistic(x, y, of)
    share = (of @ y) / of.sum(1).clip(min=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_f50 = np.where((share > 0) & (share < 1) & (slope > 0), -intercept / slope, math.nan)
    log_f50 = np.where(np.abs(log_f50) < _LARGEST_LOG, log_f50, math.nan)
    return log_f50, slope


def _law(
    alive: NDArray[np.float64], logs: NDArray[np.float64], frequencies: Sequence[float]
) -> Law:
    centred = alive - alive.mean()
    exponent = centred @ logs / (centred @ centred)
    scale = logs.mean(0) - exponent * alive.mean()
    forecasts = [
        Forecast(
            frequency,
            interval(np.exp(np.clip((math.log(frequency) - scale) / exponent, None, _LARGEST_LOG))),
            ENOUGH_FIRINGS / frequency,
        )
        for frequency in frequencies
    ]
    wider = alive.max() + math.log(10)
    ten_times = interval(np.exp(scale + exponent * wider))
    return Law(interval(exponent), float(np.exp(scale[0])), forecasts, ten_times)


def bootstrap_counts(n: int, seed: int) -> NDArray[np.float64]:
    """Return how often each of n items is drawn: once in the sample, then in each replicate.

    Returns:
        Counts, [1 + `REPLICATES`, n]; each row sums to n.
    """
    drawn = np.random.default_rng(seed).integers(0, n, (REPLICATES, n))
    drawn += n * np.arange(REPLICATES)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=REPLICATES * n).reshape(REPLICATES, n)
    return np.concatenate([np.ones((1, n)), counts])


def interval(replicates: NDArray[np.float64]) -> Interval:
    """Return the first value, with the 2.5 % and 97.5 % quantiles of the others.

    The bounds are None if more than 5 % of the replicates have no value.
    """
    value, others = replicates[0], np.sort(replicates[1:])
    if not math.isfinite(value):
        return Interval(None, None, None)
    known = others[np.isfinite(others)]
    if len(known) < 0.95 * len(others):
        return Interval(float(value), None, None)
    low, high = np.quantile(known, [0.025, 0.975])
    return Interval(float(value), float(low), float(high))
