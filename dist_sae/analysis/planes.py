"""Tests of whether points in a plane are one two-dimensional feature: separability and mixture.

They follow Engels et al. 2024 (arXiv:2405.14860), with three changes. The histogram's bias is
subtracted from the separability. The mixture index is the maximum over a grid of all lines, so it
is somewhat higher than what one gradient descent finds. A null with shuffled coordinates gives a
p-value.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BINS = 10
"""Bins of the histogram along each axis."""
EPSILON = 0.1
"""Half width of the line that the mixture index counts points on, relative to the root mean square
of the distances from the line."""
MIXTURE_POINTS = 1000
"""Most points that the mixture index is computed from."""
_ANGLES = np.linspace(0, np.pi / 2, 25, endpoint=False)  # a quarter turn only swaps the axes
_DIRECTIONS = np.linspace(0, np.pi, 90, endpoint=False)
_OFFSETS = 200

Points = NDArray[np.float64]
"""Points of a plane, [n, 2]."""


class Plane(NamedTuple):
    """Measures of points in a plane."""

    separability: float
    """Separability in bits: about 1.2 for a circle, 0 for independent coordinates."""
    mixture: float
    """Largest share of the points that lie on one line."""

    @property
    def score(self) -> float:
        """(1 - mixture) x separability. High if points are neither two features nor on a line."""
        return (1 - self.mixture) * self.separability


def measure_plane(points: Points) -> Plane:
    """Measure points, of which at least two differ."""
    return Plane(separability(points), mixture(points[:MIXTURE_POINTS]))


def separability(points: Points) -> float:
    """Return the least mutual information of the coordinates over all rotations, in bits.

    It is estimated with a histogram, whose bias (bins - 1)^2 / (2 n ln 2) is subtracted. Negative
    results become zero.
    """
    cells = np.arange(len(_ANGLES))[:, None] * BINS**2
    c, s = np.cos(_ANGLES)[:, None], np.sin(_ANGLES)[:, None]
    x, y = points.T
    for values, stride in ((c * x - s * y, BINS), (s * x + c * y, 1)):
        low, high = values.min(1, keepdims=True), values.max(1, keepdims=True)
        steps = (values - low) * (BINS / np.maximum(high - low, np.finfo(float).tiny))
        cells = cells + stride * np.minimum(steps.astype(np.int64), BINS - 1)
    counts = np.bincount(cells.ravel(), minlength=len(_ANGLES) * BINS**2)
    joint = counts.reshape(len(_ANGLES), BINS, BINS) / len(points)
    apart = joint.sum(2, keepdims=True) * joint.sum(1, keepdims=True)
    ratio = np.divide(joint, apart, out=np.ones_like(joint), where=joint > 0)
    bits = float((joint * np.log2(ratio)).sum((1, 2)).min())
    bias = (BINS - 1) ** 2 / (2 * len(points) * math.log(2))
    return max(0.0, bits - bias)


def mixture(points: Points) -> float:
    """Return the largest share of points y with |z| <= epsilon x rms(z), over lines z = a . y + b.

    If the points mix two features that never fire together, half of them are on a line.
    """
    heights = np.cos(_DIRECTIONS)[:, None] * points[:, 0]
    heights = np.sort(heights + np.sin(_DIRECTIONS)[:, None] * points[:, 1], axis=1)
    mean, variance = heights.mean(1, keepdims=True), heights.var(1, keepdims=True)
    offsets = heights[:, np.linspace(0, len(points) - 1, _OFFSETS).astype(np.int64)]
    reach = EPSILON * np.sqrt(variance + (mean - offsets) ** 2)
    most = 0
    for line, low, high in zip(heights, offsets - reach, offsets + reach, strict=True):
        counts = np.searchsorted(line, high, side="right") - np.searchsorted(line, low)
        most = max(most, int(counts.max()))
    return most / len(points)


def separability_p_value(points: Points, draws: int, generator: np.random.Generator) -> float:
    """Return the p-value of the separability against points with shuffled coordinates.

    The points themselves count as one draw that reaches it.

    Args:
        points: Points to test.
        draws: Number of draws with shuffled coordinates.
        generator: Random generator of the draws.
    """
    reached, observed = 1, separability(points)
    for _ in range(draws):
        shuffled = np.stack([points[:, 0], generator.permutation(points[:, 1])], axis=1)
        reached += separability(shuffled) >= observed
    return reached / (draws + 1)
