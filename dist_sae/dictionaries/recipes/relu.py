"""ReLU with an L1 penalty on codes times decoder norms (Anthropic, Circuits Updates, April 2024).

    z     = W_enc x + b_enc
    f     = relu(z)
    x_hat = W_dec^T f + b_dec
    L     = (E|x - x_hat|^2  +  lambda E sum_i f_i |d_i|) / Var(x)

Decoder norms are free. lambda is defined as published, for rows scaled to E|x|^2 = d_in.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dist_sae.config.sae import ReLUConfig
from dist_sae.dictionaries.interface import Output, Rows, StepContext
from dist_sae.dictionaries.penalised import Penalised, encode_decode
from dist_sae.dictionaries.schedules import warmed_up
from dist_sae.kernels import autograd


class ReLU(Penalised):
    """ReLU dictionary with an L1 penalty on codes times decoder norms."""

    config: ReLUConfig
    unit_rows = False

    def thresholds_in(self, dtype: torch.dtype) -> Float[Tensor, " n_local"]:
        return torch.zeros_like(self.b_enc, dtype=dtype)

    def weighted_decoder(self) -> tuple[Float[Tensor, "n_local d_out"], Float[Tensor, " n_local"]]:
        """Return W_dec and the weight of each latent's codes in the penalty: its row's norm."""
        return autograd.with_norms(self.W_dec)

    def objective(self, rows: Rows, context: StepContext) -> Output:
        config = self.config
        inputs = self.axis.gather(rows.inputs)

        def activation(pre_acts: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
            acts = pre_acts.relu()
            return acts, acts * norms

        W_dec, norms = self.weighted_decoder()
        out = encode_decode(self, inputs, activation, self.thresholds, norms, W_dec=W_dec)
        coefficient = warmed_up(context.progress, config.sparsity, config.sparsity_warmup_share)
        scale = len(inputs) * context.variance
        return self.output(rows, context, out, coefficient * out.penalty / scale)

    @torch.no_grad()
    def set_initial_sparsity(self, x: Float[Tensor, "batch d_in"]) -> None:
        """Set the share of active latents, and scale decoder rows to the norm `decoder_norm`."""
        super().set_initial_sparsity(x)
        self.W_dec.mul_(self.config.decoder_norm)
