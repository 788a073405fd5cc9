"""Nearest latents by decoder direction, of a checkpoint that is read part by part.

The cosines of all pairs are the decoder's product with itself, which is as much work as encoding
one row for every latent. In wider dictionaries (`cells.py`) a latent is compared only with the
latents of some cells. Products in fp32 pick candidates, twice as many as are wanted. The
candidates' cosines are computed in fp64 and rounded to fp32, so results do not depend on who
computes which range. If more than 2 m + 2 latents are equally near, to fp32 rounding, only some of
them become candidates.
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
from dist_sae.kernels.keys import NOTHING, from_keys, to_keys

WINDOW_BYTES = 256 * 2**20
"""Bytes of directions in memory, if cells are used and more are not allowed."""
QUERIES_BYTES = 128 * 2**20
"""Most bytes of the rows whose neighbours are searched at a time."""
PAIRS_BYTES = 64 * 2**20
"""Most bytes of fp64 rows whose cosines are computed at a time."""


class Neighbours(NamedTuple):
    """The nearest other latents of consecutive latents."""

    latents: Int[Tensor, "latents m"]
    """Int32, the nearest first, among equal ones the lower; -1 if there are fewer than m."""
    cosines: Float[Tensor, "latents m"]
    """Fp32; 0 for a latent whose decoder row is zero, and for missing neighbours."""


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
    """The `m` latents with the highest cosine to each of a range of latents.

    Args:
        checkpoint: The trained dictionary.
        latents: Latents to find neighbours of, at least one. The decoder is read twice for every
            128 MiB of their rows, so a range should be long.
        m: Neighbours of a latent.
        cells: Limits the comparison to the nearest cells; None compares with all latents.
        device: Computes the products; the CPU if None.
        alive: Called before each part of the decoder.
        decoder: Of the checkpoint, for a caller who asks again: it may keep its rows.

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
    best = torch.full((len(queries), n_candidates), NOTHING, device=device)
    if cells is None:
        for first, others in decoder.directions():
            best = _nearer(best, queries, others.to(device), first, kernels)
    else:
        _compare_in_cells(best, queries, decoder, cells, kernels)
    candidates = from_keys(best)[1].where(best > NOTHING, -1).cpu()
    return _ranked(rows, latents.start, candidates, decoder, m)


def _nearer(
    best: Int[Tensor, "q k"],
    queries: Float[Tensor, "q d"],
    others: Float[Tensor, "n d"],
    first: int,
    kernels: Kernels,
) -> Int[Tensor, "q k"]:
    """The largest keys so far, with those of some consecutive latents."""
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
    """Compare queries with the latents of their nearest cells; updates the keys."""
    n_cells = len(cells.centroids)
    probed = cells.nearest(queries, kernels).cpu()
    queries_of = _grouped(probed.flatten(), n_cells)
    for first, window, lengths in decoder.windows(max(WINDOW_BYTES, decoder.keep_bytes)):
        members_of = _grouped(cells.cell_of[first : first + len(window)].long(), n_cells)
        for cell in range(n_cells):
            who = (queries_of(cell) // probed.shape[1]).to(queries.device)
            members = members_of(cell)
            if len(who) and len(members):
                # cells are not in the order of latents; it matters only with more ties than places
                others = (window[members] / lengths[members]).to(queries.device)
                products = queries[who] @ others.T
                no_bias = torch.zeros(len(members), device=queries.device)
                numbers = members.to(queries.device) + first
                best[who] = kernels.keep_largest(best[who], products, no_bias, numbers)


def _grouped(groups: Int[Tensor, " n"], n_groups: int) -> Callable[[int], Int[Tensor, " _"]]:
    """A function that gives the ascending indices of a group's items."""
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
    """The nearest of the candidates, by exact cosines.

    Args:
        rows: Decoder rows of the latents.
        first: Number of the first latent.
        candidates: Numbers of latents; -1 is none.
        decoder: Has the candidates' rows.
        m: Neighbours of a latent.
    """
    keys = torch.full((len(rows), max(m, candidates.shape[1])), NOTHING)
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
    none = keys == NOTHING
    return Neighbours(latents.masked_fill(none, -1).int(), cosines.masked_fill(none, 0.0))


def _cosines(one: Float[Tensor, "n d"], other: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    one, other = one.double(), other.double()
    lengths = one.norm(dim=1) * other.norm(dim=1)
    cosines: Tensor = torch.linalg.vecdot(one, other) / lengths.where(lengths > 0, 1.0)
    return cosines.clamp(-1.0, 1.0).float()
