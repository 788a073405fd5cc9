"""Manifolds: circles planted among rays and decoys are found, and controls show nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dist_sae.analysis.graph import find_groups, nearest_edges
from dist_sae.analysis.manifolds import LEAST_ROWS, Settings, find_manifolds
from dist_sae.analysis.opened import Indexed
from dist_sae.errors import ConfigError
from tests.analysis.simulated import Codes, joined, simulate

D, CIRCLES, TILES, FAMILIES, RAYS = 64, 20, 8, 60, 400
SIZES = 3, 4, 5, 6
ROWS, ACTIVE = 40_000, 500


def unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths: NDArray[np.float64] = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / lengths


def on_rows(draw: np.random.Generator, chance: float) -> NDArray[np.int64]:
    return np.flatnonzero(draw.random(ROWS) < chance)


def circle(draw: np.random.Generator, rows: NDArray[np.int64], first: int, noise: float) -> Codes:
    """Points of a circle, each a sum of the two nearest of `TILES` directions."""
    angle = draw.uniform(0, TILES, len(rows))
    low, between = angle.astype(np.int64), (angle % 1) * 2 * np.pi / TILES
    step = 2 * np.pi / TILES
    radius = np.abs(draw.normal(1, noise, len(rows))) / np.sin(step)
    acts = np.stack([radius * np.sin(step - between), radius * np.sin(between)])
    latents = first + np.stack([low, (low + 1) % TILES])
    return Codes(np.tile(rows, 2), latents.ravel(), acts.ravel())


def family(
    draw: np.random.Generator, rows: NDArray[np.int64], latents: range, *, apart: bool
) -> Codes:
    """Latents of which one is active at a time, or all independently."""
    on = draw.random((len(rows), len(latents))) < 0.3
    if apart:
        on = np.arange(len(latents)) == draw.integers(0, len(latents), len(rows))[:, None]
    row, latent = np.nonzero(on)
    return Codes(rows[row], latents.start + latent, np.abs(draw.normal(1, 0.25, len(row))) + 0.1)


def planted(seed: int = 0) -> tuple[NDArray[np.float64], list[Codes]]:
    """Directions and codes of circles, then families of near latents, then rays."""
    draw = np.random.default_rng(seed)
    angles = 2 * np.pi * np.arange(TILES) / TILES
    parts, codes, first = [], [], 0
    for number in range(CIRCLES):  # half around the origin, half before it, with all intensities
        axes, ahead = np.linalg.qr(draw.standard_normal((D, 3)))[0], float(number % 2)
        tiles = np.stack([np.cos(angles), np.sin(angles), np.full(TILES, ahead)], 1)
        parts.append(unit(tiles @ axes.T))
        codes.append(circle(draw, on_rows(draw, ACTIVE / ROWS), first, 0.1 + 0.3 * ahead))
        first += TILES
    for number in range(FAMILIES):
        size = SIZES[number % len(SIZES)]
        parent, own = draw.standard_normal(D), draw.standard_normal((size, D))
        parts.append(unit(1.5 * unit(parent) + unit(own)))
        rows = on_rows(draw, ACTIVE / ROWS)
        codes.append(family(draw, rows, range(first, first + size), apart=number < FAMILIES / 2))
        first += size
    parts.append(unit(draw.standard_normal((RAYS, D))))
    for latent in range(first, first + RAYS):
        rows = on_rows(draw, ACTIVE / ROWS)
        codes.append(Codes(rows, np.full(len(rows), latent), np.ones(len(rows))))
    return np.concatenate(parts), codes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Indexed:
    directions, codes = planted()
    folder = tmp_path_factory.mktemp("circles")
    return simulate(folder, directions, joined(codes), n_rows=ROWS)


def test_planted_circles_are_ranked_first(world: Indexed) -> None:
    found = find_manifolds(world, Settings())
    table = found.tables["groups"].to_pylist()
    circles = [set(range(TILES * i, TILES * (i + 1))) for i in range(CIRCLES)]
    ranks = [i for i, line in enumerate(table) if set(line["latents"]) in circles]
    assert len(table) >= CIRCLES + 0.8 * FAMILIES  # decoys are groups too
    assert sum(rank < 30 for rank in ranks) >= 18
    rings = [line for line in table if line["is_ring"]]
    assert sum(set(line["latents"]) in circles for line in rings) >= 18
    assert len(rings) <= CIRCLES
    assert len(found.figures) == len(found.numbers["best_rings"]) == 5
    for line in rings:
        assert line["two_nn"] == pytest.approx(1, abs=0.3)
        assert line["in_perspective"] == bool(min(line["latents"]) // TILES % 2)
        assert line["participation"] == pytest.approx(2, abs=0.2)
        assert line["composition"] < 0.7  # interpolated, not added
        assert line["scaling"] < 0.1
    apart = [line["composition"] for line in table if min(line["latents"]) >= CIRCLES * TILES]
    assert np.mean([value for value in apart if value is not None]) > 0.8  # they add


def test_latents_that_fire_without_each_other_are_no_ring(tmp_path: Path) -> None:
    directions, codes = planted()
    draw = np.random.default_rng(1)
    whole = joined(codes)
    shuffled = np.empty_like(whole.rows)
    for latent in range(len(directions)):  # each keeps its activations, on other rows
        here = np.flatnonzero(whole.latents == latent)
        shuffled[here] = draw.choice(ROWS, len(here), replace=False)
    world = simulate(tmp_path, directions, whole._replace(rows=shuffled), n_rows=ROWS)
    assert find_manifolds(world, Settings()).numbers["rings"] == 0


def test_a_random_dictionary_has_no_manifolds(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    n, rows = 600, 4000
    latents = draw.integers(0, n, 8 * rows)
    keys = np.unique(latents + n * np.repeat(np.arange(rows), 8))
    codes = Codes(keys // n, keys % n, draw.random(len(keys)) + 0.1)
    directions = unit(draw.standard_normal((n, 8)))  # so few dimensions that many are near
    found = find_manifolds(simulate(tmp_path, directions, codes, n_rows=rows), Settings())
    assert found.numbers["groups"] > 0
    assert found.numbers["rings"] == 0
    assert "nothing multidimensional" in " ".join(found.summary)


def test_groups_are_no_larger_than_allowed(world: Indexed) -> None:
    edges = nearest_edges(world.latents, 0.3)
    n = world.latents.n_latents
    groups = find_groups(edges, n, 3, 12)
    counts = np.bincount(groups.of[groups.of >= 0])
    assert np.array_equal(counts, groups.sizes)
    assert counts.min() >= 3
    assert counts.max() <= 12
    for group in range(len(counts)):  # connected by edges within
        members = np.flatnonzero(groups.of == group)
        reached = {int(members[0])}
        inside = edges.mutual & np.isin(edges.one, members) & np.isin(edges.other, members)
        for _ in members:
            for a, b in zip(edges.one[inside], edges.other[inside], strict=True):
                if {int(a), int(b)} & reached:
                    reached |= {int(a), int(b)}
        assert reached == set(members.tolist())


@pytest.mark.parametrize(
    ("settings", "rows", "message"),
    [
        ({"neighbours": 0}, 1000, "no nearest latents"),
        ({"postings": "none"}, 1000, "keeps no postings"),
        ({}, LEAST_ROWS - 1, f"has {LEAST_ROWS - 1} rows"),
    ],
)
def test_what_an_index_lacks_is_said_in_one_line(
    tmp_path: Path, settings: dict[str, Any], rows: int, message: str
) -> None:
    codes = Codes(np.arange(rows), np.zeros(rows, np.int64), np.ones(rows))
    world = simulate(tmp_path, np.eye(4), codes, n_rows=rows, **settings)
    with pytest.raises(ConfigError, match=message) as error:
        find_manifolds(world, Settings())
    assert "\n" not in str(error.value)
