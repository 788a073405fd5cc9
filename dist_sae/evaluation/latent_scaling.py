"""Latent scaling: checks that a crosscoder's exclusive latents belong to one site only.

The method is from Minder et al. (arXiv:2504.02922). By its decoder norms, a latent may belong to
site A although site B has its feature as well. Either the penalty has shrunk the decoder row at B
to zero ("complete shrinkage"), or other latents write the feature at B ("latent decoupling"). So
the decoder row at A is fitted to the activations at B, on rows where the latent fires. With f_i the
latent's activation on row i, and d_s its decoder row at site s,

    beta = argmin_b sum_i |b f_i d_A - y_i|^2 = sum_i f_i <d_A, y_i> / (|d_A|^2 sum_i f_i^2)
    y_i  = x_i - x_hat_i + f_i d_s    the site's error, plus the latent's own contribution
           x_hat_i - b_dec            or the contribution of all latents to the reconstruction
    nu   = beta at B / beta at A      for each of the two

nu is about 0 if B does not have the feature, and about 1 if B has it as A does. Both sites must
have the same basis. Two models do if one was trained from the other.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dist_sae.checkpoint.pages import EncodedPage
from dist_sae.config.crosscoder import CrosscoderBaseConfig
from dist_sae.config.sae import SaeConfig
from dist_sae.dictionaries.axis import WHOLE, LatentAxis
from dist_sae.dictionaries.interface import Widths
from dist_sae.kernels import Entries, starts_of

EXCLUSIVE_BELOW = 0.05
"""A latent is exclusive to a site if the other site's share of its decoder norms is below this."""
NU_ERROR, NU_RECONSTRUCTION = 0.2, 0.5
"""The paper's thresholds: from these values of nu on, the other site has the feature as well."""


def is_applicable(config: SaeConfig, widths: Widths) -> bool:
    """Return True for crosscoders of two sites of the same width."""
    return isinstance(config, CrosscoderBaseConfig) and widths.writes == widths.writes[:1] * 2


class LatentScaling:
    """Sums over rows for this rank's latents, from which nu is computed.

    Args:
        n_latents: Width of the whole dictionary.
        device: Where the rows, their codes and the sums are.
    """

    def __init__(self, n_latents: int, device: torch.device | str = "cpu") -> None:
        self._shares = torch.zeros(n_latents, dtype=torch.float64, device=device)
        """Share of the second site in each latent's decoder norms."""
        self._products = torch.zeros(n_latents, 2, 2, dtype=torch.float64, device=device)
        """sum_i f_i <d, y_i>, for y of (errors, reconstructions) at (own site, other site)."""

    @torch.no_grad()
    def add(
        self,
        targets: Float[Tensor, "batch d_out"],
        x_hat: Float[Tensor, "batch d_out"],
        coded: Iterable[EncodedPage],
    ) -> None:
        """Add a batch.

        Args:
            targets: Activations to reconstruct.
            x_hat: Reconstructions of the targets.
            coded: Codes of these rows, from `PagedDictionary.coded`.
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
        """Compute each latent's nu, by errors and by reconstructions. Collective.

        nu is NaN if beta at the latent's own site is not above 0, and for latents that are not
        exclusive to a site.

        Args:
            axis: The ranks that hold the shards.
        """
        own, other = axis.total(self._products).cpu().unbind(2)
        return torch.where(own > 0, other / own, torch.nan)

    def result(
        self, sites: Sequence[str], fires: Bool[Tensor, " n_latents"], axis: LatentAxis = WHOLE
    ) -> dict[str, Any]:
        """Compute shares among the latents that fire. Collective.

        Args:
            sites: Names of the two sites.
            fires: Whether each latent of the whole dictionary fires.
            axis: The ranks that hold the shards.

        Returns:
            `shared_share`: latents that belong to both sites by their norms. `latents_by_site`: for
            each site `exclusive_share`, the latents exclusive to it by their norms, and
            `flagged_share`, those among them whose feature the other site has as well.
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
    """Return a mask of a site's exclusive latents, given the second site's share of their norms."""
    return shares > 1 - EXCLUSIVE_BELOW if site else shares < EXCLUSIVE_BELOW
