"""Nearest latents by decoder direction, from a checkpoint that is read part by part.

The cosines of all pairs are the product of the decoder with itself, which costs as much as encoding
`n_latents` rows. So a wide dictionary compares each latent only with the latents of some cells (see
`cells.py`). Products in fp32 pick 2 m + 2 candidates for each latent. Their cosines are computed in
fp64 and rounded to fp32, so the result does not depend on how latents are divided into ranges. If
more than 2 m + 2 latents are equally near, to fp32 rounding, only some of them become candidates.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_sae.checkpoint.layout import Checkpoint
from dist_sae.index.cells import Cells, kernels_on
from dist_sae.index.decoder import Decoder, directions
from dist_sae.kernels import Kernels, select
from dist_sae.kernels.keys import NO_ENTRY, from_keys, to_keys

WINDOW_BYTES = 256 * 2**20
"""Bytes of decoder rows in memory when cells are used, unless `Decoder.cache_bytes` allows more."""
QUERIES_BYTES = 128 * 2**20
"""Most bytes of rows whose neighbors are searched at a time."""
PAIRS_BYTES = 64 * 2**20
"""Most bytes of fp64 rows whose cosines are computed at a time."""


class Neighbours(NamedTuple):
    """The nearest latents of each of some consecutive latents."""

    latents: Int[Tensor, "latents m"]
    """The nearest latents (int32), nearest first, ties by number; -1 if there are fewer than m."""
    cosines: Float[Tensor, "latents m"]
    """Their cosines (fp32); 0 for missing neighbors, and if a decoder row is zero."""


@torch.no_grad()
def neighbours(
    checkpoint: Checkpoint,
    latents: range,
    m: int = 16,
    cells: Cells | None = None,
    device: torch.device | None = None,
    alive: Callable[[], None] = lambda: None,
    decoder: Decoder | None = None,
) -> Neighbours:
    """Find the `m` latents with the highest cosine to each latent of a range.

    Args:
        checkpoint: The checkpoint of the trained dictionary.
        latents: Latents to find neighbors of, at least one. The decoder is read twice for every
            128 MiB of their rows, so a range should be long.
        m: Number of neighbors per latent.
        cells: Limits the comparison to the nearest cells; None compares with all latents.
        device: Device for the products; the CPU if None.
        alive: Called before each part of the decoder.
        decoder: The checkpoint's decoder. A caller with several ranges passes the same one, which
            may cache its rows (`cache_bytes`) if cells are used.

    Raises:
        CorruptObjectError: The checkpoint is damaged.
    """
    decoder = decoder or Decoder(checkpoint, alive)
    at_a_time = max(1, QUERIES_BYTES // (4 * decoder.d_out))
    starts = latents[::at_a_time]
    ranges = (range(start, min(start + at_a_time, latents.stop)) for start in starts)
    found = [_of_range(decoder, part, m, cells, device or torch.device("cpu")) for part in ranges]
    return Neighbours(*map(torch.cat, zip(*found, strict=True)))


def _of_range(
    decoder: Decoder, latents: range, m: int, cells: Cells | None, device: torch.device
) -> Neighbours:
    rows = torch.cat([rows for _, rows in decoder.parts(latents)])
    queries = directions(rows).to(device)
    kernels = kernels_on(device)
    n_candidates = min(decoder.n_latents, 2 * m + 2)
    best = torch.full((len(queries), n_candidates), NO_ENTRY, device=device)
    if cells is None:
        for first, others in decoder.directions():
            best = _nearer(best, queries, others.to(device), first, kernels)
    else:
        _compare_in_cells(best, queries, decoder, cells, kernels)
    candidates = from_keys(best)[1].where(best > NO_ENTRY, -1).cpu()
    return _ranked(rows, latents.start, candidates, decoder, m)


def _nearer(
    best: Int[Tensor, "q k"],
    queries: Float[Tensor, "q d"],
    others: Float[Tensor, "n d"],
    first: int,
    kernels: Kernels,
) -> Int[Tensor, "q k"]:
    """Update the largest keys with the products of some consecutive latents."""
    blocks = select.products(queries, others, torch.float32)
    no_bias = torch.zeros(len(others), device=others.device)
    k = best.shape[1]
    found = select.topk_keys(blocks, len(queries), no_bias, k, kernels, first=first)
    return torch.cat([best, found], 1).topk(k, dim=1).values


def _compare_in_cells(
    best: Int[Tensor, "q k"],
    queries: Float[Tensor, "q d"],
    decoder: Decoder,
    cells: Cells,
    kernels: Kernels,
) -> None:
    """Compare queries with the latents of their nearest cells, and update `best` in place."""
    n_cells = len(cells.centroids)
    probed = cells.nearest(queries, kernels).cpu()
    queries_of = _grouped(probed.flatten(), n_cells)
    for first, window, lengths in decoder.windows(max(WINDOW_BYTES, decoder.cache_bytes)):
        members_of = _grouped(cells.cell_of[first : first + len(window)].long(), n_cells)
        for cell in range(n_cells):
            who = (queries_of(cell) // probed.shape[1]).to(queries.device)
            members = members_of(cell)
            if len(who) and len(members):
                # latents are not compared in order, so if more tie than fit, any of them may stay
                others = (window[members] / lengths[members]).to(queries.device)
                products = queries[who] @ others.T
                no_bias = torch.zeros(len(members), device=queries.device)
                numbers = members.to(queries.device) + first
                best[who] = kernels.keep_largest(best[who], products, no_bias, numbers)


def _grouped(groups: Int[Tensor, " n"], n_groups: int) -> Callable[[int], Int[Tensor, " _"]]:
    """Return a function from a group to the ascending indices of its items."""
    order = groups.argsort(stable=True)
    ends = torch.bincount(groups, minlength=n_groups).cumsum(0).tolist()
    return lambda group: order[ends[group - 1] if group else 0 : ends[group]]


def _ranked(
    rows: Float[Tensor, "q d"],
    first: int,
    candidates: Int[Tensor, "q k"],
    decoder: Decoder,
    m: int,
) -> Neighbours:
    """Find the nearest of the candidates, by cosines in fp64.

    Args:
        rows: Decoder rows of the latents.
        first: Number of the first latent.
        candidates: Numbers of the candidate latents; -1 for no candidate.
        decoder: The decoder, which has the candidates' rows.
        m: Number of neighbors per latent.
    """
    keys = torch.full((len(rows), max(m, candidates.shape[1])), NO_ENTRY)
    own = torch.arange(first, first + len(rows))[:, None]
    candidates = candidates.where(candidates != own, -1)
    at_a_time = max(1, PAIRS_BYTES // (8 * decoder.d_out))
    for start, part in decoder.parts():
        here = ((candidates >= start) & (candidates < start + len(part))).nonzero()
        for who, place in (pairs.unbind(1) for pairs in torch.split(here, at_a_time)):
            others = candidates[who, place]
            keys[who, place] = to_keys(_cosines(rows[who], part[others - start]), others)
    keys = keys.topk(m, dim=1).values
    cosines, latents = from_keys(keys)
    none = keys == NO_ENTRY
    return Neighbours(latents.masked_fill(none, -1).int(), cosines.masked_fill(none, 0.0))


def _cosines(one: Float[Tensor, "n d"], other: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    one, other = one.double(), other.double()
    lengths = one.norm(dim=1) * other.norm(dim=1)
    cosines: Tensor = torch.linalg.vecdot(one, other) / lengths.where(lengths > 0, 1.0)
    return cosines.clamp(-1.0, 1.0).float()
