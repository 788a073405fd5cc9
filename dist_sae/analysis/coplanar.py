"""Groups of latents in one plane through the origin, in which neighboring latents fire together.

A dictionary that is trained on a ring around the origin covers it with few latents, and neighbors
on the ring are active together. They are some 60 to 120 degrees apart, so they are no nearer to
each other than to latents of other features. But all of them lie in one plane, and in several dozen
dimensions three directions do not lie in a plane by chance. So each latent is tested in triples
with its most coactive latents, in time linear in the latents. The method is our own.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

from dist_sae.analysis.graph import Groups, components, merge_groups
from dist_sae.analysis.links import Pairs
from dist_sae.index.decoder import Decoder

FLATNESS = 0.1
"""Upper limit on the least eigenvalue of the 3 x 3 matrix of cosines of three latents in a plane.
The eigenvalue is 0 if they lie in a plane exactly, 1 if they are orthogonal, and 1 - cosine if all
cosines are equal and positive."""
NEAR = 0.8
"""Largest cosine of two latents of a triple. Nearer latents hardly span a plane."""
_MOSTLY = 0.5  # least share of a mixed latent's direction that lies in the plane
_SKETCH = 128  # dimensions that directions are projected to, if they have more
_PRODUCTS = 2**24  # numbers in a block of sketches, to bound memory


def coplanar_groups(decoder: Decoder, pairs: Pairs, least: int, most: int) -> Groups:
    """Find groups of latents in a plane, from flat triples of a latent and two coactive ones.

    Triples are in the same plane if they share two latents that span it. A latent may be in several
    groups. Training may have mixed one of a plane's latents with another feature. So each group is
    also returned in a second version, if it differs: with the latents that lie mostly in its plane
    and are coactive with two of its latents.

    Args:
        decoder: Decoder of the latents.
        pairs: Pairs of latents that fire on common rows.
        least: Fewest latents of a group.
        most: Most latents of a group.
    """
    sketches = sketch(decoder)
    n = len(sketches)
    found = list(_flat(sketches, pairs))
    three = np.concatenate([np.zeros((0, 3), np.int64), *(latents for latents, _ in found)])
    spans = np.concatenate([np.zeros((0, 3), np.bool_), *(sides for _, sides in found)])
    three, spans = three[spans.any(1)], spans[spans.any(1)]
    ends = three[:, [[0, 1], [0, 2], [1, 2]]]
    keys = ends.min(2) * n + ends.max(2)
    first = keys[np.arange(len(keys)), spans.argmax(1)]
    used, side = np.unique(np.where(spans, keys, first[:, None]), return_inverse=True)
    side = side.reshape(keys.shape)
    of, n_groups = components(len(used), side[:, [0, 0]].ravel(), side[:, [1, 2]].ravel())
    members = np.unique(of[side[:, [0]]] * n + three)  # without repeats
    group, latents = members // n, members % n
    sizes = np.bincount(group, minlength=n_groups)
    kept = (sizes >= least) & (sizes <= most)
    n_left_out = len(np.unique(latents[(sizes > most)[group]]))
    flat = Groups(latents[kept[group]], sizes[kept], n_left_out)
    return merge_groups([flat, _with_mixed(flat, sketches, pairs, most)])


def _with_mixed(flat: Groups, sketches: NDArray[np.float16], pairs: Pairs, most: int) -> Groups:
    """Extend groups by the latents that lie mostly in their plane; omit groups without any."""
    order = np.argsort(pairs.latent, kind="stable")
    others, starts = pairs.other[order], np.searchsorted(pairs.latent[order], flat.latents)
    stops = np.searchsorted(pairs.latent[order], flat.latents, side="right")
    found, first = [np.zeros(0, np.int64)], 0
    for size in flat.sizes:
        here = slice(first, first := first + size)
        latents = flat.latents[here]
        listed = [others[a:b] for a, b in zip(starts[here], stops[here], strict=True)]
        near, members = np.unique(np.concatenate(listed), return_counts=True)
        near = np.setdiff1d(near[members > 1], latents)
        plane = np.linalg.svd(sketches[latents].astype(np.float32), full_matrices=False)[2][:2]
        share = ((sketches[near].astype(np.float32) @ plane.T) ** 2).sum(1)
        if (mixed := near[share > _MOSTLY]).size and size + len(mixed) <= most:
            found.append(np.union1d(latents, mixed))
    return Groups(np.concatenate(found), np.array([len(each) for each in found[1:]], np.int64), 0)


def sketch(decoder: Decoder) -> NDArray[np.float16]:
    """Return the unit directions, randomly projected if they have more than `_SKETCH` dimensions.

    A linear projection preserves planes, and directions that are not in a plane hardly ever fall
    into one.
    """
    d = decoder.d_out
    draw = torch.Generator().manual_seed(0)
    project = torch.randn(d, _SKETCH, generator=draw) if d > _SKETCH else torch.eye(d)
    parts = [normalize(rows @ project, dim=1).half().numpy() for _, rows in decoder.parts()]
    return np.concatenate(parts)


def _flat(
    sketches: NDArray[np.float16], pairs: Pairs
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
    """Yield flat triples of a latent and two coactive ones, and which of their sides span a plane.

    The sides of a triple are its latents 1 and 2, 1 and 3, 2 and 3. Two nearly opposite latents do
    not span a plane.
    """
    order = np.argsort(pairs.latent, kind="stable")
    latents, starts, counts = np.unique(pairs.latent[order], return_index=True, return_counts=True)
    width = int(counts.max(initial=0))
    at_a_time = max(1, _PRODUCTS // max(1, (width + 1) * sketches.shape[1]))
    one, other = np.triu_indices(width, 1)
    for start in range(0, len(latents), at_a_time):
        here = slice(start, start + at_a_time)
        own, place = latents[here, None], np.arange(width)
        there = place < counts[here, None]
        listed = pairs.other[order[starts[here, None] + np.where(there, place, 0)]]
        near = np.where(there, listed, own)  # pads with the latent itself, which `NEAR` rejects
        rows = sketches[np.concatenate([own, near], axis=1)].astype(np.float32)
        cosines = rows @ rows.transpose(0, 2, 1)
        sides = cosines[:, 0, one + 1], cosines[:, 0, other + 1], cosines[:, one + 1, other + 1]
        three = np.stack(sides, axis=2)
        flat = (_least_eigenvalue(*sides) <= FLATNESS) & (three.max(2) <= NEAR)
        row, pair = np.nonzero(flat)
        found = np.stack([own[row, 0], near[row, one[pair]], near[row, other[pair]]], axis=1)
        yield found, three[row, pair] >= -NEAR


def _least_eigenvalue(
    a: NDArray[np.float32], b: NDArray[np.float32], c: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the least eigenvalue of 3 x 3 matrices with diagonal 1 and off-diagonals a, b, c."""
    square = np.maximum((a * a + b * b + c * c) / 3, 1e-12)
    angle = np.arccos(np.clip(a * b * c / square**1.5, -1, 1)) / 3
    least: NDArray[np.float32] = 1 + 2 * np.sqrt(square) * np.cos(angle + 2 * np.pi / 3)
    return least
