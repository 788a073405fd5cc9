"""Metrics of a dictionary, from sums over a data set and never from means of per-batch ratios."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_sae.dictionaries.interface import Inferred

_PIECE_ROWS = 4096
DUPLICATE_COSINE = 0.9
DUPLICATE_SAMPLE = 4096
DUPLICATES_CHUNK_LATENTS = 2048
"""Number of latents that are loaded at a time to compare with the sampled ones."""


class Fit(NamedTuple):
    """Sums over the rows seen so far. Sums of different batches and ranks can be added."""

    columns: tuple[slice, ...]
    """Target columns of each written site."""
    squared_error: Float[Tensor, " sites"]
    squared_total: Float[Tensor, " sites"]
    active: Float[Tensor, ""]
    rows: int
    counts: Int[Tensor, " n_latents"]
    """Number of rows on which each latent fired."""

    @classmethod
    def empty(
        cls,
        n_latents: int,
        columns: Iterable[slice] = (slice(None),),
        device: torch.device | str = "cpu",
    ) -> "Fit":
        """Create sums over zero rows, on the device of the rows to add."""
        columns = tuple(columns)
        zeros = torch.zeros(len(columns), dtype=torch.float64, device=device)
        counts = torch.zeros(n_latents, dtype=torch.int64, device=device)
        return cls(columns, zeros, zeros, zeros.sum(), 0, counts)

    def add(
        self,
        targets: Float[Tensor, "batch d_out"],
        found: Inferred,
        mean: Float[Tensor, " d_out"],
    ) -> "Fit":
        """Add a batch and return the new sums.

        Args:
            targets: Activations to reconstruct.
            found: Reconstructions and firings of the whole dictionary on the same rows.
            mean: Mean of the targets over the data set (not the batch), scaled as they are.
        """
        means = mean.expand_as(targets)
        return Fit(
            self.columns,
            self.squared_error + _squared_distances(targets, found.x_hat, self.columns),
            self.squared_total + _squared_distances(targets, means, self.columns),
            self.active + found.firings.sum(),
            self.rows + len(targets),
            self.counts + found.firings,
        )

    def on_cpu(self) -> "Fit":
        """Return a copy of these sums on the CPU."""
        return self._replace(
            squared_error=self.squared_error.cpu(),
            squared_total=self.squared_total.cpu(),
            active=self.active.cpu(),
            counts=self.counts.cpu(),
        )

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained: sum |target - x_hat|^2 / sum |target - mean|^2."""
        return float(self.squared_error.sum() / self.squared_total.sum())

    @property
    def fvu_by_site(self) -> list[float]:
        """FVU of each written site separately."""
        fvus: list[float] = (self.squared_error / self.squared_total).tolist()
        return fvus

    @property
    def l0(self) -> float:
        """Active latents per row, on average."""
        return float(self.active / self.rows)

    @property
    def densities(self) -> Float[Tensor, " n_latents"]:
        """Share of rows in which each latent fires."""
        return self.counts.double() / self.rows


def _squared_distances(
    targets: Float[Tensor, "batch d_out"],
    others: Float[Tensor, "batch d_out"],
    columns: Iterable[slice],
) -> Float[Tensor, " sites"]:
    """Sum squared differences per site in fp64, a few rows at a time to bound the fp64 copies."""
    pieces = zip(torch.split(targets, _PIECE_ROWS), torch.split(others, _PIECE_ROWS), strict=True)
    squares = ((one - other).double().square() for one, other in pieces)
    sums = [torch.stack([piece[:, site].sum() for site in columns]) for piece in squares]
    return torch.stack(sums).sum(0)


def ce_recovered(clean: float, spliced: float, ablated: float) -> float:
    """Return the share of the ablation's loss that the reconstruction recovers.

    This is (ablated - spliced) / (ablated - clean), of cross-entropies, as SAEBench defines it:
    1 if all of the loss is recovered, 0 if none is. NaN if the ablation costs nothing.
    """
    if ablated == clean:
        return math.nan
    return (ablated - spliced) / (ablated - clean)


@torch.no_grad()
def duplicate_shares(
    W_dec: Callable[[], Iterable[Float[Tensor, "_ d_in"]]], n_latents: int, experts: int = 1
) -> tuple[float, float]:
    """Return the share of latents with a duplicate, and the share with one in another expert.

    A duplicate is another latent whose decoder direction has a cosine above .9 with this one's. It
    is measured for 4,096 evenly spaced latents, each compared with all latents.

    Args:
        W_dec: Function that yields the decoder's parts in order. Called twice.
        n_latents: Number of latents over all parts.
        experts: Number of experts, each an equal part of the latents.
    """
    sampled = torch.linspace(0, n_latents - 1, min(n_latents, DUPLICATE_SAMPLE)).long()
    chosen, first = [], 0
    for part in W_dec():
        here = (sampled >= first) & (sampled < first + len(part))
        chosen.append(torch.nn.functional.normalize(part[sampled[here] - first], dim=1))
        first += len(part)
    directions = torch.cat(chosen)
    width = n_latents // experts
    found = torch.zeros(2, len(sampled), dtype=torch.bool)
    first = 0
    for piece in (p for part in W_dec() for p in torch.split(part, DUPLICATES_CHUNK_LATENTS)):
        others = torch.nn.functional.normalize(piece, dim=1)
        near = directions @ others.T > DUPLICATE_COSINE
        here = ((sampled >= first) & (sampled < first + len(others))).nonzero()[:, 0]
        near[here, sampled[here] - first] = False  # not its own duplicate
        found[0] |= near.any(1)
        if experts > 1:
            others_in = torch.arange(first, first + len(others)) // width
            found[1] |= (near & (others_in != sampled[:, None] // width)).any(1)
        first += len(others)
    anywhere, elsewhere = found.double().mean(1).tolist()
    return anywhere, elsewhere
