"""JumpReLU with an L0 penalty (Rajamanoharan et al. 2024, arXiv:2407.14435; Gemma Scope).

    z     = W_enc x + b_enc
    f     = z H(z - theta)
    x_hat = W_dec^T f + b_dec
    L     = E|x - x_hat|^2 / Var(x)  +  lambda E|f|_0

or, with a target T for L0 = E|f|_0 over the global batch,

    L     = E|x - x_hat|^2 / Var(x)  +  w (L0 / T - 1)^2

The step H has no gradient of its own. With K(u) = 1 for |u| < 1/2, else 0:

    df/dz = H(z - theta)        df/dtheta = -(theta / eps) K((z - theta) / eps)
    dH/dz = 0                   dH/dtheta = -(1 / eps) K((z - theta) / eps)

Decoder rows have unit norm. Thresholds (the parameter and the configuration) and eps are in units
of the rows' root mean square norm, as in the paper, where that norm is 1. The parameter is theta;
the paper's is log theta. An optimizer moves a parameter by at most the learning rate per step. So
with log theta, theta could change by a factor of at most exp(rate x steps), which is little in a
short run or at the learning rate of a wide dictionary. Theta itself moves as far as the encoder.

The quadratic penalty acts like lambda = 2 w (L0 / T - 1) / T. So a run ends above the target, by a
relative excess of lambda T / 2 w, for the lambda that would lead to that L0. lambda T, the penalty
on T latents, is between a few hundredths and two tenths of the variance, so with w = 4 the excess
is less than 3 %. During warm-up the target moves from the initial L0 to T, so that no sudden strong
penalty kills latents.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_sae.config.sae import JumpReLUConfig
from dist_sae.dictionaries.interface import Output, Rows, StepContext, Widths
from dist_sae.dictionaries.penalised import Penalised, encode_decode
from dist_sae.dictionaries.schedules import warmed_up

_WEIGHT = 4.0  # w


class JumpReLU(Penalised):
    """A dictionary with a learned threshold per latent and a penalty on L0."""

    config: JumpReLUConfig
    theta: nn.Parameter

    def __init__(
        self, config: JumpReLUConfig, widths: Widths | int, *place: Any, **precision: Any
    ) -> None:
        super().__init__(config, widths, *place, **precision)
        # root mean square norm of the part of a scaled row that a latent reads
        self.rms_norm = math.sqrt(self.W_enc.shape[1])
        self.bandwidth = (config.bandwidth or config.least_code) * self.rms_norm
        theta = nn.Parameter(torch.zeros_like(self.b_enc))
        self.add_tensor("theta", theta, per_latent=True)

    def thresholds_in(self, dtype: torch.dtype) -> Float[Tensor, " n_local"]:
        return self.rms_norm * self.theta.to(dtype)

    def objective(self, rows: Rows, context: StepContext) -> Output:
        eps, theta = self.bandwidth, self.thresholds
        inputs = self.axis.gather(rows.inputs)

        def activation(pre_acts: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
            return jump_relu(pre_acts, theta, eps), jump(pre_acts, theta, eps)

        out = encode_decode(self, inputs, activation, (theta - eps / 2).detach(), theta)
        penalty = self.sparsity(out.penalty / len(inputs), context.progress)
        return self.output(rows, context, out, penalty)

    def sparsity(self, l0: Float[Tensor, ""], progress: float) -> Float[Tensor, ""]:
        """Compute this shard's part of the penalty from its part of the replica's L0."""
        config, share = self.config, self.config.sparsity_warmup_share
        if config.target_l0 is None:
            return warmed_up(progress, config.coefficient, share) * l0
        target = self.initial_l0 + warmed_up(progress, config.target_l0 - self.initial_l0, share)
        miss = self.axis.total(l0.detach()) / (self.axis.replicas * target) - 1
        slope = 2 * miss / target
        return _WEIGHT * (miss.square() / self.axis.shards + slope * (l0 - l0.detach()))

    @torch.no_grad()
    def set_initial_sparsity(self, x: Float[Tensor, "batch d_in"]) -> None:
        """Set the thresholds for encoder rows of unit norm, then the share of active latents."""
        self.theta.fill_(self.config.initial_threshold or self.config.least_code)
        super().set_initial_sparsity(x)

    @torch.no_grad()
    def scale_encoder(self, factor: Float[Tensor, ""]) -> None:
        """Scale the encoder, and also the thresholds unless the run file sets them."""
        if self.config.initial_threshold:
            super().scale_encoder(factor)
            return
        for parameter in (self.W_enc, self.b_enc, self.theta):
            parameter.mul_(factor)

    @torch.no_grad()
    def constrain_others(self) -> None:
        """Clamp thresholds to 0 or more."""
        self.theta.clamp_(min=0)


class _Jump(torch.autograd.Function):
    """z H(z - theta), or only H(z - theta). For the gradients see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, theta: Tensor, eps: float, times_z: bool, through_z: bool
    ) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.settings = eps, times_z, through_z
        return (z > theta) * (z if times_z else torch.ones_like(z))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        z, theta = ctx.saved_tensors
        eps, times_z, through_z = ctx.settings
        window = ((z - theta).abs() < eps / 2) * gradient * ((theta if times_z else 1.0) / eps)
        grad_z = gradient * (z > theta) if times_z else torch.zeros_like(gradient)
        if through_z:
            grad_z = grad_z + window
        return grad_z, (-window).sum_to_size(theta.shape), None, None, None


def jump_relu(z: Tensor, theta: Tensor, eps: float, *, through_z: bool = False) -> Tensor:
    """Compute z H(z - theta).

    Args:
        z: Pre-activations.
        theta: Thresholds, positive, broadcast to z.
        eps: Width of the window in which theta gets a gradient.
        through_z: Whether z gets the window's gradient as well, with the opposite sign.
    """
    result: Tensor = _Jump.apply(z, theta, eps, True, through_z)  # type: ignore[no-untyped-call]
    return result


def jump(z: Tensor, theta: Tensor, eps: float) -> Tensor:
    """Compute H(z - theta): 1 at active latents, so the sum is L0. Only theta gets a gradient."""
    result: Tensor = _Jump.apply(z, theta, eps, False, False)  # type: ignore[no-untyped-call]
    return result
