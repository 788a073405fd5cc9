"""Measures of a group's reconstructions: whether they are one feature, and whether a ring."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_sae.analysis.planes import (
    Plane,
    Points,
    measure_plane,
    separability,
    separability_p_value,
)
from dist_sae.analysis.reconstructed import Reconstructed
from dist_sae.analysis.shape import (
    composition,
    in_perspective,
    scaling,
    spectrum,
    strong,
    two_nn,
)

LEAST_ROWS = 300
"""Fewest rows on which a group must be active. At 300 rows, the histogram biases separability by
0.2 bits."""
RING_SCORE = 0.5
"""Least score of a ring. A circle with 5 % of noise in its radius scores 0.9 and with 10 % 0.6. Two
features that exclude each other score 0.5, independent ones 0."""
RING_SHARE = 0.75
"""Least share of a group's variance in the plane of a ring."""
RING_SURPLUS = 0.5
"""Least surplus of a ring, see `surplus`."""
RING_TOGETHER = 0.1
"""Least share of a ring's rows on which two or more of its latents are active. If only one latent
is active at a time, the group is separate points, not a ring."""
RING_SPREAD = 0.5
"""Largest spread of a ring's radii, standard deviation / mean. Rays of all lengths have 0.6.
Circles whose intensity varies by 25 % have 0.35 to 0.40 in dictionaries trained with TopK. With
BatchTopK, whose latents fire weakly on more rows, they have 0.41 to 0.49."""
RING_SPREAD_AHEAD = 0.2
"""Largest spread of a ring on one side of the origin, where intensity is divided out and only the
shape remains. Circles of five or more latents have at most 0.16 in simulations. Three features that
add up in pairs, with one or more latents each, fill the sides of a triangle and have 0.25 or
more."""
DEPENDENT = 0.1
"""Least separability, in bits, of points around the origin for their intensity to be divided out.
A ring whose intensity varies by 25 % has 0.2. Two independent coordinates always have less than
0.05, but their directions would be as separable as a ring."""
PERSPECTIVE = "perspective"
"""View of points on one side of the origin, whose intensity is divided out."""
_SECOND_ACTIVE = 0.2  # share of the largest activation from which a second latent counts as active
_LEAST_SPREAD = 1e-6  # below it, all points are on one line through the origin
_NULL_DRAWS = 39
_P = 0.05
_PLANES = 4
_LEAST_PLANE = 1e-3  # least share of the variance of a plane's second axis
_DRAWN_POINTS = 400


class Measured(NamedTuple):
    """Measures of a group's reconstructions. A measure is None if there is too little data."""

    group: int
    latents: list[int]
    rows: int
    """Number of rows used, without those on which the group is hardly active."""
    view: str
    """How intensity was removed from the points. "perspective": they are on one side of the origin.
    "directions": they are around it, in a plane of dependent coordinates. Else "as they are"."""
    strength: float
    """Largest product of a plane's score and surplus. Groups are ranked by it. The measures of a
    plane below are of this plane."""
    score: float
    separability: float
    """Separability of the plane, in bits."""
    mixture: float
    plane: int
    """First principal component of the plane, from 1. The next component is its other axis."""
    plane_share: float
    """Share of the variance in the plane."""
    surplus: float
    """Surplus of that share, see `surplus`."""
    leaders: float
    """Effective number of latents that lead: 1 / sum of squared shares of the rows on which each
    latent is the most active one."""
    spread: float
    """Standard deviation / mean of the distances from the center."""
    p_value: float | None
    """p-value of the separability against shuffled coordinates. None if the score is below 0.5."""
    participation: float
    """Effective number of principal components that share the variance."""
    two_nn: float | None
    """Intrinsic dimension of the directions."""
    together: float
    """Share of the rows on which two or more of the latents are active, the second with at least a
    fifth of the first's activation."""
    composition: float | None
    scaling: float | None

    @property
    def is_ring(self) -> bool:
        """Whether the group passes all limits of a ring: the constants `RING_...` above."""
        most = RING_SPREAD_AHEAD if self.view == PERSPECTIVE else RING_SPREAD
        return (
            self.score >= RING_SCORE
            and self.plane_share >= RING_SHARE
            and self.surplus >= RING_SURPLUS
            and self.together >= RING_TOGETHER
            and self.spread <= most
            and self.p_value is not None
            and self.p_value <= _P
        )


class Shape(NamedTuple):
    """A measured group, and some of its points in its best plane."""

    measured: Measured
    points: Points
    leading: NDArray[np.int64]
    """Position in `latents` of the most active latent at each point."""


def surplus(share: float, leaders: float, *, ahead: bool) -> float:
    """Return how much more variance a plane has than if the latents excluded each other.

    n equal, orthogonal latents that exclude each other are the corners of a simplex. Their best
    plane has 2 / n of the sum of squares about the origin, or 2 / (n - 1) of it about the mean. The
    result is 0 if the plane has at most that share, and 1 if it has all the variance. Three latents
    always lie in a plane, as a triangle.

    Args:
        share: The plane's share of the variance.
        leaders: Effective number of latents that lead.
        ahead: Whether the points are on one side of the origin, with the variance about their mean.
    """
    by_chance = 2 / max(2.0, leaders - ahead)
    return max(0.0, (share - by_chance) / (1 - by_chance)) if by_chance < 1 else 0.0


def measure(group: Reconstructed) -> Shape | None:
    """Measure a group; return None if it is active too rarely or only varies along one line."""
    points = group.points()
    rows = strong(points)
    points, codes = points[rows], group.codes[rows]
    if len(points) < LEAST_ROWS:
        return None
    view, seen, kept = _without_intensity(points)
    ahead = view == PERSPECTIVE
    if seen.std(0).max() < _LEAST_SPREAD * (1 if ahead else np.abs(seen).max()):
        return None
    components = spectrum(seen)
    leading = codes[kept].argmax(1)
    leads = np.bincount(leading) / len(leading)
    leaders = float(1 / (leads**2).sum())
    planes: list[tuple[Plane, float, float]] = []
    for first in range(min(_PLANES, len(components.shares) - 1)):
        share = float(components.shares[first : first + 2].sum())
        if components.shares[first + 1] < _LEAST_PLANE:
            break
        plane = measure_plane(components.coordinates[:, first : first + 2])
        planes.append((plane, share, surplus(share, leaders, ahead=ahead)))
    if not planes:
        return None
    best = max(range(len(planes)), key=lambda i: planes[i][0].score * planes[i][2])
    plane, share, more = planes[best]
    flat = components.coordinates[:, best : best + 2]
    radii = np.linalg.norm(flat if ahead else points, axis=1)
    p_value = None
    if plane.score >= RING_SCORE:
        p_value = separability_p_value(flat, _NULL_DRAWS, np.random.default_rng(group.group))
    two = np.sort(codes, axis=1)[:, -2:]
    measured = Measured(
        group=group.group,
        latents=group.latents.tolist(),
        rows=len(points),
        view=view,
        strength=plane.score * more,
        score=plane.score,
        separability=plane.separability,
        mixture=plane.mixture,
        plane=best + 1,
        plane_share=share,
        surplus=more,
        leaders=leaders,
        spread=float(radii.std() / radii.mean()),
        p_value=p_value,
        participation=components.participation,
        two_nn=two_nn(points),
        together=float((two[:, 0] >= _SECOND_ACTIVE * two[:, 1]).mean()),
        composition=composition(codes, group.gram),
        scaling=scaling(points),
    )
    return Shape(measured, flat[:_DRAWN_POINTS], leading[:_DRAWN_POINTS])


def _without_intensity(points: Points) -> tuple[str, Points, NDArray[np.bool_]]:
    """Remove intensity from points where possible.

    Returns:
        Name of the view (see `Measured.view`), new points, mask of the points that are kept.
    """
    if (found := in_perspective(points)) is not None:
        return PERSPECTIVE, *found
    every = np.ones(len(points), np.bool_)
    plane = spectrum(points).coordinates[:, :2]
    if plane.shape[1] > 1 and separability(plane) >= DEPENDENT:
        return "directions", points / np.linalg.norm(points, axis=1, keepdims=True), every
    return "as they are", points, every
