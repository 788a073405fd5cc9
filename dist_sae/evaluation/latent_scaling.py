"""Latent scaling: are a crosscoder's exclusive latents of one site alone (arXiv:2504.02922)?

By its decoder norms a latent may belong to site A, and its feature may be at B as well: the
penalty has shrunk the decoder row to nothing there, or other latents write it (Minder et al.,
"complete shrinkage" and "latent decoupling"). So the row at A is fitted to what B has, where the
latent fires. With f_i its codes and d_s its decoder row at site s,

    beta = argmin_b sum_i |b f_i d_A - y_i|^2 = sum_i f_i <d_A, y_i> / (|d_A|^2 sum_i f_i^2)
    y_i  = x_i - x_hat_i + f_i d_s    the site's error, with the latent's own part put back
           x_hat_i - b_dec            or the part of all latents in the site's reconstruction
    nu   = beta at B / beta at A      for each of the two

nu is about 0 if B does not have the feature, and about 1 if it has it as A does. Both sites must
have the same basis, as two models have of which one was made from the other.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dist_sae.checkpoint.pages import Coded
from dist_sae.config.crosscoder import AcrossSitesConfig
from dist_sae.config.sae import SaeConfig
from dist_sae.dictionaries.axis import WHOLE, LatentAxis
from dist_sae.dictionaries.interface import Widths
from dist_sae.kernels import Entries, starts_of

EXCLUSIVE_BELOW = 0.05
"""Share of a site in a latent's decoder norms below which the latent is the other's alone."""
NU_ERROR, NU_RECONSTRUCTION = 0.2, 0.5
"""From these on the other site has the feature, too: the paper's."""


def applies(config: SaeConfig, widths: Widths) -> bool:
    """True for crosscoders of two sites of one width."""
    return isinstance(config, AcrossSitesConfig) and widths.writes == widths.writes[:1] * 2


class LatentScaling:
    """Sums over rows, of this rank's latents.

    Args:
        n_latents: Width of the whole dictionary.
        device: Where the rows, their codes and the sums are.
    """

    def __init__(self, n_latents: int, device: torch.device | str = "cpu") -> None:
        self._shares = torch.zeros(n_latents, dtype=torch.float64, device=device)
        """Share of the second site in each latent's decoder norms."""
        self._products = torch.zeros(n_latents, 2, 2, dtype=torch.float64, device=device)
        """sum_i f_i <d, y_i>, of (errors, reconstructions) at (its own, the other site)."""

    @torch.no_grad()
    def add(
        self,
        targets: Float[Tensor, "batch d_out"],
        x_hat: Float[Tensor, "batch d_out"],
        coded: Iterable[Coded],
    ) -> None:
        """Add a batch.

        Args:
            targets: Activations to reconstruct.
            x_hat: Their reconstructions.
            coded: The codes of these rows: `PagedDictionary.coded`.
        """
        for sae, rows, (acts, latents, starts) in coded:
            here = slice(sae.first_latent, sae.first_latent + len(sae.W_dec))
            at_sites = sae.W_dec.view(len(sae.W_dec), 2, -1)
            gram = at_sites @ at_sites.mT  # <d_s, d_t> of each latent
            norms = gram.diagonal(dim1=1, dim2=2).double().sqrt()
            shares = norms[:, 1] / norms.sum(1).clamp_min(torch.finfo(torch.float64).tiny)
            self._shares[here] = shares
            x, x_hats = targets[rows], x_hat[rows]
            sources = Entries(latents, starts, len(shares)).rows
            for own in (0, 1):
                mine = exclusive(shares, own)[latents]
                its, which = acts[mine], latents[mine]
                entries = Entries(which, starts_of(sources[mine], len(starts)), len(shares))
                for number, y in enumerate((x - x_hats, x_hats - sae.b_dec)):
                    for site in (0, 1):
                        shown = torch.zeros_like(y).view(len(y), 2, -1)
                        shown[:, own] = y.view(len(y), 2, -1)[:, site]
                        dots = sae.kernels.gather_dot(shown.flatten(1), entries, sae.W_dec)
                        if number == 0:
                            dots += its * gram[which, own, site]
                        sums = self._products[here, number, int(site != own)]
                        sums += sae.kernels.sum_values((its * dots).double(), entries)

    def nu(self, axis: LatentAxis = WHOLE) -> Float[Tensor, "n_latents 2"]:
        """By errors and by reconstructions; NaN where beta at the latent's own site is not above 0.

        Collective; of latents that are no site's alone it is NaN as well.

        Args:
            axis: The ranks that hold the shards.
        """
        own, other = axis.total(self._products).cpu().unbind(2)
        return torch.where(own > 0, other / own, torch.nan)

    def result(
        self, sites: Sequence[str], fires: Bool[Tensor, " n_latents"], axis: LatentAxis = WHOLE
    ) -> dict[str, Any]:
        """Shares of the latents that fire. Collective.

        Args:
            sites: Names of the two.
            fires: Whether each latent of the whole dictionary fires.
            axis: The ranks that hold the shards.

        Returns:
            `shared_share`, of both sites by their norms; and `latents_by_site`: by site
            `exclusive_share`, its alone by the norms, and `flagged_share`, which are among these
            though the other site has their feature as well.
        """
        of_second = axis.total(self._shares).cpu()
        both = (self.nu(axis) >= torch.tensor([NU_ERROR, NU_RECONSTRUCTION])).any(1)
        n, found, shared = max(1, int(fires.sum())), {}, fires
        for number, site in enumerate(sites):
            alone = fires & exclusive(of_second, number)
            shared = shared & ~alone
            counts = {"exclusive_share": alone.sum(), "flagged_share": (alone & both).sum()}
            found[site] = {name: int(count) / n for name, count in counts.items()}
        return {"shared_share": int(shared.sum()) / n, "latents_by_site": found}


def exclusive(shares: Float[Tensor, " some"], site: int) -> Bool[Tensor, " some"]:
    """Mask of the latents that are a site's alone, by the second site's share in their norms."""
    return shares > 1 - EXCLUSIVE_BELOW if site else shares < EXCLUSIVE_BELOW
