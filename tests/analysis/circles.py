"""A world in which some features are circles, and codes of dictionaries trained in it."""

import numpy as np
import torch
from torch import Tensor

from dist_sae.dictionaries.base import Dictionary
from tests.analysis.simulated import Codes, joined
from tests.dictionaries.worlds import World

_BLOCK = 4096  # rows that are encoded together


class CircleWorld(World):
    """A world whose features are rays, except for some that are circles.

    An active circle with intensity a adds a (cos t u + sin t v) to the row, with t uniform. With
    `ahead`, every second circle adds a (c + cos t u + sin t v) / sqrt 2 instead. u, v and c are
    orthonormal.

    Args:
        d_in: Width of the rows.
        rays: Number of features that are rays.
        circles: Number of features that are circles.
        l0: Mean number of active features.
        zipf: Exponent of the frequencies.
        seed: Seed for features and rows.
        ranks: Range of frequency ranks, from 0, over which the circles are spread; None for all.
        ahead: Whether half of the circles are off the origin instead of around it.
        corners: Number of values that t takes; 0 for a continuous t.
    """

    def __init__(
        self,
        d_in: int,
        rays: int,
        circles: int,
        l0: float,
        *,
        zipf: float = 1.0,
        seed: int = 0,
        ranks: range | None = None,
        ahead: bool = False,
        corners: int = 0,
    ) -> None:
        super().__init__(d_in, rays + circles, l0, zipf, seed)
        draw = torch.Generator().manual_seed(9_000_011 + seed)
        ranks = range(rays + circles) if ranks is None else ranks
        apart = torch.arange(circles) + torch.rand(circles, generator=draw)
        self.circles = ranks.start + (apart * len(ranks) / circles).long()
        """Numbers of the features that are circles, most frequent first."""
        axes = torch.linalg.qr(torch.randn(circles, d_in, 3, generator=draw))[0]
        self.axes = axes.transpose(1, 2)
        """u, v and c of each circle, [circles, 3, d_in]."""
        self.ahead = torch.arange(circles) % 2 * float(ahead)
        self._corners = corners
        self._circle_of = torch.full((rays + circles,), -1)
        self._circle_of[self.circles] = torch.arange(circles)

    def points(self, what: Tensor, generator: torch.Generator) -> Tensor:
        found = super().points(what, generator)
        here = (self._circle_of[what] >= 0).nonzero()[:, 0]
        circle = self._circle_of[what[here]]
        turn = torch.rand(len(here), generator=generator)
        if self._corners:
            turn = torch.floor(turn * self._corners) / self._corners
        ahead = self.ahead[circle]
        parts = torch.stack([(2 * torch.pi * turn).cos(), (2 * torch.pi * turn).sin(), ahead], 1)
        parts = parts / (1 + ahead[:, None]).sqrt()
        return found.index_copy(0, here, torch.einsum("nk,nkd->nd", parts, self.axes[circle]))


@torch.no_grad()
def codes_of(sae: Dictionary, world: World, n_rows: int) -> Codes:
    """Encode rows that training has not seen."""
    parts = []
    for first in range(0, n_rows, _BLOCK):
        found = sae.encode(world.batch(2_000_000 + first // _BLOCK, min(_BLOCK, n_rows - first)))
        ends = torch.cat([found.starts[1:], torch.tensor([len(found.acts)])])
        rows = torch.repeat_interleave(first + torch.arange(len(ends)), ends - found.starts)
        on = found.acts > 0
        columns = rows[on], found.latents[on].long(), found.acts[on].double()
        parts.append(Codes(*(column.numpy() for column in columns)))
    return joined(parts)


def moved(codes: Codes, n_rows: int, seed: int = 0) -> Codes:
    """Return a control in which each latent has the same activations on randomly drawn rows."""
    draw = np.random.default_rng(seed)
    order = np.argsort(codes.latents, kind="stable")
    rows = np.empty_like(codes.rows)
    for here in np.split(order, np.flatnonzero(np.diff(codes.latents[order])) + 1):
        rows[here] = draw.choice(n_rows, len(here), replace=False)
    return codes._replace(rows=rows)
