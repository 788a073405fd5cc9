"""The map of a dictionary: clusters of latents, parents and children, and positions in a plane."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist_sae.analysis.communities import STABLE, Level, find_level, resolutions
from dist_sae.analysis.inclusion import Absorbed, Parents, find_absorbed, find_parents
from dist_sae.analysis.indexed_run import IndexedDictionary
from dist_sae.analysis.links import GraphBuilder, chance_cosine, find_links
from dist_sae.analysis.names import distinct, frequent_tokens
from dist_sae.analysis.positions import Places, place
from dist_sae.errors import ConfigError
from dist_sae.index.coactive import MOST_PAIRS
from dist_sae.report.charts import Cloud, render_cloud
from dist_sae.report.map_page import Label, MapPage, render_map
from dist_sae.report.outcome import Findings

LEAST_ROWS = 1000
"""Fewest rows on which coactive latents must have been counted."""
_LATENT_TOKENS, _CLUSTER_TOKENS = 3, 5
_DRAWN = 4000  # latents in the report's figure; the page shows all
_LABELS = 2000  # most cluster labels of a level on the page; the largest clusters have them


class Settings(NamedTuple):
    """Settings of the map."""

    resamples: int = 10
    """Number of resamples from which the stability of clusters is computed."""
    seed: int = 0


class _Named(NamedTuple):
    """Tokens of latents and clusters, as text."""

    latents: pa.ListArray
    clusters: list[list[list[str]]]
    """Tokens of each cluster, by level."""


def make_map(run: str, dictionary: IndexedDictionary, settings: Settings) -> Findings:
    """Compute the map of a dictionary.

    Args:
        run: Name of the run, for the page.
        dictionary: Dictionary whose index has nearest latents and coactive pairs.
        settings: Settings of the map.

    Raises:
        ConfigError: The index has no nearest latents, no coactive pairs, or too few rows; or
            scikit-network is not installed.
    """
    index = dictionary.index
    n, chance = index.n_latents, chance_cosine(index.n_latents, dictionary.decoder.d_out)
    index.bucket_pairs(0)  # raises if there are no pairs, before the check of their rows
    if index.pair_rows < LEAST_ROWS:
        raise ConfigError(
            f"{index.place}: counts coactive latents on {index.pair_rows:,} rows, but a map needs "
            f"{LEAST_ROWS:,}; index more (index.rows, index.pairs)"
        )
    density = np.concatenate([table["density"].to_numpy() for table in index.latents(["density"])])
    firings = density * index.pair_rows
    builder, spooled = GraphBuilder(n), list[int]()
    near = coactive = 0
    found_parents, found_absorbed = list[Parents](), list[Absorbed]()
    for links in find_links(index, chance, firings, spooled):
        builder.add(links)
        near += int((links.cosine > 0).sum())
        coactive += int((links.rows > 0).sum())
        found_parents.append(find_parents(links, firings))
        found_absorbed.append(find_absorbed(links, firings, index.pair_rows, MOST_PAIRS))
    parents = Parents(*map(np.concatenate, zip(*found_parents, strict=True)))
    absorbed = Absorbed(*map(np.concatenate, zip(*found_absorbed, strict=True)))
    graph = builder.graph()
    n_linked = len(graph.nodes)
    levels = [
        find_level(graph, resolution, settings.resamples, settings.seed)
        for resolution in resolutions(n_linked)
    ]
    places = place(graph, [level.cluster_of for level in levels], settings.seed)
    tokens, _ = frequent_tokens(index, _LATENT_TOKENS)
    present = np.unique(tokens[tokens >= 0])
    texts = dict(zip(present.tolist(), dictionary.name_tokens(present), strict=True))
    named = _Named(
        _lists(tokens, texts),
        [[dictionary.name_tokens(t) for t in _cluster_tokens(level, tokens)] for level in levels],
    )
    numbers = {
        "latents": n,
        "never_fire": int((density == 0).sum()),
        "pair_rows": index.pair_rows,
        "least_cosine": chance,
        "near_edges": near // 2,  # each edge is listed at both ends
        "coactive_pairs": coactive,
        "linked": n_linked,
        "levels": [_level_numbers(level) for level in levels],
        "children": len(parents.child),
        "parents": len(np.unique(parents.parent)),
        "absorbed": len(absorbed.latent),
        "spooled_bytes": spooled[0],
    }
    page = MapPage(
        title=f"Map of {n:,} latents: {run}",
        places=places,
        colour=levels[0].cluster_of,
        density=density,
        parent=_parent_of(n, parents),
        tokens=tokens,
        token_texts=texts,
        labels=[_labels(level, places, named.clusters[i]) for i, level in enumerate(levels)],
    )
    return Findings(
        numbers=numbers,
        summary=list(_summary(numbers, named, levels)),
        caveats=list(_caveats(numbers, index.pair_rows)),
        tables={
            "latents": _latents_table(places, levels, named, parents, n),
            "clusters": _clusters_table(levels, named, density, places),
            "absorbed": _absorbed_table(absorbed, named),
        },
        figures=[_drawn(places, levels[0], named.clusters[0], n_linked)],
        pages={"map": render_map(page)},
    )


def _cluster_tokens(level: Level, tokens: NDArray[np.int32]) -> list[list[int]]:
    """Find the tokens that are more frequent in each cluster than in all clusters.

    They are ranked by (latents with the token) x ln (its share in the cluster / its share in all).
    """
    here = (level.cluster_of >= 0)[:, None] & (tokens >= 0)
    clusters = np.broadcast_to(level.cluster_of[:, None], tokens.shape)[here].astype(np.int64)
    found, overall = np.unique(tokens[here], return_inverse=True)
    keys, counts = np.unique(clusters * max(1, len(found)) + overall, return_counts=True)
    of, token = keys // max(1, len(found)), keys % max(1, len(found))
    total = np.bincount(overall)
    share = counts / np.bincount(clusters)[of] if len(of) else np.zeros(0)
    rank = counts * np.log(share / (total[token] / len(overall))) if len(of) else np.zeros(0)
    order = np.lexsort((token, -rank, of))
    names: list[list[int]] = [[] for _ in level.sizes]
    for cluster, number in zip(of[order].tolist(), found[token[order]].tolist(), strict=True):
        if len(names[cluster]) < _CLUSTER_TOKENS:
            names[cluster].append(number)
    return names


def _level_numbers(level: Level) -> dict[str, Any]:
    stable = np.nan_to_num(level.stability) >= STABLE
    seen = level.stability[np.isfinite(level.stability)]
    return {
        "resolution": level.resolution,
        "clusters": len(level.sizes),
        "latents": int(level.sizes.sum()),
        "largest": int(level.sizes.max(initial=0)),
        "stable_clusters": int(stable.sum()),
        "latents_in_stable": int(level.sizes[stable].sum()),
        "median_stability": float(np.median(seen)) if len(seen) else None,
    }


def _summary(numbers: Mapping[str, Any], named: _Named, levels: Sequence[Level]) -> Iterator[str]:
    n = numbers["latents"]
    yield (
        f"{numbers['linked']:,} of {n:,} latents are linked: {numbers['near_edges']:,} pairs are "
        f"nearer than random directions (cosine {numbers['least_cosine']:.2f}), and "
        f"{numbers['coactive_pairs']:,} ordered pairs fire together more often than by chance."
    )
    stable = [each["latents_in_stable"] for each in numbers["levels"]]
    if max(stable) < 0.05 * n:
        yield (
            f"Nothing found: fewer than 5 % of the latents are in a stable cluster (Jaccard index "
            f"of at least {STABLE}) at any resolution."
        )
    for each, level, names in zip(numbers["levels"], levels, named.clusters, strict=True):
        if each["clusters"]:
            first = "; ".join(
                f"{', '.join(map(repr, words[:3]))} ({size:,}, {value:.2f})"
                for words, size, value in zip(names[:3], level.sizes, level.stability, strict=False)
            )
            yield (
                f"Resolution {each['resolution']:.3g}: {each['clusters']:,} clusters with "
                f"{each['latents']:,} latents, {each['stable_clusters']:,} of them stable, median "
                f"Jaccard index {each['median_stability'] or 0:.2f}. The largest (latents, Jaccard "
                f"index): {first}."
            )
    yield (
        f"{numbers['children']:,} latents have a parent (one of {numbers['parents']:,}) that fires "
        f"on at least 90 % of their rows; {numbers['absorbed']:,} pairs may be absorption. "
        f"The map is map.html, next to this page."
    )


def _caveats(numbers: Mapping[str, Any], pair_rows: int) -> Iterator[str]:
    yield (
        f"Common rows were counted on {pair_rows:,} rows, and for each latent only the "
        f"{MOST_PAIRS} most coactive ones are stored, so some parents may be missing."
    )
    yield "On the map, linked latents are close; large distances and empty space mean nothing."
    if alone := numbers["latents"] - numbers["linked"]:
        never = numbers["never_fire"]
        yield (
            f"{alone:,} latents have no link, {never:,} of them because they never fire; they "
            f"form the outer ring of the map."
        )


def _parent_of(n: int, parents: Parents) -> NDArray[np.int32]:
    of = np.full(n, -1, np.int32)
    of[parents.child] = parents.parent
    return of


def _lists(tokens: NDArray[np.int32], texts: Mapping[int, str]) -> pa.ListArray:
    """Return the texts of each latent's tokens. Negative tokens are padding."""
    numbers = sorted(texts)
    kept = tokens >= 0
    places = pa.array(np.searchsorted(numbers, tokens[kept]))
    flat = pa.array([texts[number] for number in numbers], pa.string()).take(places)
    return pa.ListArray.from_arrays(
        np.concatenate([[0], kept.sum(1).cumsum()]).astype(np.int32), flat
    )


def _labels(level: Level, places: Places, names: Sequence[Sequence[str]]) -> list[Label]:
    """Return labels for the largest clusters, at the median place of their latents."""
    n = min(_LABELS, len(level.sizes))
    middles = _middles(level, places)
    return [
        Label(
            ", ".join(distinct(names[i])[:3]),
            float(middles[i, 0]),
            float(middles[i, 1]),
            int(level.sizes[i]),
            float(level.stability[i]),
        )
        for i in range(n)
    ]


def _middles(level: Level, places: Places) -> Places:
    """Return the median place of each cluster."""
    order = np.argsort(level.cluster_of, kind="stable")[np.count_nonzero(level.cluster_of < 0) :]
    parts = np.split(places[order], level.sizes.cumsum()[:-1]) if len(level.sizes) else []
    return np.array([np.median(part, axis=0) for part in parts], np.float32).reshape(-1, 2)


def _latents_table(
    places: Places, levels: Sequence[Level], named: _Named, parents: Parents, n: int
) -> pa.Table:
    parent = _parent_of(n, parents)
    inclusion = np.full(n, np.nan)
    inclusion[parents.child] = parents.inclusion
    columns: dict[str, Any] = {
        "latent": pa.array(np.arange(n, dtype=np.int32)),
        "x": pa.array(places[:, 0].astype(np.float32)),
        "y": pa.array(places[:, 1].astype(np.float32)),
    }
    for i, level in enumerate(levels):
        columns[f"cluster_{i}"] = pa.array(level.cluster_of, mask=level.cluster_of < 0)
    columns["parent"] = pa.array(parent, mask=parent < 0)
    columns["inclusion"] = pa.array(inclusion, mask=parent < 0)
    columns["tokens"] = named.latents
    return pa.table(columns)


def _clusters_table(
    levels: Sequence[Level], named: _Named, density: NDArray[np.float64], places: Places
) -> pa.Table:
    """Return a row for each cluster of each level, with the coarser cluster that has most of it."""
    parts = []
    for i, level in enumerate(levels):
        inside = level.cluster_of >= 0
        columns: dict[str, Any] = {
            "level": pa.array(np.full(len(level.sizes), i, np.int8)),
            "cluster": pa.array(np.arange(len(level.sizes), dtype=np.int32)),
            "within": pa.array(
                _majority(level, levels[i - 1]) if i else [None] * len(level.sizes), pa.int32()
            ),
            "size": pa.array(level.sizes),
            "density": pa.array(
                np.bincount(level.cluster_of[inside], density[inside], len(level.sizes)),
                pa.float64(),
            ),
            "stability": pa.array(level.stability, mask=~np.isfinite(level.stability)),
            "tokens": pa.array(named.clusters[i], pa.list_(pa.string())),
        }
        middles = _middles(level, places)
        columns |= {"x": pa.array(middles[:, 0]), "y": pa.array(middles[:, 1])}
        parts.append(pa.table(columns))
    return pa.concat_tables(parts)


def _majority(level: Level, coarser: Level) -> list[int | None]:
    both = (level.cluster_of >= 0) & (coarser.cluster_of >= 0)
    width = len(coarser.sizes) + 1
    keys, counts = np.unique(
        level.cluster_of[both].astype(np.int64) * width + coarser.cluster_of[both],
        return_counts=True,
    )
    found: list[int | None] = [None] * len(level.sizes)
    for at in np.argsort(counts, kind="stable"):  # the largest last, so it overwrites the others
        found[keys[at] // width] = int(keys[at] % width)
    return found


def _absorbed_table(absorbed: Absorbed, named: _Named) -> pa.Table:
    columns = {name: pa.array(column) for name, column in absorbed._asdict().items()}
    columns["tokens"] = named.latents.take(pa.array(absorbed.latent))
    columns["by_tokens"] = named.latents.take(pa.array(absorbed.by))
    return pa.table(columns)


def _drawn(places: Places, level: Level, names: Sequence[Sequence[str]], n_linked: int) -> str:
    """Draw the latents, or a random sample of them, colored by their coarsest cluster."""
    chosen = np.random.default_rng(0).permutation(len(places))[:_DRAWN]
    clouds = []
    for cluster in np.unique(level.cluster_of[chosen]).tolist():
        x, y = places[chosen[level.cluster_of[chosen] == cluster]].T.tolist()
        name = ", ".join(names[cluster][:3]) if cluster >= 0 else "in no cluster"
        clouds.append(Cloud(name, x, y))
    return render_cloud(f"Map of the latents, {n_linked:,} of them linked", clouds, x_label="")
