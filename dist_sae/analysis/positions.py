"""Places of latents on a map, with linked latents near each other, in time linear in the links."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_sae.analysis.links import Graph

EPOCHS = 120
"""Number of passes over the links."""
PIECE_NODES = 2**16
"""Number of nodes that are moved at a time. Their links take about 50 MB."""
_OTHERS = 5  # weight of the repulsion from other nodes, relative to the mean pull of the links
_DRAWS = 10  # random other nodes that repel a node, per pass
_MOST_STEP = 4.0
_LEAST_INSIDE = 0.5  # least share of the area for latents with links
_GOLDEN = math.pi * (3 - math.sqrt(5))

Places = NDArray[np.float32]


def place(graph: Graph, levels: Sequence[NDArray[np.int32]], seed: int) -> Places:
    """Place latents in a plane, [n, 2], in a circle of about radius 1.

    First, each cluster gets a disk inside the disk of its coarser cluster, and each node a place in
    the finest disk. Then linked nodes attract each other and random nodes repel each other, as in
    LargeVis and UMAP with a Student kernel. Each pass moves all nodes at once. Latents without
    links are placed around the others.

    Args:
        graph: The nodes and their links.
        levels: Cluster of each latent, -1 for none, from coarse to fine.
        seed: Seed of the random order and of the repelling nodes.
    """
    places = np.zeros((graph.n, 2), np.float32)
    nodes = graph.nodes
    draw = np.random.default_rng(seed)
    # the same area for every latent, but at least half of the total for those with links
    inside = max(_LEAST_INSIDE, len(nodes) / graph.n) if len(nodes) else 0.0
    if len(nodes):
        first = _in_disks([level[nodes] for level in levels], draw)
        first *= 0.5 * math.sqrt(len(nodes))  # about one node per unit of area
        moved = _relaxed(first, graph, draw)
        moved -= np.median(moved, axis=0)
        radius = np.quantile(np.linalg.norm(moved, axis=1), 0.99) or 1.0
        places[nodes] = _compressed(moved / radius) * math.sqrt(inside)
    linked = np.zeros(graph.n, bool)
    linked[nodes] = True
    alone = draw.permutation(np.flatnonzero(~linked))
    ranks = (np.arange(len(alone)) + 0.5) / max(1, len(alone))
    radii = np.sqrt(1.06**2 * inside + (1 - inside) * ranks)
    angles = _GOLDEN * np.arange(len(alone))
    places[alone] = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    return places


def _compressed(places: Places) -> Places:
    """Pull points beyond the unit circle in, so that a few outliers do not shrink the map."""
    radii = np.linalg.norm(places, axis=1, keepdims=True)
    drawn: Places = np.where(radii > 1, (1 + 0.05 * np.tanh(radii - 1)) / np.maximum(radii, 1), 1)
    return places * drawn


def _in_disks(levels: Sequence[NDArray[np.int32]], draw: np.random.Generator) -> Places:
    """Place nodes by nested clusters, each a sunflower of disks, the largest in the middle."""
    n = len(levels[0])
    places, radius = np.zeros((n, 2), np.float32), np.ones(n)
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


def _relaxed(places: Places, graph: Graph, draw: np.random.Generator) -> Places:
    """Move nodes by attraction along links and repulsion from random other nodes."""
    n = len(places)
    pieces = [slice(start, min(start + PIECE_NODES, n)) for start in range(0, n, PIECE_NODES)]
    scale = 2 / graph.weight.max()
    for epoch in range(EPOCHS):
        moved = np.empty_like(places)
        for piece in pieces:
            here, step = places[piece], _pull(places, graph, piece, scale)
            for _ in range(_DRAWS):
                apart = here - places[draw.integers(0, n, len(here), np.int32)]
                squares = np.square(apart).sum(1, keepdims=True)
                push = 2 * apart / ((0.01 + squares) * (1 + squares))
                step += _OTHERS / _DRAWS * np.clip(push, -_MOST_STEP, _MOST_STEP)
            moved[piece] = here + (1 - epoch / EPOCHS) * np.clip(step, -_MOST_STEP, _MOST_STEP)
        places = moved
    return places


def _pull(places: Places, graph: Graph, piece: slice, scale: np.float32) -> Places:
    """Return the mean pull of the links on each of some consecutive nodes."""
    starts = graph.starts[piece.start : piece.stop + 1]
    degrees = np.diff(starts)
    links = slice(starts[0], starts[-1])
    apart = places[graph.others[links]] - np.repeat(places[piece], degrees, axis=0)
    apart *= (scale * graph.weight[links] / (1 + np.square(apart).sum(1)))[:, None]
    pull = np.add.reduceat(apart, starts[:-1] - starts[0]) / degrees[:, None]
    return np.asarray(pull, np.float32)
