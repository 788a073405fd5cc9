"""Places of latents on a map: linked ones near each other, in time linear in the edges."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_sae.analysis.graph import Graph

EPOCHS = 120
"""Passes over the edges."""
_OTHERS = 5  # weight of the push from others, against the mean pull of a node's edges
_DRAWS = 10  # random others of each node, per pass
_MOST_STEP = 4.0
_GOLDEN = math.pi * (3 - math.sqrt(5))

Places = NDArray[np.float64]


def place(graph: Graph, levels: Sequence[NDArray[np.int32]], seed: int) -> Places:
    """Place the nodes of a graph in a plane, [n, 2], in a circle of about radius 1.

    Clusters first get disks within those of the coarser clusters, and nodes places in the finest.
    Then linked nodes attract and random others repel each other, as in LargeVis and UMAP with a
    Student kernel, all at once in each pass. Nodes without edges are put around the rest.

    Args:
        graph: The nodes and their edges.
        levels: Cluster of each node, -1 for none, from coarse to fine.
        seed: Of the random order and of the others.
    """
    linked = np.zeros(graph.n, bool)
    linked[graph.one] = linked[graph.other] = True
    places = np.zeros((graph.n, 2))
    nodes = np.flatnonzero(linked)
    draw = np.random.default_rng(seed)
    if len(nodes):
        number = np.full(graph.n, -1)
        number[nodes] = np.arange(len(nodes))
        first = _in_disks([level[nodes] for level in levels], draw)
        first *= 0.5 * math.sqrt(len(nodes))  # one node in each unit of area
        moved = _relaxed(first, number[graph.one], number[graph.other], graph.weight, draw)
        moved -= np.median(moved, axis=0)
        radius = np.quantile(np.linalg.norm(moved, axis=1), 0.99) or 1.0
        places[nodes] = _compressed(moved / radius) * math.sqrt(len(nodes) / graph.n)
    alone = draw.permutation(np.flatnonzero(~linked))
    inner = 1.06 * math.sqrt(len(nodes) / graph.n)  # as much area for each latent, linked or not
    radii = np.sqrt(inner**2 + (np.arange(len(alone)) + 0.5) / graph.n)
    angles = _GOLDEN * np.arange(len(alone))
    places[alone] = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    return places


def _compressed(places: Places) -> Places:
    """Points beyond the unit circle are drawn in, so that a few do not shrink the map."""
    radii = np.linalg.norm(places, axis=1, keepdims=True)
    drawn: Places = np.where(radii > 1, (1 + 0.05 * np.tanh(radii - 1)) / np.maximum(radii, 1), 1)
    return places * drawn


def _in_disks(levels: Sequence[NDArray[np.int32]], draw: np.random.Generator) -> Places:
    """Places by clusters within clusters, each in a sunflower of disks by size."""
    n = len(levels[0])
    places, radius = np.zeros((n, 2)), np.ones(n)
    within = np.zeros(n, np.int64)
    stages: list[NDArray[np.integer[Any]]] = [*levels, np.arange(n)]
    for level in stages:
        keys = within * (n + 1) + level + 1
        _, inner, counts = np.unique(keys, return_inverse=True, return_counts=True)
        parent = np.zeros(len(counts), np.int64)
        parent[inner] = within
        order = np.lexsort((draw.random(len(counts)), -counts, parent))
        before = counts[order].cumsum() - counts[order]
        starts = np.flatnonzero(np.diff(parent[order], prepend=-1))
        sizes = np.add.reduceat(counts[order], starts)
        share, rank = np.empty(len(counts)), np.empty(len(counts))
        lengths = np.diff(starts, append=len(order))
        offset = np.repeat(before[starts], lengths)
        share[order] = (before - offset + counts[order] / 2) / np.repeat(sizes, lengths)
        rank[order] = np.arange(len(order)) - np.repeat(starts, lengths)
        part = np.empty(len(counts))
        part[order] = np.sqrt(counts[order] / np.repeat(sizes, lengths))
        angle, reach = rank[inner] * _GOLDEN, radius * np.sqrt(share[inner]) * (part[inner] < 1)
        places[:, 0] += reach * np.cos(angle)
        places[:, 1] += reach * np.sin(angle)
        radius = radius * part[inner] * 0.8
        within = inner
    return places


def _relaxed(
    places: Places,
    one: NDArray[np.int64],
    other: NDArray[np.int64],
    weight: NDArray[np.float64],
    draw: np.random.Generator,
) -> Places:
    """Places after attraction along edges and repulsion from random others."""
    n = len(places)
    weights = weight[:, None] / weight.max()
    degree = (np.bincount(one, minlength=n) + np.bincount(other, minlength=n))[:, None]
    for epoch in range(EPOCHS):
        apart = places[one] - places[other]
        pull = 2 * weights * apart / (1 + (apart**2).sum(1, keepdims=True))
        sums = [np.bincount(other, column, n) - np.bincount(one, column, n) for column in pull.T]
        step = np.stack(sums, axis=1) / degree
        for _ in range(_DRAWS):
            apart = places - places[draw.integers(0, n, n)]
            squares = (apart**2).sum(1, keepdims=True)
            push = 2 * apart / ((0.01 + squares) * (1 + squares))
            step += _OTHERS / _DRAWS * np.clip(push, -_MOST_STEP, _MOST_STEP)
        places = places + (1 - epoch / EPOCHS) * np.clip(step, -_MOST_STEP, _MOST_STEP)
    return places
