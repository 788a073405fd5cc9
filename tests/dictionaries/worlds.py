"""A synthetic world with known features, and single-process training of a dictionary in it."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jaxtyping
import torch
from torch import Tensor

from dist_sae.config.dictionary import DictionaryConfig
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.dead import DeadLatents
from dist_sae.dictionaries.init import initialise_from_data
from dist_sae.dictionaries.interface import Rows, StepContext, Widths
from dist_sae.dictionaries.schedules import learning_rate
from dist_sae.kernels.choice import choose_kernels
from tests.dictionaries.recipes import sae_rows

_MAX_P = 0.25


class World:
    """A world x = sum_i a_i D_i, scaled to E|x|^2 = d_in.

    Feature i is active with p_i ~ i^-zipf, at most 0.25, with sum p_i = l0. Rows are drawn as
    events, which takes time proportional to the number of active features, not of all features.
    """

    def __init__(self, d_in: int, n_features: int, l0: float, zipf: float, seed: int = 0) -> None:
        # differs from trainers' seeds
        generator = torch.Generator().manual_seed(7_000_003 + seed)
        directions = torch.randn(n_features, d_in, generator=generator)
        self.directions = directions / directions.norm(dim=1, keepdim=True)
        p = torch.arange(1, n_features + 1, dtype=torch.float64) ** -zipf
        for _ in range(100):  # spreads the clipped excess over the other features
            p = (p * l0 / p.sum()).clamp(max=_MAX_P)
        self.p = p
        self.d_in = self.widths = d_in
        self._seed = seed
        rates = -torch.log1p(-self.p)
        self._rate, self._edges = float(rates.sum()), (rates / rates.sum()).cumsum(0)
        second_moment = 1 + 0.25**2
        self.scale = float((d_in / (self.p.sum() * second_moment)) ** 0.5)

    def batch(self, number: int, rows: int) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        events = int(torch.poisson(torch.tensor([rows * self._rate]), generator=generator))
        where = torch.randint(rows, (events,), generator=generator)
        draws = torch.rand(events, generator=generator, dtype=torch.float64)
        what = torch.searchsorted(self._edges, draws).clamp(max=len(self.p) - 1)
        both = torch.unique(where * len(self.p) + what)
        where, what = both // len(self.p), both % len(self.p)
        intensity = (1 + 0.25 * torch.randn(len(both), generator=generator)).clamp_min(0.1)
        x = torch.zeros(rows, self.d_in)
        points = self.points(what, generator)
        return x.index_add(0, where, intensity[:, None] * points) * self.scale

    def points(
        self,
        what: Tensor,
        generator: torch.Generator,  # noqa: ARG002 - of features with more than one point
    ) -> Tensor:
        """Return the unit vectors of active features, [active, d_in]."""
        found: Tensor = self.directions[what]
        return found


@runtime_checkable
class Source(Protocol):
    """A world to train in. Each site's rows are scaled to E|x|^2 = the site's width."""

    @property
    def widths(self) -> Widths | int: ...

    def batch(self, number: int, rows: int) -> Rows | Tensor:
        """Return rows. A tensor contains the rows of an autoencoder."""
        ...


class Featureless:
    """A control without features: Gaussian rows with the mean and covariance of a world's rows."""

    def __init__(self, world: World) -> None:
        x = world.batch(1_000_000, 20_000)
        self.d_in = self.widths = world.d_in
        self._mean, self._factor = x.mean(0), torch.linalg.cholesky(x.T.cov())

    def batch(self, number: int, rows: int) -> Tensor:
        generator = torch.Generator().manual_seed(5_000_003 + number)
        noise = torch.randn(rows, self.d_in, generator=generator)
        x: Tensor = self._mean + noise @ self._factor.T
        return x


class Trained(NamedTuple):
    sae: Dictionary
    dead: DeadLatents
    fvu: list[float]
    l0: list[float]


def train(
    world: Source,
    config: DictionaryConfig,
    steps: int,
    batch: int,
    lr: float,
    *,
    seed: int = 0,
    clip: float | None = 1.0,
    warmup: int = 50,
    betas: tuple[float, float] = (0.9, 0.999),
    each: Callable[[int, Dictionary, DeadLatents], Any] | None = None,
) -> Trained:
    """Train with Adam, warm-up, and decay to zero over the last fifth of the steps.

    `each` is called before every step.
    """

    def rows(number: int, n: int) -> Rows:
        drawn = world.batch(number, n)
        return sae_rows(drawn) if isinstance(drawn, Tensor) else drawn

    kernels = choose_kernels("auto", torch.device("cpu"))
    sae: Dictionary = build_sae(config, world.widths, kernels=kernels)  # type: ignore[arg-type]
    variance = float(sae.widths.d_out)
    sae.initialise(rows(0, max(batch, 4096)), seed)
    if config.init_rows:
        initialise_from_data(sae, [rows(0, config.init_rows)])
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr, betas=betas, eps=6.25e-10, fused=True)
    dead = DeadLatents(config.n_latents, config.dead_after_rows or 10_000_000)
    fvu, l0 = [], []
    for step in _counted(steps):
        if each is not None:
            each(step, sae, dead)
        x = rows(1 + step, batch)
        now = StepContext(variance, dead.mask, dead.count, progress=step / steps)
        output = sae.objective(x, now)
        output.terms.total.backward()  # type: ignore[no-untyped-call]
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(sae.parameters(), clip)
        optimizer.param_groups[0]["lr"] = learning_rate(
            step, steps, peak=lr, warmup_steps=warmup, decay_share=0.2
        )
        optimizer.step()
        optimizer.zero_grad()
        sae.constrain()
        dead.update(output.fired, batch)
        if dead.n_stuck:
            sae.revive(dead.stuck, x.inputs, output.error)
        fvu.append(float(output.terms.fvu.detach()))
        l0.append(float(output.active) / batch)
    return Trained(sae, dead, fvu, l0)


def _counted(steps: int) -> Iterator[int]:
    """Yield step numbers. Checks shapes in every twentieth step only, as all have the same."""
    try:
        for step in range(steps):
            jaxtyping.config.update("jaxtyping_disable", step % 20 > 0)
            yield step
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)  # noqa: FBT003 - takes no names


class Recovery(NamedTuple):
    """How many of the world's features a dictionary has recovered."""

    matched: int
    """Number of latents that are the nearest to a feature, at cosine > 0.9."""
    mean_cosine: float
    """Mean cosine of latents with their nearest features."""
    max_cosine: float
    f50_alive: float
    """Frequency at which half of the features are recovered, times the number of alive latents."""


def recovery(world: World, W_dec: Tensor, alive: int | None = None) -> Recovery:
    rows = W_dec.detach()
    cosines = (rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)) @ world.directions.T
    found = cosines.max(dim=0).values > 0.9
    # features with the same nearest latent share it, so it counts once
    nearest = cosines.max(dim=0).indices[found].unique()
    f50 = math.nan
    if world.p.min() < world.p.max() and found.any():
        slope, intercept = _logistic(world.p.log(), found.double())
        f50 = math.exp(-intercept / slope)
    best = cosines.max(dim=1).values
    return Recovery(
        len(nearest), float(best.mean()), float(best.max()), f50 * (alive or len(W_dec))
    )


def pca_fvu(rows: Tensor, components: int) -> float:
    """Return the FVU of a reconstruction from the first principal components."""
    variances = torch.linalg.eigvalsh(rows.T.cov())  # ascending
    return float(1 - variances[-components:].sum() / variances.sum())


def mean_matched_cosine(directions: Tensor, W_dec: Tensor) -> tuple[float, int]:
    """Return (MCC, pairs at cosine > 0.9) of features and latents, paired greedily by cosine.

    The MCC is at most that of the optimal pairing, and equal to it if every feature is found.
    """
    rows = W_dec.detach()
    cosines = (rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)) @ directions.T
    matched = torch.empty(min(cosines.shape))
    for pair in range(len(matched)):
        latent, feature = divmod(int(cosines.argmax()), cosines.shape[1])
        matched[pair] = cosines[latent, feature]
        cosines[latent], cosines[:, feature] = -2, -2
    return float(matched.mean()), int((matched > 0.9).sum())


def _logistic(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Fit the logit of P(y) by Newton's method with a small ridge. Returns (slope, intercept)."""
    mean, spread = x.mean(), x.std()
    design = torch.stack([(x - mean) / spread, torch.ones_like(x)], 1)
    weights = torch.zeros(2, dtype=torch.float64)
    for _ in range(50):
        p = torch.sigmoid(design @ weights)
        gradient = design.T @ (p - y) + 1e-2 * weights
        hessian = (design * (p * (1 - p))[:, None]).T @ design + 1e-2 * torch.eye(2).double()
        weights = weights - torch.linalg.solve(hessian, gradient).clamp(-2, 2)
    slope = float(weights[0] / spread)
    return slope, float(weights[1] - slope * mean)
