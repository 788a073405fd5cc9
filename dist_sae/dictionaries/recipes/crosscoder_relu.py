"""Crosscoder with a penalty on codes times decoder norms (Anthropic, October 2024).

x is the concatenation of all sites, and d_i^s is the part of a decoder row at site s:

    z     = W_enc x + b_enc
    f     = relu(z)
    x_hat = W_dec^T f + b_dec
    L     = (sum_s E|x^s - x_hat^s|^2  +  lambda E sum_i f_i |d_i|) / Var(x)
    |d_i| = sum_s |d_i^s|  (weighting: l1),  or sqrt(sum_s |d_i^s|^2)  (l2)

With l1, a latent of one site has the loss of relu.py, and latents become exclusive to sites. With
l2, L0 is lower at the same error. With a single site, both are relu.py.

A shared latent (crosscoder.py) has the same decoder row at every site, and its penalty is
`shared_penalty` times that of others.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dist_sae.config.sae import CrosscoderReLUConfig
from dist_sae.dictionaries.recipes.crosscoder import AcrossSites
from dist_sae.dictionaries.recipes.relu import ReLU
from dist_sae.kernels import autograd


class CrosscoderReLU(AcrossSites, ReLU):
    """ReLU dictionary over all sites, with a penalty on codes times decoder norms."""

    config: CrosscoderReLUConfig

    def weighted_decoder(self) -> tuple[Float[Tensor, "n_local d_out"], Float[Tensor, " n_local"]]:
        W_dec: Tensor = self.W_dec
        if self.config.shared_latents:
            W_dec = autograd.projected(W_dec, lambda g, _: self.tie_all_(g))
        if self.config.weighting == "l2":
            W_dec, weights = autograd.with_norms(W_dec)
        else:
            W_dec, norms = autograd.with_site_norms(W_dec, self.widths.writes)
            weights = norms.sum(1)
        if self.config.shared_latents:
            weights = torch.where(self.shared, self.config.shared_penalty * weights, weights)
        return W_dec, weights

    def constrain_others(self) -> None:
        """Make shared rows equal over sites again, since rounding makes them drift apart."""
        self.tie_all_(self.W_dec)

    def tie_all_(self, rows: Float[Tensor, "n_latents d_out"]) -> None:
        """Call `tie_sites_` for all latents of this shard."""
        self.tie_sites_(rows, self.shared, self.n_shared(slice(None)))
