"""The map: planted trees become clusters with parents, and a random dictionary shows none."""

import base64
import json
import re
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dist_sae.analysis.communities import find_level
from dist_sae.analysis.links import Graph, GraphBuilder, Links
from dist_sae.analysis.map import LEAST_ROWS, Settings, make_map
from dist_sae.analysis.positions import place
from dist_sae.errors import ConfigError
from dist_sae.report.outcome import Findings
from tests.analysis.simulated import Codes, joined, simulate

D, ROOTS, CHILDREN, LEAVES, ROWS = 256, 24, 4, 3, 20_000
TREE = 1 + CHILDREN * (1 + LEAVES)
ROOT_CHANCE = 0.08


def unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths: NDArray[np.float64] = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / lengths


def hierarchy(draw: np.random.Generator) -> tuple[NDArray[np.float64], Codes, NDArray[np.int64]]:
    """Return directions, codes and parents of trees; on a row a node has at most one active child.

    Children and leaves fire only with their parents. Directions are random, so only co-firing
    reveals the trees.
    """
    codes, parent = [], np.full(ROOTS * TREE, -1)
    for root in range(0, ROOTS * TREE, TREE):
        rows = np.flatnonzero(draw.random(ROWS) < ROOT_CHANCE)
        which = draw.integers(0, CHILDREN + 1, len(rows))  # the last value means no child
        leaf = draw.integers(0, LEAVES + 1, len(rows))
        child = root + 1 + which * (1 + LEAVES)
        parent[root + 1 : root + TREE : 1 + LEAVES] = root
        has_child = which < CHILDREN
        has_leaf = has_child & (leaf < LEAVES)
        for latents, on in (
            (np.full(len(rows), root), np.ones(len(rows), bool)),
            (child, has_child),
            (child + 1 + leaf, has_leaf),
        ):
            codes.append(Codes(rows[on], latents[on], draw.uniform(0.5, 1.5, int(on.sum()))))
        for one in range(root + 1, root + TREE, 1 + LEAVES):
            parent[one + 1 : one + 1 + LEAVES] = one
    return unit(draw.standard_normal((ROOTS * TREE, D))), joined(codes), parent


def adjusted_rand(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Return the adjusted Rand index of Hubert and Arabie, from the contingency table."""
    table = np.zeros((one.max() + 1, other.max() + 1))
    np.add.at(table, (one, other), 1)

    def pairs(counts: NDArray[Any]) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    chance = rows * columns / pairs(np.array([len(one)]))
    return (both - chance) / ((rows + columns) / 2 - chance)


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> tuple[Findings, NDArray[np.int64]]:
    directions, codes, parent = hierarchy(np.random.default_rng(0))
    tokens = np.zeros(ROWS, np.int32)
    tokens[codes.rows] = 1000 + codes.latents // TREE  # the tree of one of the row's active latents
    folder = tmp_path_factory.mktemp("trees")
    world = simulate(folder, directions, codes, n_rows=ROWS, tokens=tokens)
    with pytest.MonkeyPatch.context() as patch:  # force several pieces, as with millions of latents
        patch.setattr("dist_sae.analysis.links.PART_LATENTS", 100)
        patch.setattr("dist_sae.analysis.positions.PIECE_NODES", 150)
        return make_map("trees", world, Settings(resamples=5)), parent


def test_planted_trees_are_clusters(trees: tuple[Findings, NDArray[np.int64]]) -> None:
    found, _ = trees
    latents = found.tables["latents"].to_pydict()
    tree = np.arange(ROOTS * TREE) // TREE
    scores = [
        adjusted_rand(np.array([-1 if c is None else c for c in latents[f"cluster_{i}"]]) + 1, tree)
        for i in range(3)
    ]
    assert max(scores) >= 0.9
    best = int(np.argmax(scores))
    clusters = found.tables["clusters"].to_pylist()
    mine = [line for line in clusters if line["level"] == best]
    assert np.median([line["stability"] for line in mine]) > 0.8
    named = sum(line["tokens"][0] == f"#{1000 + _tree(latents, best, line)}" for line in mine)
    assert named >= 0.9 * len(mine)


def _tree(latents: dict[str, list[Any]], level: int, line: dict[str, Any]) -> int:
    members = [i for i, c in enumerate(latents[f"cluster_{level}"]) if c == line["cluster"]]
    return int(np.bincount(np.array(members) // TREE).argmax())


def test_planted_parents_are_found(trees: tuple[Findings, NDArray[np.int64]]) -> None:
    found, parent = trees
    latents = found.tables["latents"].to_pydict()
    mine = np.array([-1 if p is None else p for p in latents["parent"]])
    claimed = mine >= 0
    assert (mine[claimed] == parent[claimed]).mean() >= 0.9
    assert (mine[parent >= 0] == parent[parent >= 0]).mean() >= 0.9


def test_linked_latents_are_near_on_the_map(trees: tuple[Findings, NDArray[np.int64]]) -> None:
    latents = trees[0].tables["latents"].to_pydict()
    places = np.stack([latents["x"], latents["y"]], axis=1)
    distances = np.linalg.norm(places[:, None] - places, axis=2)
    np.fill_diagonal(distances, np.inf)
    tree = np.arange(len(places)) // TREE
    assert (tree[distances.argmin(1)] == tree).mean() > 0.9
    assert np.abs(places).max() < 1.2


def test_few_linked_latents_are_not_lost_among_the_others() -> None:
    draw = np.random.default_rng(0)
    graph = graph_of(1000, *draw.integers(0, 100, (2, 400)))  # only 100 of 1,000 latents are linked
    places = place(graph, [np.zeros(1000, np.int32)] * 3, 0)
    radii = np.linalg.norm(places, axis=1)
    assert 0.65 < radii[:100].max() < radii[100:].min()
    assert radii.max() < 1.1


def test_the_page_has_all_latents_and_needs_no_network(
    trees: tuple[Findings, NDArray[np.int64]],
) -> None:
    found, parent = trees
    page = found.pages["map"]
    assert not re.search(r"(src|href)=|https?:|import\(|fetch\(", page)
    content, data = (
        json.loads(part)
        for part in re.findall(r"^const content = (.*), data = (.*);$", page, re.MULTILINE)[0]
    )
    assert content["n"] == len(parent)
    stored = np.frombuffer(base64.b64decode(data["xy"]), "<u2").reshape(-1, 2).astype(float)
    latents = found.tables["latents"].to_pydict()
    for axis, name in enumerate(("x", "y")):
        assert np.corrcoef(stored[:, axis], latents[name])[0, 1] > 0.9999
    parents = np.frombuffer(base64.b64decode(data["parent"]), "<i4")
    assert [p if p >= 0 else None for p in parents.tolist()] == latents["parent"]


def test_a_latent_that_replaces_a_near_denser_one_is_named_absorbed(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    directions = unit(draw.standard_normal((60, D)))
    directions[1] = unit(directions[0] + 0.8 * directions[1])  # contains the general direction
    # so does this child, but it does not suppress its parent
    directions[2] = unit(directions[0] + 0.8 * directions[2])
    chance = np.full(60, 0.05)
    chance[:3] = 0.3, 0.04, 0.04
    on = draw.random((ROWS, 60)) < chance
    on[:, 0] &= ~on[:, 1]
    on[:, 0] |= on[:, 2]
    on[:, 2] &= ~on[:, 1]
    rows, latents = np.nonzero(on)
    codes = Codes(rows, latents, np.ones(len(rows)))
    world = simulate(tmp_path, directions, codes, n_rows=ROWS)
    found = make_map("absorbed", world, Settings(resamples=1))
    (line,) = found.tables["absorbed"].to_pylist()
    assert (line["latent"], line["by"]) == (1, 0)
    assert found.tables["latents"].to_pydict()["parent"][2] == 0


def test_a_random_dictionary_shows_nothing(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    n = 600
    keys = np.unique(draw.integers(0, n, 8 * ROWS) + n * np.repeat(np.arange(ROWS), 8))
    codes = Codes(keys // n, keys % n, draw.random(len(keys)) + 0.1)
    world = simulate(tmp_path, unit(draw.standard_normal((n, D))), codes, n_rows=ROWS)
    found = make_map("random", world, Settings(resamples=3))
    assert found.numbers["linked"] < 0.05 * n
    assert found.numbers["children"] == found.numbers["absorbed"] == 0
    assert any(line.startswith("Nothing found") for line in found.summary)


def graph_of(n: int, one: NDArray[np.int64], other: NDArray[np.int64]) -> Graph:
    """Return a graph whose links have weight 1."""
    ends = np.unique(np.concatenate([one * n + other, other * n + one]))
    ends = ends[ends // n != ends % n]
    ones, none = np.ones(len(ends), np.float32), np.zeros(len(ends), np.float32)
    builder = GraphBuilder(n)
    for here in np.array_split(np.arange(len(ends)), np.flatnonzero(np.diff(ends // n))[::100] + 1):
        links = ends[here] // n, ends[here] % n, ones[here], none[here], np.zeros(len(here), int)
        builder.add(Links(*links))
    return builder.graph()


def test_clusters_of_a_random_graph_are_not_stable() -> None:
    draw = np.random.default_rng(0)
    random = graph_of(1000, *draw.integers(0, 1000, (2, 4000)))
    level = find_level(random, 16.0, 5, 0)
    assert np.nanmedian(level.stability) < 0.5


def test_clusters_of_a_planted_graph_are_found_among_latents_without_links() -> None:
    draw = np.random.default_rng(0)
    # 30 clusters of 20 latents, two thirds of all latents
    one, other = draw.integers(0, 20, (2, 6000))
    first = 30 * draw.integers(0, 30, 6000)
    level = find_level(graph_of(900, first + one, first + other), 8.0, 3, 0)
    planted = np.where(np.arange(900) % 30 < 20, np.arange(900) // 30, -1)
    assert np.array_equal(level.cluster_of < 0, planted < 0)
    assert adjusted_rand(level.cluster_of + 1, planted + 1) == 1
    assert np.allclose(level.stability, 1)


@pytest.mark.system
def test_clustering_keeps_four_copies_of_the_links_at_most() -> None:
    """Clustering allocates at most four copies of the links, at 8 bytes per direction of a link.

    The graph itself is not counted.
    """
    draw = np.random.default_rng(0)
    n = 20_000
    graph = graph_of(n, *draw.integers(0, n, (2, 16 * n)))
    find_level(graph, 1.0, 0, 0)  # loads the libraries first
    tracemalloc.start()
    find_level(graph, 1.0, 1, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 8 * graph.starts[-1]


@pytest.mark.parametrize(
    ("settings", "rows", "message"),
    [
        ({"neighbours": 0}, 2000, "no nearest latents"),
        ({"pairs": 0}, 2000, "has no coactive latents"),
        ({}, LEAST_ROWS - 1, f"on {LEAST_ROWS - 1} rows"),
    ],
)
def test_what_an_index_lacks_is_said_in_one_line(
    tmp_path: Path, settings: dict[str, Any], rows: int, message: str
) -> None:
    codes = Codes(np.arange(rows), np.zeros(rows, np.int64), np.ones(rows))
    world = simulate(tmp_path, np.eye(4), codes, n_rows=rows, **settings)
    with pytest.raises(ConfigError, match=message) as error:
        make_map("bad", world, Settings())
    assert "\n" not in str(error.value)


def test_a_missing_library_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sknetwork.clustering", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[analysis\]'"):
        find_level(graph_of(2, np.zeros(1, int), np.ones(1, int)), 1.0, 1, 0)
