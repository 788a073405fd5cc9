"""Profiles of latents over the sites that they write.

A latent's profile is each site's share of the sum of its decoder norms, |W_dec_s| / sum_s
|W_dec_s|. Norms are in the scale of training, where rows of all sites have the same mean square per
channel. So late layers do not look stronger because their activations are larger.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from dist_sae.index.query import Index
from dist_sae.report.charts import render_histogram, render_shares

_BARS = 25
_TWO = 2
_TINY = np.finfo(np.float64).tiny


class Profiles(NamedTuple):
    """The profiles of the latents that fire."""

    sites: tuple[str, ...]
    shares: Float[NDArray[np.float64], "latents sites"]

    def span(self, quantile: float) -> float:
        """Return a quantile of the latents' effective numbers of sites.

        That number is the exponential of the entropy of a latent's squared shares.
        """
        squares = self.shares**2
        squares /= np.maximum(squares.sum(1, keepdims=True), _TINY)
        entropies = -(squares * np.log(np.maximum(squares, _TINY))).sum(1)
        return float(np.exp(np.quantile(entropies, quantile)))


def read_profiles(index: Index) -> Profiles | None:
    """Read the profiles from an index. Return None if one site is written, or no latent fires."""
    if not index.manifest.writes or not index.firings.any():
        return None
    parts = []
    for table in index.latents(["firings", "norms"]):
        fires = table["firings"].to_numpy() > 0
        parts.append(np.stack(table["norms"].to_numpy()).astype(np.float64)[fires])
    norms = np.concatenate(parts)
    return Profiles(index.manifest.writes, norms / np.maximum(norms.sum(1, keepdims=True), _TINY))


def render_profiles(profiles: Profiles) -> str:
    """Draw a histogram for two sites, or for more sites the mean profiles by peak site."""
    sites, shares = profiles
    if len(sites) == _TWO:
        counts, edges = np.histogram(shares[:, 1], _BARS, (0.0, 1.0))
        return render_histogram(
            "Decoder norms of latents that fire",
            edges.tolist(),
            counts.tolist(),
            x_label=f"share of {sites[1]} in the sum over both sites",
            log10=False,
        )
    peaks = shares.argmax(1)
    rows = [
        (f"{site} ({np.sum(peaks == i):,})", shares[peaks == i].mean(0).tolist())
        for i, site in enumerate(sites)
        if (peaks == i).any()
    ]
    title = "Mean profile by peak site, with the number of latents"
    return render_shares(title, rows, sites, x_label="share of the sum of decoder norms, by site")
