"""Measures how much a decoder can explain if a sparse solver replaces the encoder.

The solver is orthogonal matching pursuit (Pati et al. 1993) with activations of at least 0. Each
turn adds the latent whose decoder direction is nearest to the row's residual, and fits the
activations of all its latents again. A row stops when the cosine of the nearest direction is no
higher than chance: sqrt(2 ln(latents) / width), the largest among as many random directions. So the
number of latents is not limited as the encoder's is, there are no encoder errors, and the residual
is what the decoder lacks. The threshold is our choice, not from a published method; a test checks
it on a world with known features.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

STRICTNESS = (0.9, 1.0, 1.1)
"""Multiples of the threshold. The middle one gives the estimate, the others its sensitivity."""
_MOST_LATENTS = 256
_BYTES = 2**28  # most bytes of the decoder rows that the rows use
_PIECE_LATENTS = 2048
_SWEEPS = 3

Parts = Callable[[], Iterable[Float[Tensor, "some d"]]]
"""Function that yields the parts of the decoder in order. The next part may overwrite one."""


class Residuals(NamedTuple):
    """Residuals of a pursuit, for each of `STRICTNESS` and each row."""

    squares: Float[Tensor, "strictness rows"]
    """Squared length of the residual."""
    latents: Float[Tensor, "strictness rows"]
    """Number of latents used."""
    most: int
    """Most latents that a row may use."""


def most_latents(l0: float) -> int:
    """Return the most latents that a row may use: four times the encoder's L0, from 8 to 256."""
    return min(_MOST_LATENTS, max(8, math.ceil(4 * l0)))


def affordable_rows(l0: float, d: int) -> int:
    """Return how many rows' decoder rows fit into a quarter of a GiB."""
    return max(1, _BYTES // (4 * d * most_latents(l0)))


@torch.no_grad()
def pursue(
    y: Float[Tensor, "rows d"], parts: Parts, usable: Bool[Tensor, " latents"], most: int
) -> Residuals:
    """Explain rows sparsely, with latents whose cosines are above chance.

    The decoder is read once for its lengths, and once in each of up to `most` turns.

    Args:
        y: Rows, without the offset that does not come from a latent.
        parts: The decoder.
        usable: Latents that may be used. The threshold counts all latents, so that residuals for
            some of them are comparable with those for all.
        most: Most latents of a row.
    """
    n, d = y.shape
    threshold = math.sqrt(2 * math.log(max(2, len(usable))) / d)
    bounds = torch.tensor(STRICTNESS)[:, None] * threshold
    squares = torch.full((len(STRICTNESS), n), torch.nan)
    used = torch.zeros(len(STRICTNESS), n)
    atoms = torch.zeros(n, most, d)
    chosen = torch.full((n, most), -1)
    scales = _scales(parts, usable)
    acts = torch.zeros(n, most)
    residual = y.clone()
    going = torch.arange(n)
    for turn in range(most + 1):
        here = residual[going]
        square = here.square().sum(1)
        if turn < most:
            cosine, which, rows = _nearest(here, chosen[going, :turn], scales, parts)
        else:
            cosine = torch.zeros(len(going))
        ends = (cosine <= bounds) & squares[:, going].isnan()
        for level, stops in enumerate(ends):
            squares[level, going[stops]] = square[stops]
            used[level, going[stops]] = (acts[going[stops]] > 0).sum(1).float()
        on = cosine > bounds[0]
        going = going[on]
        if not len(going):
            break
        atoms[going, turn], chosen[going, turn] = rows[on], which[on]
        support = atoms[going, : turn + 1]
        acts[going, : turn + 1] = _fit(support, y[going], acts[going, : turn + 1])
        residual[going] = y[going] - torch.einsum("rk,rkd->rd", acts[going, : turn + 1], support)
    return Residuals(squares, used, most)


def _scales(parts: Parts, usable: Tensor) -> Tensor:
    """Return one over the length of each decoder row; 0 for latents that cannot be used."""
    norms = torch.cat(
        [piece.norm(dim=1) for part in parts() for piece in torch.split(part, _PIECE_LATENTS)]
    )
    return torch.where(usable & (norms > 0), 1 / norms, 0)


def _nearest(
    rows: Tensor, taken: Tensor, scales: Tensor, parts: Parts
) -> tuple[Tensor, Tensor, Tensor]:
    """Return cosine, number and direction of each row's nearest latent that it does not use yet."""
    scaled = normalize(rows, dim=1)
    best = torch.full((len(rows),), -2.0)
    which = torch.full((len(rows),), -1)
    directions = torch.zeros_like(rows)
    first = 0
    for part in parts():
        for piece in torch.split(part, _PIECE_LATENTS):
            scale = scales[first : first + len(piece)]
            cosines = (scaled @ piece.T).mul_(scale)
            row, column = ((taken >= first) & (taken < first + len(piece))).nonzero(as_tuple=True)
            cosines[row, taken[row, column] - first] = -2
            highest, place = cosines.max(1)
            better = highest > best
            at = place[better]
            best[better], which[better] = highest[better], at + first
            directions[better] = piece[at] * scale[at, None]
            first += len(piece)
    return best, which, directions


def _fit(atoms: Tensor, y: Tensor, acts: Tensor) -> Tensor:
    """Fit activations of at least 0 to about the least error, by coordinate descent from `acts`."""
    gram = atoms @ atoms.transpose(1, 2)
    along = torch.einsum("rkd,rd->rk", atoms, y)
    acts = acts.clone()
    for _ in range(_SWEEPS):
        for k in reversed(range(acts.shape[1])):
            others = (gram[:, k] * acts).sum(1) - acts[:, k] * gram[:, k, k]
            acts[:, k] = (along[:, k] - others).clamp_min(0)
    return acts
