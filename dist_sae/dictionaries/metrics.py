"""Metrics of a dictionary, as sums over a data set, never means of per-batch ratios."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_sae.dictionaries.interface import Inferred

_DUPLICATE_COSINE = 0.9
_DUPLICATES_OF = 4096
DUPLICATES_CHUNK_LATENTS = 16_384
"""Latents that are compared with all at a time."""


class Fit(NamedTuple):
    """Sums over the rows seen so far; sums of batches and of ranks can be added."""

    squared_error: Float[Tensor, ""]
    squared_total: Float[Tensor, ""]
    active: Float[Tensor, ""]
    rows: int
    counts: Int[Tensor, " n_latents"]
    """Rows in which each latent fired."""

    @classmethod
    def empty(cls, n_latents: int) -> "Fit":
        """Sums over no rows."""
        zero = torch.zeros((), dtype=torch.float64)
        return cls(zero, zero, zero, 0, torch.zeros(n_latents, dtype=torch.int64))

    def add(
        self,
        targets: Float[Tensor, "batch d_out"],
        found: Inferred,
        mean: Float[Tensor, " d_out"],
    ) -> "Fit":
        """Add a batch; returns the new sums.

        Args:
            targets: Activations to reconstruct.
            found: A whole dictionary's reconstructions and firings on their rows.
            mean: Mean of the targets over the data set (not the batch), in their scale.
        """
        return Fit(
            self.squared_error + (targets - found.x_hat).double().square().sum(),
            self.squared_total + (targets - mean).double().square().sum(),
            self.active + found.firings.sum(),
            self.rows + len(targets),
            self.counts + found.firings,
        )

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained: sum |target - x_hat|^2 / sum |target - mean|^2."""
        return float(self.squared_error / self.squared_total)

    @property
    def l0(self) -> float:
        """Active latents per row."""
        return float(self.active / self.rows)

    @property
    def densities(self) -> Float[Tensor, " n_latents"]:
        """Share of rows in which each latent fires."""
        return self.counts.double() / self.rows


def ce_recovered(clean: float, spliced: float, ablated: float) -> float:
    """Share of the ablation's loss that the reconstruction recovers: 1 all, 0 none.

    (ablated - spliced) / (ablated - clean), of cross-entropies, as SAEBench defines it.
    NaN where the ablation costs nothing.
    """
    if ablated == clean:
        return math.nan
    return (ablated - spliced) / (ablated - clean)


@torch.no_grad()
def duplicate_shares(
    W_dec: Float[Tensor, "n_latents d_in"], experts: int = 1
) -> tuple[float, float]:
    """Return the share of latents with a duplicate, and with one in another expert.

    A duplicate is another latent with a decoder direction at a cosine above .9. Measured
    for 4,096 evenly spaced latents, each against all.

    Args:
        W_dec: The whole decoder.
        experts: Equal parts of the latents.
    """
    n = len(W_dec)
    looked_at = torch.linspace(0, n - 1, min(n, _DUPLICATES_OF), device=W_dec.device).long()
    directions = torch.nn.functional.normalize(W_dec[looked_at], dim=1)
    width = n // experts
    found = torch.zeros(2, len(looked_at), dtype=torch.bool, device=W_dec.device)
    for first in range(0, n, DUPLICATES_CHUNK_LATENTS):
        others = torch.nn.functional.normalize(
            W_dec[first : first + DUPLICATES_CHUNK_LATENTS], dim=1
        )
        near = directions @ others.T > _DUPLICATE_COSINE
        numbers = torch.arange(first, first + len(others), device=W_dec.device)
        near &= numbers != looked_at[:, None]
        found[0] |= near.any(1)
        found[1] |= (near & (numbers // width != looked_at[:, None] // width)).any(1)
    anywhere, elsewhere = found.double().mean(1).tolist()
    return anywhere, elsewhere
