"""Manifolds in trained dictionaries of a world with circles (`--long`)."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dist_sae.analysis.manifolds import Settings, find_manifolds
from dist_sae.config.sae import BatchTopKConfig, TopKConfig
from dist_sae.index.decoder import directions
from tests.analysis.circles import CircleWorld, codes_of, moved
from tests.analysis.simulated import Codes, simulate
from tests.dictionaries.worlds import train

CIRCLES, ROWS = 20, 100_000


def rank_of_circles(
    table: list[dict[str, list[int]]], inside: NDArray[np.float64], codes: Codes
) -> dict[int, int]:
    """Return the rank of the first group that captures each circle.

    Three quarters of the circle's firings must be in the group, and three quarters of the group's
    latents must be the circle's.

    Args:
        table: Groups, best first.
        inside: Share of each latent's direction in each circle's plane, [circles, latents].
        codes: Codes of all latents.
    """
    circle_of = np.where(inside.max(0) > 0.5, inside.argmax(0), -1)
    firings = np.bincount(codes.latents, minlength=len(circle_of))
    ranks: dict[int, int] = {}
    for rank, line in enumerate(table):
        latents = np.array(line["latents"])
        for circle in set(circle_of[latents].tolist()) - {-1}:
            own = latents[circle_of[latents] == circle]
            whole = firings[circle_of == circle].sum()
            if len(own) >= 0.75 * len(latents) and firings[own].sum() >= 0.75 * whole:
                ranks.setdefault(circle, rank)
    return ranks


class Trial(NamedTuple):
    """A world and the settings of a dictionary trained on it. Circles are features 4 to 23."""

    seed: int
    config: TopKConfig | BatchTopKConfig
    d: int = 64
    rays: int = 200
    l0: float = 4
    corners: int = 0
    steps: int = 1500
    rings: int = 20
    """Least number of circles that must be called a ring."""


TOPK = TopKConfig(n_latents=320, k=6, auxk=64, dead_after_rows=100_000)
BATCHTOPK = BatchTopKConfig(n_latents=320, k=6, auxk=64, dead_after_rows=100_000)
WIDE = TopKConfig(n_latents=1024, k=8, auxk=64, dead_after_rows=100_000)
TRIALS = {
    "topk 1": Trial(1, TOPK),
    "batchtopk 1": Trial(1, BATCHTOPK, rings=15),
    "batchtopk 2": Trial(2, BATCHTOPK, rings=16),
    "seven points": Trial(100, TOPK, corners=7),
    "stated size": Trial(100, WIDE, 128, 1000, 6, steps=3000),
}


def of_a_circle(line: dict[str, list[int]], inside: NDArray[np.float64]) -> bool:
    """Return whether three quarters of a group's latents belong to one circle.

    Another group may belong to the same circle.
    """
    latents = np.array(line["latents"])
    return bool((inside[:, latents] > 0.5).mean(1).max() >= 0.75)


@pytest.mark.system
@pytest.mark.parametrize("trial", TRIALS.values(), ids=list(TRIALS))
def test_circles_that_a_dictionary_was_trained_on_are_ranked_first(
    request: pytest.FixtureRequest, tmp_path: Path, trial: Trial
) -> None:
    """At least 18 of 20 planted circles rank in the first 30, and all rings are planted circles.

    When this was written 20 did, with BatchTopK 19. The limits were tuned on seed 100.
    """
    if not request.config.getoption("--long"):
        pytest.skip("trains for 0.5 to 2 minutes; needs --long")
    seed, d, corners = trial.seed, trial.d, trial.corners
    world = CircleWorld(
        d, trial.rays, CIRCLES, trial.l0, seed=seed, ranks=range(4, 24), corners=corners
    )
    sae = train(world, trial.config, steps=trial.steps, batch=1024, lr=3e-3).sae
    rows, codes = directions(sae.W_dec.detach()), codes_of(sae, world, ROWS)
    inside = torch.einsum("ckd,nd->cnk", world.axes[:, :2], rows).square().sum(2).double().numpy()

    def found(name: str, decoder: torch.Tensor, codes: Codes) -> list[dict[str, list[int]]]:
        made = simulate(tmp_path / name, decoder.double().numpy(), codes, n_rows=ROWS)
        table: list[dict[str, list[int]]] = (
            find_manifolds(made, Settings()).tables["groups"].to_pylist()
        )
        return table

    table = found("trained", rows, codes)
    ranks = rank_of_circles(table, inside, codes)
    assert sum(rank < 30 for rank in ranks.values()) >= 18
    rings = {rank for rank, line in enumerate(table) if line["is_ring"]}
    assert len(rings & set(ranks.values())) >= trial.rings
    assert all(of_a_circle(table[rank], inside) for rank in rings)
    assert not any(line["is_ring"] for line in found("moved", rows, moved(codes, ROWS)))
    draw = torch.Generator().manual_seed(seed)
    by_chance = directions(torch.randn(rows.shape, generator=draw))
    assert not any(line["is_ring"] for line in found("random", by_chance, codes))
