"""Firing densities of latents, measured on rows of the global batch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from dist_sae.dictionaries.axis import WHOLE, LatentAxis


class DensityCounts(NamedTuple):
    """Histogram of firing densities over the latents of all shards."""

    rows: int
    """Number of rows that the densities were measured on."""
    never: int
    """Number of latents that never fired."""
    counts: list[int]
    """Number of latents from each edge up to the next. The first bucket has no lower limit."""
    rare: int
    """Number of latents with a density below the bound, including `never`."""


class DensityCounter:
    """Counter of the firings of this shard's latents over the last one to two windows.

    Args:
        n_local: Number of latents in the shard.
        window_rows: Minimum length of a window, in rows of the global batch.
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
        """Count a global batch of `rows` rows. `firings` are from this replica's rows."""
        if self._rows_now >= self._window_rows:
            self._before, self._now = self._now, self._before.zero_()
            self._rows_before, self._rows_now = self._rows_now, 0
        self._now += firings
        self._rows_now += rows

    def counts(self, log10_edges: Sequence[float], rare: float) -> DensityCounts:
        """Compute the histogram of firing densities. Collective.

        Args:
            log10_edges: Bucket edges as log10 of the density, ascending.
            rare: Share of rows below which a latent counts as rare.
        """
        rows = self._rows_before + self._rows_now
        shares = self._axis.sum_replicas(self._before + self._now).double() / rows
        # without the first edge, so that all densities below the second are in the first bucket
        bounds = 10.0 ** torch.tensor(log10_edges[1:], dtype=torch.float64, device=shares.device)
        buckets = torch.bucketize(shares, bounds, right=True)
        buckets = torch.where(shares > 0, buckets, len(log10_edges))
        local = torch.bincount(buckets, minlength=len(log10_edges) + 1)
        local = torch.cat([local, (shares < rare).sum()[None]])
        *counts, never, n_rare = (self._axis.total(local) // self._axis.replicas).tolist()
        return DensityCounts(rows, never, counts, n_rare)
