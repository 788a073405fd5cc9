"""Firing densities of latents, counted in rows of the global batch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from dist_sae.dictionaries.axis import WHOLE, LatentAxis


class DensityCounts(NamedTuple):
    """Histogram of the latents of all shards by firing density."""

    rows: int
    """Rows that densities are shares of."""
    never: int
    """Latents that never fired."""
    counts: list[int]
    """Latents from each edge up to the next; those below the first edge count in the first."""
    rare: int
    """Latents that fire more rarely than the bound, including `never`."""


class Densities:
    """Firings of each latent of this shard over the last one to two windows.

    Args:
        n_local: Latents of the shard.
        window_rows: Least length of a window, in rows of the global batch.
        axis: This rank's place.
        device: Device of the counts.
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
        """Histogram of firing densities. Collective.

        Args:
            log10_edges: Ascending.
            rare: Share of rows below which a latent fires rarely.
        """
        rows = self._rows_before + self._rows_now
        shares = self._axis.across_replicas(self._before + self._now).double() / rows
        # the first edge is left out: all densities below the second belong to the first bucket
        bounds = 10.0 ** torch.tensor(log10_edges[1:], dtype=torch.float64, device=shares.device)
        buckets = torch.bucketize(shares, bounds, right=True)
        buckets = torch.where(shares > 0, buckets, len(log10_edges))
        local = torch.bincount(buckets, minlength=len(log10_edges) + 1)
        local = torch.cat([local, (shares < rare).sum()[None]])
        *counts, never, n_rare = (self._axis.total(local) // self._axis.replicas).tolist()
        return DensityCounts(rows, never, counts, n_rare)
