"""Profiles of latents over the sites that they write.

A profile is the share of each site in the length of a latent's decoder row, |W_dec_s| / sum_s
|W_dec_s|, in the scale of training: rows of all sites have the same mean square per channel there,
so that late layers, whose activations are larger, do not look stronger.
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
    """Profiles of the latents that fire."""

    sites: tuple[str, ...]
    shares: Float[NDArray[np.float64], "latents sites"]

    def span(self, quantile: float) -> float:
        """Effective number of sites of a latent: exp of the entropy of its squared shares."""
        squares = self.shares**2
        squares /= np.maximum(squares.sum(1, keepdims=True), _TINY)
        entropies = -(squares * np.log(np.maximum(squares, _TINY))).sum(1)
        return float(np.exp(np.quantile(entropies, quantile)))


def read_profiles(index: Index) -> Profiles | None:
    """Read the profiles from an index; None if one site is written, or no latent fires."""
    if not index.manifest.writes or not index.firings.any():
        return None
    parts = []
    for table in index.latents(["firings", "norms"]):
        fires = table["firings"].to_numpy() > 0
        parts.append(np.stack(table["norms"].to_numpy()).astype(np.float64)[fires])
    norms = np.concatenate(parts)
    return Profiles(index.manifest.writes, norms / np.maximum(norms.sum(1, keepdims=True), _TINY))


def render_profiles(profiles: Profiles) -> str:
    """A figure: of two sites the histogram, of more the mean profile by the site of the peak."""
    sites, shares = profiles
    if len(sites) == _TWO:
        counts, edges = np.histogram(shares[:, 1], _BARS, (0.0, 1.0))
        return render_histogram(
            "Decoder norms of latents that fire",
            edges.tolist(),
            counts.tolist(),
            x_label=f"share of {sites[1]} in the sum with {sites[0]}",
            log10=False,
        )
    peaks = shares.argmax(1)
    rows = [
        (f"{site} ({np.sum(peaks == i):,})", shares[peaks == i].mean(0).tolist())
        for i, site in enumerate(sites)
        if (peaks == i).any()
    ]
    title = "Mean profile of latents by the site of the peak, and their number"
    return render_shares(title, rows, sites, x_label="share of the sum of decoder norms at")
