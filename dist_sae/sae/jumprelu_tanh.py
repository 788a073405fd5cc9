"""JumpReLU with a tanh penalty (Anthropic, Circuits Updates, January 2025).

    z     = W_enc x + b_enc
    f     = z H(z - theta)                                     theta = exp(log_threshold)
    x_hat = W_dec^T f + b_dec
    L     = (E|x - x_hat|^2  +  lambda_S E sum_i tanh(c f_i |d_i|)
                             +  lambda_P E sum_i relu(theta_i - z_i) |d_i|) / Var(x)

lambda_S rises over the whole run. The window's gradient (jumprelu.py) reaches theta and, with the
other sign, z and so every parameter. The last term, over all entries, needs no dense product:

    relu(theta - z) = (theta - z) + relu(z - theta)

sums to something linear in the sum of the rows, and a part from the entries above their threshold.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dist_sae.config.sae import JumpReLUTanhConfig
from dist_sae.sae.base import LossTerms, Output, Step
from dist_sae.sae.gated import Thresholded, gated, set_active_share
from dist_sae.sae.init import random_rows
from dist_sae.sae.jumprelu import jump_relu
from dist_sae.sae.kernels import autograd
from dist_sae.sae.schedules import warmed_up


class JumpReLUTanh(Thresholded):
    """The dictionary and its loss."""

    config: JumpReLUTanhConfig

    def __init__(
        self, config: JumpReLUTanhConfig, d_in: int, *place: Any, **precision: Any
    ) -> None:
        super().__init__(config, d_in, *place, **precision)
        self.log_threshold = nn.Parameter(torch.zeros_like(self.b_enc))

    @property
    def thresholds(self) -> Float[Tensor, " n_local"]:
        return self.log_threshold.exp()

    def objective(self, x: Float[Tensor, "batch d_in"], step: Step) -> Output:
        config, eps = self.config, self.config.bandwidth
        sparsity = warmed_up(step.progress, config.sparsity, config.sparsity_warmup_share)
        rows = self.axis.gather(x)
        theta = self.log_threshold.exp()
        # a gradient is as large as its weight: these terms add theirs to it
        W_dec, norms = autograd.with_norms(self.W_dec)
        W_enc, sums = autograd.with_product(self.W_enc, rows.sum(0))

        def gate(pre_acts: Tensor, theta: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
            acts = jump_relu(pre_acts, theta, eps, through_z=True)
            penalty = sparsity * torch.tanh(config.tanh_scale * acts * norms)
            return acts, penalty + config.pre_act * norms * (pre_acts - theta).relu()

        bound = (theta - eps / 2).detach()
        out = gated(
            self, rows, gate, bound, theta, norms, unit_rows=False, W_enc=W_enc, W_dec=W_dec
        )
        error = x - (out.x_hat + self.axis.replicated(self.b_dec))
        shortfall = len(rows) * (theta - self.b_enc) - sums
        penalty = out.penalty + config.pre_act * (norms * shortfall).sum()
        scale = len(rows) * step.variance
        fvu, sparsity_loss = error.square().sum() / scale, penalty / scale
        terms = LossTerms(fvu, fvu.new_zeros(()), sparsity_loss, fvu + sparsity_loss)
        return Output(terms, out.firings, out.active, error.detach())

    @torch.no_grad()
    def initialise(self, x: Float[Tensor, "batch d_in"], seed: int) -> None:
        """W_dec uniform, W_enc its transpose times d_in / n_latents, `initial_l0` active latents.

        b_enc is such that each latent is above its threshold on the same share of the rows.
        """
        d_in = len(self.b_dec)
        random_rows(self.W_dec, seed, self.first_latent, uniform=True)
        self.W_dec.mul_(d_in**-0.5)
        self.W_enc.copy_(self.W_dec * (d_in / self.n_latents))
        self.log_threshold.fill_(self.config.initial_threshold).log_()
        self.b_dec.zero_()
        share = min(self.config.initial_l0 / self.n_latents, 0.5)
        set_active_share(self, slice(None), x, self.thresholds, share)

    def settle(self, new: slice, x: Float[Tensor, "batch d_in"]) -> None:
        set_active_share(self, new, x, self.thresholds)

    def constrain(self) -> None:
        """Nothing: decoder norms are free, the penalties hold them."""
