"""Measures of a group's reconstructions: whether they are one feature, and whether it is a ring."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_sae.analysis.planes import Plane, Points, measure_plane, null_share, separability
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
"""Least rows on which a group is active; the bias of a separability is 0.2 bits at 300 rows."""
RING_SCORE = 0.5
"""Least score of a ring. A circle has 0.9 with 5 % of noise in its radius and 0.6 with 10 %, two
features that exclude each other 0.5, independent ones 0."""
RING_SHARE = 0.75
"""Least share of a group's variance in the plane of a ring."""
RING_SURPLUS = 0.5
"""Least surplus of that share, see `surplus`."""
RING_TOGETHER = 0.1
"""Least share of a ring's rows on which two or more of its latents are active. Latents that are
active one at a time are points, whatever is between them."""
RING_SPREAD = 0.5
"""Most spread of a ring's radii, standard deviation / mean. Rays of all lengths have 0.6. Circles
whose intensity varies by 25 % have 0.35 to 0.40 in dictionaries that were trained with TopK, and
0.41 to 0.49 with BatchTopK, whose latents fire weakly on more rows."""
RING_SPREAD_AHEAD = 0.2
"""Most spread of a ring before the origin, where intensity is divided out and only the shape is
left. Circles of five or more latents have 0.16 at most in simulations. Three features that add up
in pairs, with one or more latents each, fill the sides of a triangle and have 0.25 or more."""
DEPENDENT = 0.1
"""Least separability, in bits, of points around the origin whose intensity is divided out. A ring
whose intensity varies by 25 % has 0.2; two independent coordinates have less than 0.05, whatever
they are, but in directions would be as separable as a ring."""
PERSPECTIVE = "perspective"
"""The view of points on one side of the origin, whose intensity is divided out."""
_BESIDE = 0.2  # of the largest activation, from which another latent is active together with it
_LEAST_SPREAD = 1e-6  # below it, all points are on one line through the origin
_NULL_DRAWS = 39
_P = 0.05
_PLANES = 4
_LEAST_PLANE = 1e-3  # share of the variance below which a plane is left out
_DRAWN_POINTS = 400


class Measured(NamedTuple):
    """Measures of a group's reconstructions. None: there is too little to measure it."""

    group: int
    latents: list[int]
    rows: int
    """Rows that were looked at, those on which the group is hardly active left out."""
    view: str
    """How the points are seen: in "perspective" if they lie on one side of the origin, as
    "directions" if they lie around it in a plane of dependent coordinates, else "as they are"."""
    strength: float
    """The largest product of a plane's score and surplus. Groups are ranked by it, and the measures
    that follow are of this plane."""
    score: float
    separability: float
    """In bits."""
    mixture: float
    plane: int
    """First principal component of the plane, from 1; the next is its other axis."""
    plane_share: float
    """Share of the variance."""
    surplus: float
    """See `surplus`."""
    leaders: float
    """1 / sum of squared shares of the rows on which each latent is the most active one."""
    spread: float
    """Standard deviation / mean of the distances from the centre."""
    p_value: float | None
    """p-value of the separability against shuffled coordinates; None if the score is below 0.5."""
    participation: float
    """Number of principal components among which the variance lies."""
    two_nn: float | None
    """Intrinsic dimension of the directions."""
    together: float
    """Share of the rows on which two or more of the latents are active, the second with at least a
    fifth of the first's activation."""
    composition: float | None
    scaling: float | None

    @property
    def is_ring(self) -> bool:
        """Whether the group passes all limits of a ring, the constants `RING_...` above."""
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
    """Place in `latents` of the latent that is most active at each point."""


def surplus(share: float, leaders: float, *, ahead: bool) -> float:
    """How much more of the variance a plane has than it would if the latents excluded each other.

    n such latents, at right angles and alike otherwise, are the corners of a simplex, and the best
    plane has 2 / n of what they are about the origin, 2 / (n - 1) of it about their mean. 0 is as
    much as that or less, 1 is all. Three latents always lie in a plane, as a triangle.

    Args:
        share: The plane's share of the variance.
        leaders: Effective number of latents that lead.
        ahead: Whether the variance is about a mean before the origin.
    """
    by_chance = 2 / max(2.0, leaders - ahead)
    return max(0.0, (share - by_chance) / (1 - by_chance)) if by_chance < 1 else 0.0


def measure(group: Reconstructed) -> Shape | None:
    """Measure a group; None if it is too seldom active, or only varies along one line."""
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
        p_value = null_share(flat, _NULL_DRAWS, np.random.default_rng(group.group))
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
        together=float((two[:, 0] >= _BESIDE * two[:, 1]).mean()),
        composition=composition(codes, group.gram),
        scaling=scaling(points),
    )
    return Shape(measured, flat[:_DRAWN_POINTS], leading[:_DRAWN_POINTS])


def _without_intensity(points: Points) -> tuple[str, Points, NDArray[np.bool_]]:
    """Remove intensity from points where they allow it: how, the new points, which they are."""
    if (found := in_perspective(points)) is not None:
        return PERSPECTIVE, *found
    every = np.ones(len(points), np.bool_)
    plane = spectrum(points).coordinates[:, :2]
    if plane.shape[1] > 1 and separability(plane) >= DEPENDENT:
        return "directions", points / np.linalg.norm(points, axis=1, keepdims=True), every
    return "as they are", points, every
