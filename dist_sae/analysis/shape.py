"""Shape of a group's reconstructions: dimension, composition of latents, scaling by intensity."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]

LEAST_POINTS = 50
"""Fewest distinct directions from which a dimension is estimated."""
LEAST_PAIR_ROWS = 20
"""Fewest rows with both latents, with each alone, and with neither, to test whether they add up."""
_DIRECTIONS = 500  # most directions whose distances are computed
_FARTHEST = 0.1  # share of the directions with the largest ratios, which TwoNN leaves out
_NORM_BINS = 10
_SIDE = 0.3  # least cosine to the mean direction; perspective would stretch points below it
_AHEAD = 0.95  # least share of the points on one side of the origin for a perspective view
_FAINT = 0.3
_PAIRS = 50  # most pairs of latents whose sum is tested


class Spectrum(NamedTuple):
    """Principal components of points."""

    coordinates: Float
    """Coordinates of the centered points, [n, components], by decreasing variance."""
    shares: Float
    """Share of the variance in each component."""

    @property
    def participation(self) -> float:
        """Effective number of components that share the variance: 1 / sum of squared shares."""
        return float(1 / (self.shares**2).sum())


def spectrum(points: Float) -> Spectrum:
    """Return the principal components that have variance, of points that are not all equal.

    Args:
        points: Points, [n, d].
    """
    centred = points - points.mean(0)
    variances, axes = np.linalg.eigh(centred.T @ centred)
    variances, axes = variances[::-1], axes[:, ::-1]
    kept = variances > 1e-9 * variances[0]
    return Spectrum(centred @ axes[:, kept], variances[kept] / variances[kept].sum())


def strong(points: Float) -> NDArray[np.bool_]:
    """Return a mask of the strong points, which have nearly all of the energy, [n].

    A dictionary with a fixed number of latents per row also uses latents weakly where their feature
    is absent. So points shorter than 0.3 times a reference length are dropped. The points above the
    reference length have half of the sum of squares.

    Args:
        points: Points, [n, d].
    """
    lengths = np.linalg.norm(points, axis=1)
    falling = np.sort(lengths)[::-1]
    energy = np.cumsum(falling**2)
    half = falling[np.searchsorted(energy, energy[-1] / 2)]
    found: NDArray[np.bool_] = lengths >= _FAINT * half
    return found


def in_perspective(points: Float) -> tuple[Float, NDArray[np.bool_]] | None:
    """Remove the intensity of points by perspective, if they are on one side of the origin.

    A feature's intensity r multiplies its point, and would otherwise be the largest principal
    component. With the mean direction c, points y become y / (y . c) - c, in which r cancels.

    Args:
        points: Points, [n, d].

    Returns:
        The points in perspective, and a mask of the points that are kept, [n], because they are
        near enough to the mean direction. None if the points surround the origin, as on a ring
        centered there.
    """
    directions = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-30)
    mean = directions.mean(0)
    mean /= max(float(np.linalg.norm(mean)), 1e-30)
    ahead = directions @ mean > _SIDE
    if ahead.mean() < _AHEAD:
        return None
    return points[ahead] / (points[ahead] @ mean)[:, None] - mean, ahead


def two_nn(points: Float) -> float | None:
    """Estimate the intrinsic dimension of directions from their two nearest neighbors (TwoNN).

    With ratios r of the second distance to the first, it is (number of ratios) / (sum of ln r). The
    largest tenth of the ratios is left out, and the sum is completed as for a censored exponential.

    Args:
        points: Points, [n, d]. Only their distinct directions are used.

    Returns:
        The dimension; None if there are fewer than `LEAST_POINTS` distinct directions.

    Source:
        Facco et al. 2017, arXiv:1803.06992.
    """
    lengths = np.linalg.norm(points, axis=1)
    directions = points[lengths > 0] / lengths[lengths > 0, None]
    directions = np.unique(np.round(directions, 4), axis=0)
    if len(directions) < LEAST_POINTS:
        return None
    directions = directions[np.random.default_rng(0).permutation(len(directions))[:_DIRECTIONS]]
    squares = (directions**2).sum(1)
    distances = squares[:, None] + squares - 2 * directions @ directions.T
    np.fill_diagonal(distances, np.inf)
    two = np.sqrt(np.maximum(np.partition(distances, 1, axis=1)[:, :2], 1e-12))
    logs = np.sort(np.log(two[:, 1] / two[:, 0]))
    kept = logs[: int(len(logs) * (1 - _FARTHEST))]
    total = kept.sum() + (len(logs) - len(kept)) * kept[-1]  # a censored exponential's likelihood
    return float(len(kept) / total) if total > 0 else None


def scaling(points: Float) -> float | None:
    """Return the share of the variance of the points' directions that their lengths explain.

    It is near 0 if intensity only scales a point. It is high if the direction turns with the
    length, as in a code of magnitudes. The lengths are cut into tenths.

    Returns:
        The share; None if all directions are equal.
    """
    lengths = np.linalg.norm(points, axis=1)
    points, lengths = points[lengths > 0], lengths[lengths > 0]
    directions = points / lengths[:, None]
    total = ((directions - directions.mean(0)) ** 2).sum()
    if total < 1e-9 * len(points):
        return None
    cuts = np.quantile(lengths, np.linspace(0, 1, _NORM_BINS + 1)[1:-1])
    bins = np.searchsorted(cuts, lengths)
    counts = np.bincount(bins, minlength=_NORM_BINS)
    used = counts > 0
    sums = np.stack([np.bincount(bins, column, _NORM_BINS) for column in directions.T], axis=1)
    means = sums[used] / counts[used, None]
    between = (counts[used] * ((means - directions.mean(0)) ** 2).sum(1)).sum()
    explained, by_chance = between / total, (used.sum() - 1) / max(1, len(points) - 1)
    return float(max(0.0, explained - by_chance))


def composition(codes: Float, gram: Float) -> float | None:
    """Measure how well the latents of a group add up, as separate features do.

    For latents A and B, the mean reconstruction on rows with both is predicted by

        (mean with A but not B) + (mean with B but not A) - (mean with neither).

    The result is 1 - (squared error) / (squared length), summed over the pairs with the most common
    rows. It is near 1 for separate features, and well below 1 if the latents are points of one
    manifold, between which the dictionary interpolates.

    Args:
        codes: Activations, [rows, latents].
        gram: Dot products of the decoder rows, [latents, latents].

    Returns:
        The result; None if no pair has `LEAST_PAIR_ROWS` rows of each kind.
    """
    on = codes > 0
    both = on.T.astype(np.float64) @ on
    alone = np.diag(both)[:, None] - both
    kinds = np.stack([both, alone, alone.T, len(codes) - both - alone - alone.T])
    ones, others = np.nonzero(np.triu((kinds >= LEAST_PAIR_ROWS).all(0), 1))
    often = np.argsort(-both[ones, others], kind="stable")[:_PAIRS]
    error = length = 0.0
    for a, b in zip(ones[often], others[often], strict=True):
        kind = on[:, a] + 2 * on[:, b]
        neither, only_a, only_b, found = (codes[kind == i].mean(0) for i in range(4))
        missed = found - (only_a + only_b - neither)
        error += both[a, b] * (missed @ gram @ missed)
        length += both[a, b] * (found @ gram @ found)
    return float(1 - error / length) if length > 0 else None
