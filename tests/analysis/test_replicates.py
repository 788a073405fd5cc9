"""Coverage of the dark-matter intervals over 200 samples of rows from worlds with known truth."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_sae.analysis.dark_matter import residual_share, unique_share
from dist_sae.analysis.error_parts import Moments, PartsEvaluator
from dist_sae.analysis.pursuit import most_latents, pursue
from dist_sae.analysis.tail import Floats, fit_law, floor
from dist_sae.config.sae import TopKConfig
from dist_sae.dictionaries.base import Dictionary
from dist_sae.index.decoder import directions
from tests.analysis.circles import codes_of
from tests.dictionaries.worlds import World, train

REPLICATES, COVERED = 200, 0.92
DOCUMENT_ROWS = 8
SECOND = 1 + 0.25**2  # second moment of the intensity


class Known(NamedTuple):
    """A dictionary of a world, and its true values."""

    W_dec: Tensor
    offset: Tensor
    energies: Floats
    """Variance that each latent contributes to reconstructions; 0 for latents that never fire."""
    tail: float
    """Share of the variance that no latents describe; see `lacking`."""


def variances(world: World) -> Floats:
    """Return the variance of each feature's activations, before the world scales its rows."""
    p = world.p.numpy()
    return np.asarray(p * SECOND - p**2)


def ideal(world: World, n: int) -> Known:
    """Return the dictionary of the n most frequent features."""
    known = variances(world)
    tail = float(known[n:].sum() / known.sum())
    return Known(world.directions[:n], torch.zeros(world.d_in), known[:n], tail)


def trained(world: World, n: int, k: int, steps: int) -> Known:
    """Return a trained TopK dictionary; see `lacking` for its tail."""
    config = TopKConfig(n_latents=n, k=k, auxk=n // 8, dead_after_rows=100_000)
    sae = train(world, config, steps=steps, batch=1024, lr=3e-3).sae
    return with_tail(world, sae.W_dec.detach(), sae.b_dec.detach(), _energies(sae, world))


def with_tail(world: World, W_dec: Tensor, offset: Tensor, energies: Floats) -> Known:
    """Return a dictionary with the tail that its decoder and the world's features imply."""
    chance = np.sqrt(2 * np.log(len(W_dec)) / world.d_in)
    latents = directions(W_dec).double().numpy()[energies > 0]
    shares = [lacking(each, latents, chance) for each in world.directions.double().numpy()]
    energy = variances(world)
    return Known(W_dec, offset, energies, float(energy @ shares / energy.sum()))


def lacking(feature: Floats, latents: Floats, chance: float) -> float:
    """Return the share of a feature's energy that the latents together do not describe.

    The feature is alone and without noise. In each round the latent nearest to the residual joins,
    unless a random direction would be as near, and all activations are refitted. Mixed features
    need several latents. For example, (A + B) / sqrt 2 and (A - B) / sqrt 2 each describe half of
    A, and together all of it.

    Args:
        feature: Unit vector, [d].
        latents: Unit vectors, [latents, d].
        chance: Cosine of the nearest of as many random directions.
    """
    used, left = list[int](), feature
    while True:
        cosines = latents @ left / max(float(np.linalg.norm(left)), 1e-12)
        nearest = int(cosines.argmax())
        if cosines[nearest] <= chance or nearest in used:
            return float(left @ left)
        used.append(nearest)
        # activations are at least 0, so drop latents with negative ones and solve again
        while True:
            acts = np.linalg.lstsq(latents[used].T, feature, rcond=None)[0]
            if (acts > 0).all():
                break
            used = [latent for latent, act in zip(used, acts, strict=True) if act > 0]
        left = feature - acts @ latents[used]


def test_latents_that_share_a_feature_describe_it_together() -> None:
    mixed = np.array([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2)
    feature = np.array([1.0, 0.0])
    for latents, left in ((mixed[:1], 0.5), (mixed, 0.0), (-mixed, 1.0)):
        assert lacking(feature, latents, chance=0.3) == pytest.approx(left, abs=1e-12)
    assert lacking(feature, mixed, chance=0.8) == 1  # both cosines are .71, below chance


def _energies(sae: Dictionary, world: World, rows: int = 20_000) -> Floats:
    codes, n = codes_of(sae, world, rows), len(sae.W_dec)
    mean = np.bincount(codes.latents, codes.acts, n) / rows
    square = np.bincount(codes.latents, codes.acts**2, n) / rows
    return np.asarray((square - mean**2) * sae.W_dec.detach().norm(dim=1).numpy() ** 2)


def solve(known: Known, x: Tensor, l0: float, usable: NDArray[np.bool_] | None = None) -> Tensor:
    """Return each row's squared residuals from the solver, with all alive latents or with some."""
    mask = torch.from_numpy(known.energies > 0 if usable is None else usable)
    decoder = known.W_dec
    return pursue(x - known.offset, lambda: [decoder], mask, most_latents(l0)).squares.double()


def coverages(world: World, narrow: Known, wide: Known, rows: int) -> dict[str, float]:
    """Return the share of samples whose interval contains the truth."""
    mean, l0 = world.p.float() @ world.directions * world.scale, float(world.p.sum())
    energies = narrow.energies
    alive, alive_wide = energies[energies > 0], int((wide.energies > 0).sum())
    half = np.argsort(-energies, kind="stable")[: len(alive) // 2]
    rarer = 1 - float(energies[half].sum() / energies.sum())
    x = world.batch(3_000_000, REPLICATES * rows)  # rows are independent
    samples = [
        torch.split(each, rows, dim=-1)
        for each in (
            (x - mean).double().square().sum(1),
            solve(narrow, x, l0),
            solve(narrow, x, l0, np.isin(np.arange(len(energies)), half)),
            solve(wide, x, l0),
        )
    ]
    documents = torch.arange(rows) // DOCUMENT_ROWS
    hits: dict[str, list[bool]] = {"tail": [], "floor": [], "held out": []}
    for total, left, by_half, left_wide in zip(*samples, strict=True):
        tail, held_out = (residual_share(each, total, documents) for each in (left, left_wide))
        share, half_share = (each.sum(1) / total.sum() for each in (left, by_half))
        unique = unique_share(share, half_share, rarer)
        law = fit_law(alive / alive.sum() * (1 - tail.value))
        predicted = floor(tail, unique, law, len(alive), alive_wide)
        hits["tail"] += [tail.low <= narrow.tail <= tail.high]
        hits["tail"] += [held_out.low <= wide.tail <= held_out.high]
        hits["floor"].append(predicted.low <= wide.tail <= predicted.high)
        hits["held out"].append(predicted.low <= held_out.value <= predicted.high)
        assert predicted.high < tail.high  # not only that the tail does not grow
    return {name: float(np.mean(found)) for name, found in hits.items()}


@pytest.mark.system
@pytest.mark.parametrize("zipf", [0.7, 1.0, 1.3])
def test_intervals_of_tail_and_floor_hold_the_truth(
    request: pytest.FixtureRequest, zipf: float
) -> None:
    """At least 92 % of intervals contain the truth, for ideal dictionaries.

    They have 64 and 128 of 256 features. When this was written 94 % or more did.
    """
    if zipf != 1.0 and not request.config.getoption("--long"):
        pytest.skip("runs for half a minute; needs --long")
    world = World(d_in=64, n_features=256, l0=3, zipf=zipf)
    found = coverages(world, ideal(world, 64), ideal(world, 128), 200)
    assert min(found.values()) >= COVERED, found


@pytest.mark.system
@pytest.mark.parametrize(
    ("d", "features", "n", "k", "steps", "rows"),
    [
        (64, 256, 80, 3, 3000, 200),
        (128, 2048, 256, 6, 3000, 400),
    ],
)
def test_intervals_hold_the_truth_of_trained_dictionaries(
    request: pytest.FixtureRequest,
    d: int,
    features: int,
    n: int,
    k: int,
    steps: int,
    rows: int,
) -> None:
    if not request.config.getoption("--long"):
        pytest.skip("trains and solves for half a minute; needs --long")
    world = World(d_in=d, n_features=features, l0=k, zipf=1.0)
    narrow, wide = (trained(world, each, k, steps) for each in (n, 2 * n))
    found = coverages(world, narrow, wide, rows)
    assert min(found.values()) >= COVERED, (found, narrow.tail, wide.tail)


class PartsWorld:
    """x = features + a dense part; x_hat = the frequent features + independent noise.

    So e = x_hat - x has three parts of known covariance: the tail (rare features), the dense part,
    and noise independent of x. The covariances determine how much of e a linear map of x predicts.
    """

    d, frequent = 16, 32

    def __init__(self) -> None:
        self.world = World(self.d, 128, l0=3, zipf=1.0)
        draw = torch.Generator().manual_seed(1)
        self.dense = torch.linalg.qr(torch.randn(self.d, 3, generator=draw))[0].T * 0.5
        self.noise = 0.15
        D, p = self.world.directions.double(), self.world.p
        known = torch.from_numpy(variances(self.world))
        tail = D[self.frequent :].T @ (known[self.frequent :, None] * D[self.frequent :])
        missing = tail + self.dense.double().T @ self.dense.double()
        inputs = missing + D[: self.frequent].T @ (
            known[: self.frequent, None] * D[: self.frequent]
        )
        error = missing + self.noise**2 * torch.eye(self.d)
        linear = missing @ torch.linalg.solve(inputs, missing)
        self.mean = p @ D
        self._tail_mean = p[self.frequent :] @ D[self.frequent :]
        self.truth = {
            "fvu": float(error.trace() / inputs.trace()),
            "error_r2": float(linear.trace() / error.trace()),
            "fvu_nonlinear": float((error - linear).trace() / inputs.trace()),
        }

    def rows(self, number: int, n: int) -> tuple[Tensor, Tensor]:
        """Return inputs and errors."""
        draw = torch.Generator().manual_seed(number)
        on = torch.rand(n, len(self.world.p), generator=draw) < self.world.p
        acts = on * (1 + 0.25 * torch.randn(on.shape, generator=draw)).clamp_min(0.1)
        dense = torch.randn(n, len(self.dense), generator=draw) @ self.dense
        rare = acts[:, self.frequent :] @ self.world.directions[self.frequent :]
        x = acts[:, : self.frequent] @ self.world.directions[: self.frequent] + rare + dense
        noise = self.noise * torch.randn(n, self.d, generator=draw)
        return x, noise - dense - rare + self._tail_mean.float()


@pytest.mark.system
def test_intervals_of_the_linear_and_the_nonlinear_part_hold_the_truth() -> None:
    """At least 92 % of intervals contain the true linear and nonlinear parts.

    93 and 95 % did when this was written. Without correcting the fitted map's residual to the best
    map's it was 77 and 72 %.
    """
    world = PartsWorld()
    hits: dict[str, list[bool]] = {name: [] for name in world.truth}
    for number in range(REPLICATES):
        moments = Moments(world.mean, world.d)
        moments.add(*world.rows(2 * number, 50 * world.d))
        evaluator = PartsEvaluator(moments.fit(), world.mean)
        x, error = world.rows(2 * number + 1, 800)
        evaluator.add(x, x, error)
        found = evaluator.result(torch.arange(len(x)) // DOCUMENT_ROWS).intervals
        for name, truth in world.truth.items():
            hits[name].append(found[name][0] <= truth <= found[name][1])
    assert min(np.mean(found) for found in hits.values()) >= COVERED
