"""The recovery curve by frequency and the law over widths, on planted data."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from dist_sae.analysis.law import Fitted, Width, fit, logistic
from dist_sae.analysis.tail import exponent_of

N_FEATURES = 20_000


def probabilities(s: float, l0: float = 6.0) -> NDArray[np.float64]:
    p = np.arange(1, N_FEATURES + 1) ** -s
    return np.asarray(p * (l0 / p.sum()))


def ideal(s: float, n: int, concepts: NDArray[np.int64]) -> Width:
    """Return a dictionary of n latents that has the n most frequent features."""
    p = probabilities(s)[concepts]
    everywhere = np.ones(len(concepts), np.bool_)
    return Width(f"{n}", n, n, 10**9, p, everywhere, concepts < n)


def sampled(n: int = 400, seed: int = 0) -> NDArray[np.int64]:
    """Return ranks of concepts, spread evenly in log rank."""
    generator = np.random.default_rng(seed)
    ranks = np.exp(generator.uniform(0, math.log(N_FEATURES), 4 * n)).astype(int)
    return np.asarray(
        np.unique(ranks)[:n]
        if len(np.unique(ranks)) <= n
        else np.sort(generator.choice(np.unique(ranks), n, replace=False))
    )


def ideal_law(s: float) -> Fitted:
    concepts = sampled()
    return fit([ideal(s, n, concepts) for n in (128, 512, 2048, 8192)], [1e-6])


@pytest.mark.parametrize(("s", "exponent"), [(0.7, -0.75), (1.0, -1.04), (1.3, -1.28)])
def test_the_exponent_is_that_of_the_frequencies(s: float, exponent: float) -> None:
    """The exponent is near that of trained dictionaries, and its interval contains -s.

    An ideal dictionary has exponent -s.
    """
    law = ideal_law(s).law
    assert law is not None
    assert law.exponent.value == pytest.approx(exponent, abs=0.1)
    assert law.exponent.low is not None
    assert law.exponent.high is not None
    assert law.exponent.low <= -s <= law.exponent.high


def test_the_forecast_is_the_width_that_has_the_concept() -> None:
    """At s = 1 frequency p has rank C / p, and the forecast is the width up to this rank."""
    (forecast,) = ideal_law(1.0).law.forecasts  # type: ignore[union-attr]
    rank = probabilities(1.0)[0] / 1e-6
    assert forecast.latents.low is not None
    assert forecast.latents.high is not None
    assert forecast.latents.low < rank < forecast.latents.high
    assert forecast.latents.value == pytest.approx(rank, rel=0.5)
    assert forecast.rows == 2e9


def test_intervals_of_f50_cover_the_planted_one() -> None:
    """At least 52 of 60 intervals at 95 % contain the planted f50.

    Fewer would occur by chance once in 500 times.
    """
    covered = 0
    f50, slope = 1e-4, 1.5
    for seed in range(60):
        generator = np.random.default_rng(seed)
        p = np.exp(generator.uniform(math.log(1e-6), math.log(1e-2), 200))
        chance = 1 / (1 + np.exp(-slope * np.log(p / f50)))
        every = np.ones(200, np.bool_)
        width = Width("w", 9, 9, 10**6, p, every, generator.random(200) < chance)
        (curve,) = fit([width], seed=seed).curves
        assert curve.f50.low is not None
        assert curve.f50.high is not None
        covered += curve.f50.low <= f50 <= curve.f50.high
        assert curve.f50.value is not None
        assert curve.firings == pytest.approx(curve.f50.value * 1e6)
    assert covered >= 52


def test_logistic_recovers_the_planted_curve() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=200_000) * 3 + 5
    y = generator.random(len(x)) < 1 / (1 + np.exp(-(0.8 * x - 3)))
    slope, intercept = logistic(x, y, np.ones((1, len(x))))
    assert slope[0] == pytest.approx(0.8, abs=0.02)
    assert intercept[0] == pytest.approx(-3, abs=0.1)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_there_is_no_f50_where_frequency_tells_nothing(share: float) -> None:
    p = np.geomspace(1e-6, 1e-2, 200)
    recovered = np.arange(200) % 2 < 2 * share  # all, none, or every other one
    every = np.ones(200, np.bool_)
    (curve,) = fit([Width("w", 9, 9, 10**6, p, every, recovered)]).curves
    assert curve.f50.low is None
    assert curve.slope.low is None or curve.slope.low <= 0


def test_two_widths_make_no_law_nor_do_three_of_the_same() -> None:
    concepts = sampled()
    assert fit([ideal(1.0, n, concepts) for n in (128, 512)]).law is None
    assert fit([ideal(1.0, n, concepts) for n in (128, 512, 512)]).law is None


def test_the_zipf_exponent_is_that_of_the_alive_latents() -> None:
    generator = np.random.default_rng(0)
    firings = generator.poisson(1e7 * probabilities(1.3))
    assert exponent_of(np.append(firings, np.zeros(500, int))) == pytest.approx(1.3, abs=0.02)
    assert exponent_of(np.ones(3, int)) is None
