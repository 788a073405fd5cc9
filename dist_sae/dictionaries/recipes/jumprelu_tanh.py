"""JumpReLU with a tanh penalty (Anthropic, Circuits Updates, January 2025).

    z     = W_enc x + b_enc
    f     = z H(z - theta)
    x_hat = W_dec^T f + b_dec
    L     = (E|x - x_hat|^2  +  lambda_S E sum_i tanh(c f_i |d_i|)
                             +  lambda_P E sum_i relu(theta_i - z_i) |d_i|) / Var(x)

Thresholds are a parameter, as in jumprelu.py. Decoder norms are free. The published lambda_S is 20,
for rows of squared norm d_in and a single d_in. The error grows with d_in but the penalty does not,
so by default lambda_S is proportional to d_in. Only a few latents are active at the start. With the
published 10,000, about half would be active in a dictionary that is not much wider, and the penalty
would turn most of them off for good before they are useful.

The window's gradient (jumprelu.py) reaches theta and, with the opposite sign, z. Through z it
reaches every parameter. The last term is over all entries, but needs no dense product, because in

    relu(theta - z) = (theta - z) + relu(z - theta)

the first part is linear in the sum of the rows, and the second comes only from the entries above
their threshold.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dist_sae.config.sae import JumpReLUTanhConfig
from dist_sae.dictionaries.interface import Output, Rows, StepContext, Widths
from dist_sae.dictionaries.penalised import Penalised, encode_decode
from dist_sae.dictionaries.recipes.jumprelu import jump_relu
from dist_sae.dictionaries.schedules import warmed_up
from dist_sae.kernels import autograd


class JumpReLUTanh(Penalised):
    """A dictionary with a learned threshold per latent and a tanh penalty on the codes."""

    config: JumpReLUTanhConfig
    unit_rows = False
    theta: nn.Parameter

    def __init__(
        self, config: JumpReLUTanhConfig, widths: Widths | int, *place: Any, **precision: Any
    ) -> None:
        super().__init__(config, widths, *place, **precision)
        self.rms_norm = math.sqrt(self.widths.d_in)
        self.lambda_s = config.cost(self.widths.d_in) * self.widths.d_in
        theta = nn.Parameter(torch.zeros_like(self.b_enc))
        self.add_tensor("theta", theta, per_latent=True)

    def thresholds_in(self, dtype: torch.dtype) -> Float[Tensor, " n_local"]:
        return self.rms_norm * self.theta.to(dtype)

    def objective(self, rows: Rows, context: StepContext) -> Output:
        config, eps = self.config, self.config.bandwidth
        sparsity = warmed_up(context.progress, self.lambda_s, config.sparsity_warmup_share)
        inputs = self.axis.gather(rows.inputs)
        theta = self.thresholds
        # a gradient is as large as its weight, so the gradients of these terms are added in place
        W_dec, norms = autograd.with_norms(self.W_dec)
        W_enc, sums = autograd.with_product(self.W_enc, inputs.sum(0))

        def activation(pre_acts: Tensor, theta: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
            acts = jump_relu(pre_acts, theta, eps, through_z=True)
            penalty = sparsity * torch.tanh(config.tanh_scale * acts * norms)
            return acts, penalty + config.pre_act * norms * (pre_acts - theta).relu()

        bound = (theta - eps / 2).detach()
        out = encode_decode(self, inputs, activation, bound, theta, norms, W_enc=W_enc, W_dec=W_dec)
        shortfall = len(inputs) * (theta - self.b_enc) - sums
        penalty = out.penalty + config.pre_act * (norms * shortfall).sum()
        return self.output(rows, context, out, penalty / (len(inputs) * context.variance))

    @torch.no_grad()
    def initialise(self, rows: Rows, seed: int, *, rescale: bool = True) -> None:
        self.theta.fill_(self.config.initial_threshold / self.rms_norm)
        super().initialise(rows, seed, rescale=rescale)

    @torch.no_grad()
    def constrain_others(self) -> None:
        """Clamp thresholds to 0 or more."""
        self.theta.clamp_(min=0)
