"""Crosscoder: one dictionary of several sites (Anthropic, "Sparse Crosscoders", October 2024).

x is the concatenation of all sites, each in its own scale. A latent reads and writes all of them,
and d_i^s is the part of its decoder row at site s. This is TopK or BatchTopK (topk.py) on x, except
that latents are ranked by code times decoder weight:

    z     = W_enc (x - b_dec) + b_enc
    f     = relu(z) where z |d_i| is among the k largest of its row, or (batch) among the (rows * k)
            largest of the global batch
    |d_i| = sqrt(sum_s |d_i^s|^2)  (weighting: l2),  or sum_s |d_i^s|  (l1)

Scaling a code up and its decoder row down changes nothing, so |d_i| is held at 1. Then z alone
ranks the latents, and selection, thresholds and inference are those of TopK. With l2, a latent of
one site counts as much as a latent of all sites that explains as much. With l1, it counts more
(Minder et al. 2025, arXiv:2504.02922), so latents become exclusive to sites. With a single site,
both are TopK.

Shared latents are for sites of two or more models. They have the same decoder row at every site
("Insights on Crosscoder Model Diffing", Anthropic, February 2025), so that a common feature needs
one latent instead of one per model. `shared_penalty` makes a shared code cost p times as much as
another code. A shared code is worth its cost if the error that it explains, z^2, is p times as
large. So its z / sqrt(p) must be compared with the z of other latents, which is the same as holding
its |d_i| at sqrt(p). (In crosscoder_relu.py, p multiplies the penalty.) Shared latents are spread
evenly over all latents, so that every shard has the same number.

The gradient is that of the constrained decoder: shared rows get the mean over their sites, and the
component that would only change |d_i| is removed.
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dist_sae.config.crosscoder import CrosscoderBaseConfig, CrosscoderConfig
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.constraints import normalise_rows_
from dist_sae.dictionaries.interface import Widths
from dist_sae.dictionaries.recipes.topk import TopK
from dist_sae.errors import ConfigError
from dist_sae.kernels import autograd, select

_BLOCK = 1024  # latents


class AcrossSites(Dictionary):
    """A dictionary whose latents all read and write the same sites; some may be shared.

    Raises:
        ConfigError: There are shared latents, but the sites have different widths.
    """

    config: CrosscoderBaseConfig

    def __init__(
        self, config: CrosscoderBaseConfig, widths: Widths | int, *place: Any, **precision: Any
    ) -> None:
        super().__init__(config, widths, *place, **precision)
        if config.shared_latents and len(set(self.widths.writes)) > 1:
            raise ConfigError(
                f"sae.shared_latents: the sites have widths "
                f"{', '.join(map(str, self.widths.writes))}; a shared latent has the same decoder "
                f"row at all sites, so all sites must have the same width; set this to 0"
            )

    @property
    def shared(self) -> Bool[Tensor, " n_local"]:
        """Mask of this shard's shared latents."""
        latents = torch.arange(len(self.W_dec), device=self.W_dec.device, dtype=torch.float64)
        latents += self.first_latent
        before, until = (n * self.config.shared_latents for n in (latents, latents + 1))
        return until.floor() > before.floor()

    def n_shared(self, latents: slice) -> int:
        """Count the shared latents in a slice of this shard's latents."""
        start, stop, _ = latents.indices(len(self.W_dec))
        share, first = self.config.shared_latents, self.first_latent
        return math.floor((first + stop) * share) - math.floor((first + start) * share)

    def row_weights(self, rows: Float[Tensor, "some d_out"]) -> Float[Tensor, " some"]:
        """Compute |d_i|, the weight of each decoder row over all sites."""
        if self.config.weighting == "l2":
            return autograd.site_norms(rows, rows.shape[1:])[:, 0]
        return autograd.site_norms(rows, self.widths.writes).sum(1)

    @torch.no_grad()
    def tie_sites_(
        self,
        rows: Float[Tensor, "some d_out"],
        shared: Bool[Tensor, " some"],
        n_shared: int | None = None,
    ) -> None:
        """Replace each site's part of shared rows, or of their gradients, by the mean over sites.

        Args:
            rows: Decoder rows, or their gradients.
            shared: Mask of the rows of shared latents.
            n_shared: Number of shared rows. Without it the host waits for the device.
        """
        if not self.config.shared_latents:  # sites may then differ in width
            return
        apart_as = (len(self.widths.writes), self.widths.writes[0])
        for some in torch.split(select.true_indices(shared, n_shared), _BLOCK):
            apart = rows[some].view(-1, *apart_as)
            rows[some] = apart.mean(1, keepdim=True).expand_as(apart).flatten(1)

    @torch.no_grad()
    def constrain_rows(self, latents: slice | Tensor) -> None:
        """Enforce the constraints on latents' new decoder rows."""
        rows, shared = self.W_dec[latents], self.shared[latents]
        self.tie_sites_(
            rows, shared, self.n_shared(latents) if isinstance(latents, slice) else None
        )
        self.normalise_(rows, shared)
        if isinstance(latents, Tensor):  # indexing with a tensor copies; a slice is a view
            self.W_dec[latents] = rows

    def normalise_(
        self,
        rows: Float[Tensor, "some d_out"],
        shared: Bool[Tensor, " some"],  # noqa: ARG002 - they begin alike
    ) -> None:
        """Normalize new decoder rows to their length."""
        normalise_rows_(rows)

    def derive_from_directions(self, latents: slice | Tensor) -> None:
        self.constrain_rows(latents)
        super().derive_from_directions(latents)


class Crosscoder(AcrossSites, TopK):
    """TopK or BatchTopK over all sites, with the constraints on |d_i| and on shared latents."""

    config: CrosscoderConfig

    @property
    def unit_rows(self) -> bool:  # type: ignore[override]
        """Whether unit norm is the only constraint on decoder rows, as with TopK."""
        return self.config.weighting == "l2" and not self.config.shared_latents

    @property
    def decoder_weight(self) -> Tensor:
        return self.W_dec if self.unit_rows else autograd.projected(self.W_dec, self.project_)

    @torch.no_grad()
    def project_(
        self, gradient: Float[Tensor, "n_local d_out"], W_dec: Float[Tensor, "n_local d_out"]
    ) -> None:
        """Turn a gradient, in place, into that of the constrained decoder: g - (g . d) n / |d|.

        n is the gradient of |d| with respect to d: d^s / |d^s| at each site, or (l2) d / |d|.
        """
        shared, lengths = self.shared, self._lengths(self.shared)
        for start in range(0, len(W_dec), _BLOCK):
            block = slice(start, start + _BLOCK)
            g, d, length = gradient[block], W_dec[block], lengths[block, None]
            self.tie_sites_(g, shared[block], self.n_shared(block))
            norms = length
            if self.config.weighting == "l1":
                norms = autograd.site_norms(d, self.widths.writes)
            factors = -torch.linalg.vecdot(g, d)[:, None] / (length * norms)
            factors = torch.where(norms > 0, factors, 0).expand(-1, len(self.widths.writes))
            autograd.add_at_sites_(g, d, factors, self.widths.writes)

    def _lengths(self, shared: Bool[Tensor, " some"]) -> Float[Tensor, " some"]:
        """Return the length that the constraint prescribes for each decoder row."""
        ones = torch.ones_like(shared, dtype=self.W_dec.dtype)
        return ones.masked_fill_(shared, self.config.shared_penalty**0.5)

    @torch.no_grad()
    def normalise_(self, rows: Float[Tensor, "some d_out"], shared: Bool[Tensor, " some"]) -> None:
        scale = self.row_weights(rows) / self._lengths(shared)
        rows /= scale.clamp_min_(torch.finfo(rows.dtype).tiny)[:, None]

    def constrain_others(self) -> None:
        """Restore |d_i| and the equality of shared rows over sites, unless unit norm is enough."""
        if not self.unit_rows:
            self.constrain_rows(slice(None))

    def adapt_new_latents(self, new: slice | Tensor, x: Float[Tensor, "batch d_in"]) -> None:  # noqa: ARG002
        self.constrain_rows(new)
