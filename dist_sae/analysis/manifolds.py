"""Multidimensional features: groups of latents that reconstruct a manifold, such as a ring.

A reconstruction of the method of Engels et al. 2024 (arXiv:2405.14860), see `planes`, with the
tests that Olah (2024) names for a multidimensional feature, see `shape`.
"""

import heapq
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist_sae.analysis.graph import find_groups, nearest_edges
from dist_sae.analysis.names import frequent_tokens
from dist_sae.analysis.opened import Indexed
from dist_sae.analysis.planes import Plane, Points, measure_plane, null_share
from dist_sae.analysis.reconstructed import Reconstructed, reconstruct
from dist_sae.analysis.shape import composition, scaling, spectrum, two_nn, without_intensity
from dist_sae.errors import ConfigError
from dist_sae.index.query import Index
from dist_sae.report.charts import Cloud, render_cloud
from dist_sae.report.outcome import Findings

LEAST_ROWS = 300
"""Least rows on which a group is active; the bias of a separability is 0.2 bits at 300 rows."""
RING_SCORE = 0.5
"""Least score of a ring. A circle has 0.9 with 5 % of noise in its radius and 0.6 with 10 %, two
features that exclude each other 0.5, independent ones 0."""
RING_SHARE = 0.75
"""Least share of a group's variance in the plane of a ring. Of n latents that exclude each other,
alike otherwise, a plane holds 2 / (n - 1)."""
RING_LEADERS = 5.0
"""Least effective number of latents that lead; three that exclude each other always lie in a
plane, as a triangle."""
RING_TOGETHER = 0.1
"""Least share of a ring's rows on which two or more of its latents are active. Latents that are
active one at a time are points, whatever is between them."""
RING_SPREAD = 0.35
"""Most spread of a ring's radii, standard deviation / mean. Rays of all lengths have 0.6, and a
filled disk has 0.35."""
_LEAST_SPREAD = 1e-6  # below it, all points are on one line through the origin
_NULL_DRAWS = 39
_P = 0.05
_PLANES = 4
_LEAST_PLANE = 1e-3  # share of the variance below which a plane is left out
_DRAWN, _DRAWN_POINTS = 5, 400
_NAMED = 8  # latents of a ring that are named


class Settings(NamedTuple):
    """Limits of the search."""

    cosine: float = 0.5
    """Least cosine of latents that are joined."""
    least_latents: int = 3
    most_latents: int = 100
    rows: int = 2000
    """Most rows of a group that are looked at."""


class Measured(NamedTuple):
    """Measures of a group's reconstructions. None: there is too little to measure it."""

    group: int
    latents: list[int]
    rows: int
    """Rows that were looked at."""
    in_perspective: bool
    """Whether the points are on one side of the origin, so that their intensity was divided out."""
    strength: float
    """The largest product of a plane's score and its share of the variance. Groups are ranked by
    it, and the measures that follow are of this plane."""
    score: float
    separability: float
    """In bits."""
    mixture: float
    plane: int
    """First principal component of the plane, from 1; the next is its other axis."""
    plane_share: float
    """Share of the variance."""
    leaders: float
    """1 / sum of squared shares of the rows on which each latent is the most active one."""
    spread: float
    """Standard deviation / mean of the distances from the centre."""
    p_value: float | None
    """Of the separability, against shuffled coordinates; only if the score is at least 0.5."""
    participation: float
    """Number of principal components among which the variance lies."""
    two_nn: float | None
    """Intrinsic dimension of the directions."""
    together: float
    """Share of the rows on which two or more of the latents are active."""
    composition: float | None
    scaling: float | None

    @property
    def is_ring(self) -> bool:
        """Whether it is a ring by all criteria."""
        return (
            self.score >= RING_SCORE
            and self.plane_share >= RING_SHARE
            and self.leaders >= RING_LEADERS
            and self.together >= RING_TOGETHER
            and self.spread <= RING_SPREAD
            and self.p_value is not None
            and self.p_value <= _P
        )


class Shape(NamedTuple):
    """A measured group, and some of its points in its best plane."""

    measured: Measured
    points: Points
    leading: NDArray[np.int64]
    """Place in `latents` of the latent that is most active at each point."""


def find_manifolds(indexed: Indexed, settings: Settings) -> Findings:
    """Search an index for multidimensional features.

    Args:
        indexed: Its index has nearest latents and postings.
        settings: What is searched for.

    Raises:
        ConfigError: The index has no nearest latents, no postings, or too few rows.
    """
    index, decoder, name = indexed
    index.check_postings()
    edges = nearest_edges(index, settings.cosine)
    if index.rows < LEAST_ROWS:
        raise ConfigError(
            f"{index.place}: has {index.rows:,} rows, and a group needs {LEAST_ROWS} on which it "
            f"fires; index more (index.rows)"
        )
    groups = find_groups(edges, index.n_latents, settings.least_latents, settings.most_latents)
    found, rings, rare, flat = list[Measured](), list[tuple[float, int, Shape]](), 0, 0
    spooled = list[int]()
    for group in reconstruct(index, decoder, groups, settings.rows, spooled):
        if len(group.codes) < LEAST_ROWS:
            rare += 1
        elif (shape := measure(group)) is None:
            flat += 1
        else:
            found.append(shape.measured)
            if shape.measured.is_ring:
                rings.append((shape.measured.strength, -group.group, shape))
                rings = heapq.nlargest(_DRAWN, rings)
    found.sort(key=lambda each: (-each.strength, each.group))
    tokens, _ = frequent_tokens(index, 1)
    names = {latent: name(tokens[latent]) for each in found for latent in each.latents}
    labels = {latent: texts[0] if texts else "" for latent, texts in names.items()}
    shapes = [shape for *_, shape in rings]
    in_groups = int((groups.of >= 0).sum())
    n_rings = sum(each.is_ring for each in found)
    numbers = {
        "latents": index.n_latents,
        "rows": index.rows,
        "groups": len(groups.sizes),
        "latents_in_groups": in_groups,
        "latents_in_too_large_groups": groups.too_many,
        "measured": len(found),
        "rare": rare,
        "one_dimensional": flat,
        "rings": n_rings,
        "best_strength": found[0].strength if found else None,
        "best_rings": [_as_json(shape.measured, labels) for shape in shapes],
        "spooled_bytes": spooled[0],
    }
    return Findings(
        numbers=numbers,
        summary=list(_summary(numbers, settings, shapes, labels)),
        caveats=list(_caveats(numbers, index)),
        tables={"groups": _table(found, labels)},
        figures=[_drawn(shape, labels) for shape in shapes],
    )


def measure(group: Reconstructed) -> Shape | None:
    """Measure a group; None if only one principal component of its points has variance."""
    points = group.points()
    seen, ahead = without_intensity(points)
    if seen.std(0).max() < _LEAST_SPREAD * (1 if ahead is not None else np.abs(points).max()):
        return None
    components = spectrum(seen)
    planes: list[tuple[Plane, float]] = []
    for first in range(min(_PLANES, len(components.shares) - 1)):
        share = float(components.shares[first : first + 2].sum())
        if components.shares[first + 1] < _LEAST_PLANE:
            break
        planes.append((measure_plane(components.coordinates[:, first : first + 2]), share))
    if not planes:
        return None
    best = max(range(len(planes)), key=lambda i: planes[i][0].score * planes[i][1])
    plane, share = planes[best]
    flat = components.coordinates[:, best : best + 2]
    radii = np.linalg.norm(flat, axis=1)
    leading = (group.codes if ahead is None else group.codes[ahead]).argmax(1)
    leads = np.bincount(leading) / len(leading)
    p_value = None
    if plane.score >= RING_SCORE:
        p_value = null_share(flat, _NULL_DRAWS, np.random.default_rng(group.group))
    measured = Measured(
        group=group.group,
        latents=group.latents.tolist(),
        rows=len(points),
        in_perspective=ahead is not None,
        strength=plane.score * share,
        score=plane.score,
        separability=plane.separability,
        mixture=plane.mixture,
        plane=best + 1,
        plane_share=share,
        leaders=float(1 / (leads**2).sum()),
        spread=float(radii.std() / radii.mean()),
        p_value=p_value,
        participation=components.participation,
        two_nn=two_nn(points),
        together=float(((group.codes > 0).sum(1) > 1).mean()),
        composition=composition(group.codes, group.gram),
        scaling=scaling(points),
    )
    return Shape(measured, flat[:_DRAWN_POINTS], leading[:_DRAWN_POINTS])


def _summary(
    numbers: Mapping[str, Any],
    settings: Settings,
    rings: list[Shape],
    labels: Mapping[int, str],
) -> Iterator[str]:
    yield (
        f"{numbers['groups']:,} groups of {settings.least_latents} to {settings.most_latents} "
        f"latents are near each other (cosine of at least {settings.cosine:g}, each among the "
        f"other's nearest): {numbers['latents_in_groups']:,} of {numbers['latents']:,} latents. "
        f"{numbers['measured']:,} of the groups fire on enough rows to be measured."
    )
    if not rings:
        best = numbers["best_strength"]
        score = f"; the best strength is {best:.2f}" if best is not None else ""
        yield f"None of them is a ring: nothing multidimensional was found{score}."
        return
    yield f"{numbers['rings']:,} of them are rings by all criteria; the best:"
    for shape in rings:
        each = shape.measured
        members = ", ".join(f'{n} "{labels[n]}"' for n in each.latents[:_NAMED])
        more = f" and {len(each.latents) - _NAMED} more" if len(each.latents) > _NAMED else ""
        yield (
            f"score {each.score:.2f} in components {each.plane} and {each.plane + 1} "
            f"({each.plane_share:.0%} of the variance), {each.rows:,} rows, two or more latents "
            f"together on {each.together:.0%}: {members}{more}"
        )


def _caveats(numbers: Mapping[str, Any], index: Index) -> Iterator[str]:
    if rare := numbers["rare"]:
        yield f"{rare:,} groups are active on fewer than {LEAST_ROWS} rows and were left out."
    if flat := numbers["one_dimensional"]:
        yield f"{flat:,} groups vary along one line, intensity aside; they are not in the table."
    if many := numbers["latents_in_too_large_groups"]:
        yield f"{many:,} latents were left out; their groups stay too large at any cosine."
    if index.manifest.postings_share < 1:
        share = index.manifest.postings_share
        yield f"The index keeps the activations of {share:.1%} of its rows; only these were seen."
    if not numbers["rings"]:
        yield (
            "This is no evidence that there are none: a ring that the dictionary covers with few "
            "latents, far apart, is not among the groups."
        )
    yield (
        "Points on a circle that have a latent each, such as days of the week, are not counted as "
        "a ring; in the table they have a high strength, and are seldom active together."
    )


def _as_json(measured: Measured, labels: Mapping[int, str]) -> dict[str, Any]:
    content = {k: round(v, 4) if isinstance(v, float) else v for k, v in measured._asdict().items()}
    return {**content, "tokens": [labels[latent] for latent in measured.latents]}


def _table(found: list[Measured], labels: Mapping[int, str]) -> pa.Table:
    """The measures, a line for each group, the best first."""
    columns = {name: [getattr(each, name) for each in found] for name in Measured._fields}
    types = {
        "group": pa.int32(),
        "rows": pa.int32(),
        "plane": pa.int8(),
        "in_perspective": pa.bool_(),
    }
    types["latents"] = pa.list_(pa.int32())
    arrays = {name: pa.array(c, types.get(name, pa.float64())) for name, c in columns.items()}
    tokens = [[labels[latent] for latent in each.latents] for each in found]
    arrays["tokens"] = pa.array(tokens, pa.list_(pa.string()))
    arrays["is_ring"] = pa.array([each.is_ring for each in found], pa.bool_())
    return pa.table(arrays)


def _drawn(shape: Shape, labels: Mapping[int, str]) -> str:
    """A ring's points, coloured by the latent that is most active."""
    each = shape.measured
    clouds = []
    for place in np.unique(shape.leading).tolist():
        x, y = shape.points[shape.leading == place].T.tolist()
        latent = each.latents[place]
        clouds.append(Cloud(f'latent {latent} "{labels[latent]}"', x, y))
    tokens = dict.fromkeys(labels[latent].strip() for latent in each.latents)
    title = f"Ring of {len(each.latents)} latents: {', '.join(list(tokens)[:6])}"
    plane = f"principal components {each.plane} and {each.plane + 1}"
    return render_cloud(title, clouds, x_label=plane)
