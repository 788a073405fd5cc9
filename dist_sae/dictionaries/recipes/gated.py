"""Gated, with an L1 penalty on the gates (Rajamanoharan et al. 2024, arXiv:2404.16014).

    pi     = W_enc x + b_enc
    f      = H(pi) relu(e^r W_enc x + b_mag)
    x_hat  = W_dec^T f + b_dec
    x_gate = W_dec^T relu(pi) + b_dec                       (W_dec and b_dec held fixed)
    L      = (E|x - x_hat|^2  +  E|x - x_gate|^2  +  lambda E sum_i relu(pi_i)) / Var(x)

The step H has no gradient. So the gates learn only from the last two terms, and the decoder and the
magnitudes only from the first. The penalty therefore decides which latents are active, but does not
shrink their codes. Decoder rows have unit norm, because a longer decoder would evade the penalty.
b_dec is not subtracted from x, because b_enc and b_mag can do the same.

A code is an affine function of its pre-activation pi, and positive above a threshold:

    f = e^r (pi - m)  where  pi > max(0, m),        m = b_enc - e^-r b_mag
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dist_sae.config.sae import GatedConfig
from dist_sae.dictionaries.interface import Output, Rows, StepContext, Widths
from dist_sae.dictionaries.penalised import Penalised, encode_decode, set_active_share
from dist_sae.dictionaries.schedules import warmed_up


class Gated(Penalised):
    """A dictionary in which gates decide which latents are active, and magnitudes how strongly."""

    config: GatedConfig
    r_mag: nn.Parameter
    b_mag: nn.Parameter

    def __init__(
        self, config: GatedConfig, widths: Widths | int, *place: Any, **precision: Any
    ) -> None:
        super().__init__(config, widths, *place, **precision)
        for name in ("r_mag", "b_mag"):
            self.add_tensor(name, nn.Parameter(torch.zeros_like(self.b_enc)), per_latent=True)

    @property
    def offsets(self) -> Float[Tensor, " n_local"]:
        """The m of each latent: the pre-activation at which its magnitude is 0."""
        return self.b_enc - self.b_mag / self.r_mag.exp()

    def thresholds_in(self, dtype: torch.dtype) -> Float[Tensor, " n_local"]:
        return self.offsets.relu().to(dtype)

    def codes_of(
        self, pre_acts: Float[Tensor, "*rows some"], latents: Int[Tensor, " some"]
    ) -> Float[Tensor, "*rows some"]:
        return self.r_mag.exp()[latents] * (pre_acts - self.offsets[latents])

    def objective(self, rows: Rows, context: StepContext) -> Output:
        inputs = self.axis.gather(rows.inputs)

        def activation(pre_acts: Tensor, gain: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
            gates = pre_acts.relu()
            acts = gain * (pre_acts - offset).relu() * (pre_acts > 0)
            return acts, gates, gates

        shut = torch.zeros_like(self.b_enc)
        out = encode_decode(self, inputs, activation, shut, self.r_mag.exp(), self.offsets)
        config, scale = self.config, len(inputs) * context.variance
        coefficient = warmed_up(context.progress, config.sparsity, config.sparsity_warmup_share)
        found = self.output(rows, context, out, coefficient * out.penalty / scale)
        assert out.frozen is not None
        error = rows.targets - out.frozen - self.b_dec.detach()
        auxiliary = error.square().sum() / scale
        terms = found.terms._replace(auxk=auxiliary, total=found.terms.total + auxiliary)
        return found._replace(terms=terms)

    @torch.no_grad()
    def make_active(
        self, latents: slice | Tensor, x: Float[Tensor, "batch d_in"], share: float
    ) -> None:
        """Set b_enc so that gates open on a share of the rows, and b_mag so that codes are above 0.

        Only these latents change.
        """
        set_active_share(self, latents, x, torch.zeros_like(self.b_enc), share)
        least = self.r_mag.exp() * self.b_enc
        self.b_mag[latents] = torch.maximum(self.b_mag, least)[latents]

    @torch.no_grad()
    def scale_encoder(self, factor: Float[Tensor, ""]) -> None:
        """Scale gates and magnitudes by the same factor."""
        for parameter in (self.W_enc, self.b_enc, self.b_mag):
            parameter.mul_(factor)
