"""The tail of planted Zipf worlds whose energy is known. These tests train no dictionary."""

import math
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from dist_sae.analysis.dark_matter import residual_share, unique_share
from dist_sae.analysis.pursuit import most_latents, pursue
from dist_sae.analysis.seeds import overlap_by_frequency
from dist_sae.analysis.tail import Span, energies, fit_law, floor, forecast
from tests.dictionaries.worlds import World

N, D, L0, ROWS = 2048, 128, 6, 400
SECOND = 1 + 0.25**2  # second moment of the intensity


class Planted(NamedTuple):
    """A world, some of its rows, and its true values."""

    world: World
    x: Tensor
    total: Tensor
    """Squared distance of each row from the mean."""
    variances: np.ndarray
    """Variance of each feature."""


def plant(zipf: float, seed: int = 0) -> Planted:
    world = World(D, N, L0, zipf, seed)
    x = world.batch(5, ROWS) / world.scale
    mean = world.p.float() @ world.directions
    p = world.p.numpy()
    return Planted(world, x, (x - mean).double().square().sum(1), p * SECOND - p**2)


def solve(planted: Planted, n: int, usable: int | None = None) -> Tensor:
    """Return the squared residuals of a pursuit with the `n` most frequent features."""
    decoder = planted.world.directions[:n]
    mask = torch.arange(n) < (usable or n)
    return pursue(planted.x, lambda: decoder.split(100), mask, most_latents(L0)).squares.double()


def measure(planted: Planted, n: int) -> tuple[Span, Span]:
    """Return the tail of an ideal dictionary of `n` latents and its share of unique energy."""
    left, by_half = solve(planted, n), solve(planted, n, n // 2)
    total = planted.total.sum()
    shares, half = left.sum(1) / total, by_half.sum(1) / total
    rarer = float(planted.variances[n // 2 : n].sum() / planted.variances[:n].sum())
    tail = residual_share(left, planted.total, torch.arange(ROWS))
    return tail, unique_share(shares, half, rarer)


def law_of(planted: Planted, n: int, tail: Span):  # type: ignore[no-untyped-def]
    share = planted.variances[:n] / planted.variances[:n].sum()
    return fit_law(share * (1 - tail.value))


@pytest.mark.parametrize(("n", "known"), [(128, 0.380), (256, 0.285), (512, 0.190), (1024, 0.095)])
def test_the_tail_is_found_apart_from_interference(n: int, known: float) -> None:
    """The tail's interval contains the planted tail, which is less than a tied encoder's FVU.

    The known energies are the sum of p_i beyond n, divided by L0.
    """
    planted = plant(1.0)
    assert float(planted.world.p[n:].sum()) / L0 == pytest.approx(known, abs=0.001)
    tail, _ = measure(planted, n)
    of_square = known * SECOND * L0 * ROWS / float(planted.total.sum())  # E|x|^2 -> variance
    assert tail.low <= of_square <= tail.high
    assert tail.high - tail.low < 0.12
    acts, latents = (planted.x @ planted.world.directions[:n].T).topk(L0, dim=1)
    x_hat = torch.einsum("rk,rkd->rd", acts.clamp_min(0), planted.world.directions[latents])
    fvu = float((planted.x - x_hat).double().square().sum() / planted.total.sum())
    assert fvu > tail.high


@pytest.mark.parametrize(
    ("zipf", "n", "wider"),
    [(0.7, 256, 1024), (1.0, 128, 256), (1.0, 256, 512), (1.0, 512, 1024), (1.3, 256, 1024)],
)
def test_the_floor_of_a_held_out_width_is_predicted(zipf: float, n: int, wider: int) -> None:
    planted = plant(zipf)
    tail, unique = measure(planted, n)
    predicted = floor(tail, unique, law_of(planted, n, tail), n, wider)
    truth = planted.variances[wider:].sum() / planted.variances.sum()
    measured, _ = measure(planted, wider)
    assert predicted.low <= truth <= predicted.high
    assert predicted.low <= measured.value <= predicted.high
    # the prediction is a smaller number than the tail of the narrower width
    assert predicted.value < tail.low
    assert unique.value > 0.8  # most of the energy belongs to features that no others describe


@pytest.mark.parametrize("zipf", [0.7, 1.0, 1.3])
def test_a_third_width_is_forecast_from_two(zipf: float) -> None:
    planted = plant(zipf)
    tails = {n: measure(planted, n)[0] for n in (256, 512)}
    law = law_of(planted, 512, tails[512])
    predicted = forecast((tails[256], tails[512]), law, (256, 512, 1024))
    truth = planted.variances[1024:].sum() / planted.variances.sum()
    assert predicted.low <= truth <= predicted.high
    assert predicted.high < tails[512].value


def test_a_decoder_that_knows_nothing_explains_nothing() -> None:
    planted = plant(1.0)
    generator = torch.Generator().manual_seed(3)
    random = torch.nn.functional.normalize(torch.randn(512, D, generator=generator), dim=1)
    turn, _ = torch.linalg.qr(torch.randn(D, D, generator=generator))
    square = planted.x.square().sum()
    usable = torch.ones(512, dtype=torch.bool)
    for x, decoder in (
        (planted.x, random),
        (planted.x @ turn, planted.world.directions[:512]),
        (planted.x[:, torch.randperm(D, generator=generator)], planted.world.directions[:512]),
    ):
        left = pursue(x, lambda decoder=decoder: [decoder], usable, most_latents(L0))  # type: ignore[misc]
        assert 1 - float(left.squares[1].sum() / square) < 0.05
    left = pursue(planted.x, lambda: [planted.world.directions[:512]], usable, most_latents(L0))
    assert 1 - float(left.squares[1].sum() / square) > 0.7


@pytest.mark.parametrize("zipf", [0.7, 1.0, 1.3])
def test_exponents_are_found_in_counted_firings(zipf: float) -> None:
    world = World(D, N, L0, zipf)
    counts = np.random.default_rng(0).poisson(world.p.numpy()[:512] * 1e6)
    exponent = fit_law(counts.astype(float)).exponent
    assert exponent.low <= exponent.value <= exponent.high
    assert abs(exponent.value - zipf) < 0.1
    assert exponent.high - exponent.low < 0.2


def test_a_law_says_where_it_would_end_and_recapture_does_not() -> None:
    """The law estimates the number of features, where recapture underestimates it.

    In each of two seeds, the probability of finding a feature is logistic in its log frequency
    (midpoint .906 / n).
    """
    planted = plant(1.0)
    tail, _ = measure(planted, 512)
    end = law_of(planted, 512, tail).rank_of(512, tail)
    assert end.low < N < end.high
    assert end.high < 1.5 * N
    generator = np.random.default_rng(0)
    p = planted.world.p.numpy()
    chance = 1 / (1 + np.exp(-8 * (np.log(p) - math.log(0.906 / 512))))
    one, other = (generator.random(N) < chance for _ in range(2))
    order = np.argsort(p[one], kind="stable")
    found = (one & other)[one][order]
    overlap = overlap_by_frequency(p[one][order], found, int(one.sum()), int(other.sum()))
    assert overlap.recapture < 0.4 * N
    assert overlap.shares[-1] > 0.95
    # rare latents at the frontier have few partners although all of them are true features
    assert overlap.shares[0] < 0.7
    assert 0.7 < overlap.share < 0.95


def test_a_law_needs_latents() -> None:
    with pytest.raises(ValueError, match="63 latents are alive; a law needs 64"):
        fit_law(np.arange(1.0, 64))


def test_flat_and_steep_laws_add_up() -> None:
    """A law's sums match sums term by term, also at exponent 1, where they are logarithms."""
    ranks = np.arange(1, 4097.0)
    for exponent in (0.5, 1.0, 2.0):
        values = 3.0 * ranks**-exponent
        law = fit_law(values)
        assert law.exponent.value == pytest.approx(exponent, abs=1e-6)
        beyond = law.between(1000, 4000)
        assert beyond.value == pytest.approx(values[1000:4000].sum(), rel=1e-3)
        total = Span(*[float(values[1000:4000].sum())] * 3)
        assert law.rank_of(1000, total).value == pytest.approx(4000, rel=5e-3)
    endless = fit_law(ranks**-2.0).rank_of(1000, Span(1.0, 1.0, 1.0))
    assert endless.value == math.inf  # all terms beyond 1,000 add up to only .001


def test_energies_come_from_the_histogram() -> None:
    """Energies from the histogram match E[f^2] - E[f]^2 of the activations."""
    generator = np.random.default_rng(1)
    rows, expected, n_rows = [], [], 100_000
    for shape, density, norm in ((1.0, 0.01, 1.0), (4.0, 0.3, 2.0), (30.0, 0.9, 1.0)):
        acts = generator.gamma(shape, size=int(density * n_rows))
        counts, _ = np.histogram(acts, bins=16, range=(0, acts.max()))
        rows.append((density, acts.mean(), acts.max(), counts.tolist(), norm))
        squares = (acts**2).sum() / n_rows - (acts.sum() / n_rows) ** 2
        expected.append(squares * norm**2)
    rows.append((0.0, 0.0, 0.0, [0] * 16, 1.0))  # never fires
    expected.append(0.0)
    kinds = [pa.float64(), pa.float32(), pa.float32(), pa.list_(pa.int64(), 16), pa.float32()]
    names = ["density", "mean", "max", "histogram", "decoder_norm"]
    columns = [pa.array(c, k) for c, k in zip(zip(*rows, strict=True), kinds, strict=True)]
    densities, energy = energies(pa.table(columns, names=names))
    assert densities.tolist() == [0.01, 0.3, 0.9, 0.0]
    np.testing.assert_allclose(energy, expected, rtol=0.03)


def test_a_floor_gains_the_unique_share() -> None:
    """A wider dictionary lowers the floor by the unique share of the energy that it adds.

    With rank^-1, latents 101 to 200 add .1 * ln 2, half of it unique.
    """
    law = fit_law(0.1 / np.arange(1, 101.0))
    half, tail = Span(0.5, 0.4, 0.6), Span(0.3, 0.2, 0.4)
    gain = 0.1 * math.log(200.5 / 100.5)
    found = floor(tail, half, law, 100, 200)
    assert found == pytest.approx((0.3 - 0.5 * gain, 0.2 - 0.6 * gain, 0.4 - 0.4 * gain), abs=1e-6)
    assert floor(tail, half, law, 100, 10**9).low == 0


@pytest.mark.system
def test_intervals_of_what_is_left_cover_the_truth() -> None:
    """95 % intervals contain the truth in at least 92 % of 200 samples.

    The samples' documents differ in their residuals.
    """
    covered, n = 0, 60
    # E[left / (left + explained)], from the means below
    truth = 0.2 / 1.2 / (0.2 / 1.2 + 0.8 / 0.8)
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(5, 40, (n,), generator=generator)
        documents = torch.repeat_interleave(torch.arange(n), rows)
        own = torch.rand(2, n, generator=generator)[:, documents]
        noise = torch.rand(2, len(documents), generator=generator)
        # a product of two uniforms on 0 to 1 has mean 1 / 4
        left = (0.2 / 1.2) * 4 * own[0] * noise[0]
        explained = 4 * own[1] * noise[1]
        found = residual_share(left.expand(3, -1).double(), (left + explained).double(), documents)
        covered += found.low <= truth <= found.high
    assert covered >= 0.92 * 200
