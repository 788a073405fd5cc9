"""Synthetic worlds with several sites, whose features each exist at some of the sites."""

from typing import NamedTuple

import torch
from torch import Tensor

from dist_sae.dictionaries.interface import Widths


class SiteWorld:
    """A world with x^s = sum_i a_i D_i^s at each site s. Features have a direction per site.

    Features are active independently, with equal probabilities. Each site is scaled to E|x^s|^2 =
    its width.

    Args:
        where: Mask of the sites of each feature, [features, sites].
        width: Width of a site.
        l0: Mean number of active features per row.
        shuffled: Whether each site's rows are shuffled against those of the first site. This is a
            control in which no latent can represent a feature at several sites.
    """

    def __init__(self, where: Tensor, width: int, l0: float, *, shuffled: bool = False) -> None:
        self.where, self._width, self._shuffled = where, width, shuffled
        n, sites = where.shape
        generator = torch.Generator().manual_seed(7_000_003)  # differs from trainers' seeds
        directions = torch.randn(n, sites, width, generator=generator)
        directions = directions / directions.norm(dim=2, keepdim=True) * where[:, :, None]
        self._p = l0 / n
        per_site = self._p * (1 + 0.25**2) * where.sum(0)
        self.directions = (directions * (width / per_site).sqrt()[None, :, None]).flatten(1)
        self.widths = Widths((width,) * sites, (width,) * sites)
        self.d_in = width * sites

    def batch(self, number: int, rows: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 + number)
        active = torch.rand(rows, len(self.where), generator=generator) < self._p
        codes = active * (1 + 0.25 * torch.randn(active.shape, generator=generator)).clamp_min(0.1)
        x: Tensor = codes @ self.directions
        if self._shuffled:
            parts = torch.split(x, self._width, 1)
            x = torch.cat([part.roll(7 * site, 0) for site, part in enumerate(parts)], 1)
        return x


class Found(NamedTuple):
    """Features that have a latent with a cosine above 0.9 over all sites."""

    features: Tensor
    norms: Tensor
    """Decoder norms of these latents at each site, divided by a feature's scale there."""


def found_features(world: SiteWorld, W_dec: Tensor, norms: Tensor) -> Found:
    """Find each feature's nearest latent."""
    rows, directions = W_dec.detach(), world.directions
    cosines = (rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)) @ (
        directions / directions.norm(dim=1, keepdim=True)
    ).T
    best = cosines.max(0)
    features = (best.values > 0.9).nonzero()[:, 0]
    sizes = directions.unflatten(1, (*world.where.shape[1:], -1)).norm(dim=2).amax(0)
    return Found(features, norms[best.indices[features]] / sizes)
