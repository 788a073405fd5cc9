"""Multidimensional features: groups of latents that reconstruct a manifold, such as a ring.

This reconstructs the method of Engels et al. 2024 (arXiv:2405.14860), see `planes`, with the tests
for a multidimensional feature that Olah (2024) lists, see `shape`.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from dist_sae.analysis.coplanar import coplanar_groups
from dist_sae.analysis.graph import find_groups, merge_groups, nearest_edges
from dist_sae.analysis.indexed_run import IndexedDictionary
from dist_sae.analysis.links import coactive_pairs
from dist_sae.analysis.measure import LEAST_ROWS, PERSPECTIVE, Measured, Shape, measure
from dist_sae.analysis.names import frequent_tokens
from dist_sae.analysis.reconstructed import reconstruct
from dist_sae.errors import ConfigError
from dist_sae.index.query import Index
from dist_sae.report.charts import Cloud, render_cloud
from dist_sae.report.outcome import Findings

COACTIVE_COSINE = 0.3
"""Least cosine of latents that are joined if they are also coactive."""
_DRAWN = 5
_KEPT = 50  # best rings whose points stay in memory until repeated groups are removed
_NAMED = 8  # most latents of a ring that are named
_REPEATED = 0.5  # share of a group's latents in one better group, above which it is left out


class Settings(NamedTuple):
    """Limits of the search."""

    cosine: float = 0.5
    """Least cosine of latents that are joined."""
    least_latents: int = 3
    most_latents: int = 100
    rows: int = 2000
    """Most rows of a group that are used."""


def find_manifolds(dictionary: IndexedDictionary, settings: Settings) -> Findings:
    """Search an index for multidimensional features.

    Args:
        dictionary: Dictionary whose index has nearest latents, coactive pairs and postings.
        settings: Limits of the search.

    Raises:
        ConfigError: The index has no nearest latents, no coactive pairs, no postings, or too few
            rows.
    """
    index, decoder = dictionary.index, dictionary.decoder
    index.check_postings()
    near = nearest_edges(index, min(settings.cosine, COACTIVE_COSINE))
    if index.rows < LEAST_ROWS:
        raise ConfigError(
            f"{index.place}: has {index.rows:,} rows, but a group must fire on {LEAST_ROWS}; "
            f"index more (index.rows)"
        )
    n, sizes = index.n_latents, (settings.least_latents, settings.most_latents)
    firings = np.concatenate([table["density"].to_numpy() for table in index.latents(["density"])])
    pairs = coactive_pairs(index, firings * index.pair_rows)
    groups = merge_groups(
        [
            find_groups(near.where(near.weight >= settings.cosine), n, *sizes),
            find_groups(near.where(pairs.among(near, n)), n, *sizes),
            coplanar_groups(decoder, pairs, *sizes),
        ]
    )
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
                rings = heapq.nlargest(_KEPT, rings)
    n_measured = len(found)
    found = _without_repeats(sorted(found, key=lambda each: (-each.strength, each.group)))
    tokens, _ = frequent_tokens(index, 1)
    names = {
        latent: dictionary.name_tokens(tokens[latent]) for each in found for latent in each.latents
    }
    labels = {latent: texts[0] if texts else "" for latent, texts in names.items()}
    kept = {each.group for each in found}
    shapes = [shape for *_, shape in rings if shape.measured.group in kept][:_DRAWN]
    in_groups = len(np.unique(groups.latents))
    are_rings = [each for each in found if each.is_ring]
    numbers = {
        "latents": index.n_latents,
        "rows": index.rows,
        "groups": len(groups.sizes),
        "latents_in_groups": in_groups,
        "latents_in_too_large_groups": groups.n_left_out,
        "measured": n_measured,
        "repeated": n_measured - len(found),
        "rare": rare,
        "one_dimensional": flat,
        "rings": len(are_rings),
        "rings_before_the_origin": sum(each.view == PERSPECTIVE for each in are_rings),
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


def _without_repeats(found: list[Measured]) -> list[Measured]:
    """Return the groups without those that share more than half of their latents with a better one.

    Args:
        found: Groups, the best first.
    """
    kept = list[Measured]()
    groups_of = defaultdict[int, list[int]](list)
    for each in found:
        shared = Counter(group for latent in each.latents for group in groups_of[latent])
        if max(shared.values(), default=0) <= _REPEATED * len(each.latents):
            kept.append(each)
            for latent in each.latents:
                groups_of[latent].append(each.group)
    return kept


def _summary(
    numbers: Mapping[str, Any],
    settings: Settings,
    rings: list[Shape],
    labels: Mapping[int, str],
) -> Iterator[str]:
    yield (
        f"{numbers['groups']:,} groups of {settings.least_latents} to {settings.most_latents} "
        f"latents are near each other (cosine of at least {settings.cosine:g}, or of "
        f"{COACTIVE_COSINE:g} if they are coactive) or are coactive in a plane: "
        f"{numbers['latents_in_groups']:,} of {numbers['latents']:,} latents. "
        f"{numbers['measured']:,} of the groups are strong on enough rows to be measured."
    )
    if not rings:
        best = numbers["best_strength"]
        score = f"; the best strength is {best:.2f}" if best is not None else ""
        yield f"Nothing found: none of them is a ring{score}."
        return
    yield f"{numbers['rings']:,} of them are rings by all criteria; the best:"
    for shape in rings:
        each = shape.measured
        members = ", ".join(f'{n} "{labels[n]}"' for n in each.latents[:_NAMED])
        where = ", on one side of the origin" if each.view == PERSPECTIVE else ""
        more = f" and {len(each.latents) - _NAMED} more" if len(each.latents) > _NAMED else ""
        yield (
            f"score {each.score:.2f} in components {each.plane} and {each.plane + 1} "
            f"({each.plane_share:.0%} of the variance), {each.rows:,} rows, two or more latents "
            f"together on {each.together:.0%}{where}: {members}{more}"
        )


def _caveats(numbers: Mapping[str, Any], index: Index) -> Iterator[str]:
    if rare := numbers["rare"]:
        yield f"{rare:,} groups are active on fewer than {LEAST_ROWS} rows and were left out."
    if flat := numbers["one_dimensional"]:
        yield (
            f"{flat:,} groups vary along one line, intensity aside, or are strong on fewer than "
            f"{LEAST_ROWS} rows; they are not in the table."
        )
    if many := numbers["latents_in_too_large_groups"]:
        yield f"{many:,} latents were left out because their groups are too large at any cosine."
    if index.manifest.postings_share < 1:
        share = index.manifest.postings_share
        yield f"The index stores activations of {share:.1%} of its rows; only these were used."
    if before := numbers["rings_before_the_origin"]:
        yield (
            f"{before:,} of the rings lie on one side of the origin, where features that add up in "
            "pairs look similar. The limit that distinguishes them was set on simulations: check "
            "in the figure whether the latents have an order, as numbers do."
        )
    if not numbers["rings"]:
        yield (
            "This is not evidence that there are none: a ring with only one or two latents is not "
            "among the groups, and a ring on one side of the origin needs five or more."
        )
    yield (
        "Points on a circle with one latent each, such as days of the week, are not counted as a "
        "ring; in the table they have a high strength and are rarely active together."
    )


def _as_json(measured: Measured, labels: Mapping[int, str]) -> dict[str, Any]:
    content = {k: round(v, 4) if isinstance(v, float) else v for k, v in measured._asdict().items()}
    return {**content, "tokens": [labels[latent] for latent in measured.latents]}


def _table(found: list[Measured], labels: Mapping[int, str]) -> pa.Table:
    """Return a table of the measures, with a row for each group, the best first."""
    columns = {name: [getattr(each, name) for each in found] for name in Measured._fields}
    types = {
        "group": pa.int32(),
        "rows": pa.int32(),
        "plane": pa.int8(),
        "view": pa.string(),
    }
    types["latents"] = pa.list_(pa.int32())
    arrays = {name: pa.array(c, types.get(name, pa.float64())) for name, c in columns.items()}
    tokens = [[labels[latent] for latent in each.latents] for each in found]
    arrays["tokens"] = pa.array(tokens, pa.list_(pa.string()))
    arrays["is_ring"] = pa.array([each.is_ring for each in found], pa.bool_())
    return pa.table(arrays)


def _drawn(shape: Shape, labels: Mapping[int, str]) -> str:
    """Draw a ring's points, colored by the most active latent."""
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
