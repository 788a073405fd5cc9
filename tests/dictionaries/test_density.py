"""Histograms of how often latents fire."""

import torch

from dist_sae.dictionaries.density import DensityCounter

EDGES = [-3.0, -2.0, -1.0]


def test_latents_are_counted_by_the_share_of_rows_that_they_fire_on() -> None:
    densities = DensityCounter(6, window_rows=10_000)
    for _ in range(10):
        densities.add(torch.tensor([100, 10, 9, 1, 0, 0]), rows=100)
    # frequencies over 1,000 rows: 1, .1, .09, .01 and 0; a value on an edge counts in the bin above
    assert densities.counts(EDGES, rare=0.05) == (1000, 2, [0, 2, 2], 3)
    densities.add(torch.tensor([0, 0, 0, 0, 1, 0]), rows=3000)
    # frequencies over 4,000 rows: .25, .025, .0225, .0025 and .00025; the last is below all edges
    assert densities.counts(EDGES, rare=0.05) == (4000, 1, [2, 2, 1], 5)


def test_what_is_longer_ago_than_two_windows_does_not_count() -> None:
    densities = DensityCounter(2, window_rows=100)
    densities.add(torch.tensor([100, 0]), rows=100)
    densities.add(torch.tensor([0, 50]), rows=100)
    assert densities.counts(EDGES, 0.1) == (200, 0, [0, 0, 2], 0)
    densities.add(torch.tensor([0, 50]), rows=100)
    assert densities.counts(EDGES, 0.1) == (200, 1, [0, 0, 1], 1)
