"""How often latents fire, counted in rows of the global batch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from dist_sae.dictionaries.axis import WHOLE, LatentAxis


class DensityCounts(NamedTuple):
    """Latents of all shards, by the share of rows that they fire on."""

    rows: int
    """What the shares are of."""
    never: int
    """Latents that fired on none."""
    counts: list[int]
    """Latents from each edge on, below the next; the first has those below it too."""
    rare: int
    """Latents below the bound for rare ones, `never` included."""


class Densities:
    """Rows on which each latent of this shard has fired, of the last one to two windows.

    Args:
        n_local: Latents of the shard.
        window_rows: Rows of the global batch that a window has at least.
        axis: This rank's place.
        device: Where the counts will be.
    """

    def __init__(
        self,
        n_local: int,
        window_rows: int,
        axis: LatentAxis = WHOLE,
        device: torch.device | str = "cpu",
    ) -> None:
        self._window_rows = window_rows
        self._axis = axis
        self._before = torch.zeros(n_local, dtype=torch.int64, device=device)
        self._now = torch.zeros_like(self._before)
        self._rows_before = self._rows_now = 0

    def add(self, firings: Int[Tensor, " n_local"], rows: int) -> None:
        """Take in a global batch of `rows` rows; `firings` are of this replica's."""
        if self._rows_now >= self._window_rows:
            self._before, self._now = self._now, self._before.zero_()
            self._rows_before, self._rows_now = self._rows_now, 0
        self._now += firings
        self._rows_now += rows

    def counts(self, log10_edges: Sequence[float], rare: float) -> DensityCounts:
        """How many latents fire how often. Collective.

        Args:
            log10_edges: Ascending.
            rare: Share of rows below which a latent fires rarely.
        """
        rows = self._rows_before + self._rows_now
        shares = self._axis.across_replicas(self._before + self._now).double() / rows
        # of the edges, those that a share reaches; all below the first belong to the first
        bounds = 10.0 ** torch.tensor(log10_edges[1:], dtype=torch.float64, device=shares.device)
        buckets = torch.bucketize(shares, bounds, right=True)
        buckets = torch.where(shares > 0, buckets, len(log10_edges))
        local = torch.bincount(buckets, minlength=len(log10_edges) + 1)
        local = torch.cat([local, (shares < rare).sum()[None]])
        *counts, never, n_rare = (self._axis.total(local) // self._axis.replicas).tolist()
        return DensityCounts(rows, never, counts, n_rare)
