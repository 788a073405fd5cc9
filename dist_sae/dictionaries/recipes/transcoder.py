"""Transcoder: reads some sites and writes others, as an MLP does (arXiv:2406.11944).

    z     = W_enc x + b_enc
    f     = relu(TopK_k(z)),  or (selection: batch) BatchTopK as in topk.py
    y_hat = W_dec^T f + b_dec  (+ W_skip x)
    L     = E|y - y_hat|^2 / Var(y)  +  alpha L_aux            (auxk.py)

(Dunefsky et al. 2024; the skip is Paulo et al. 2025's, arXiv:2501.18823.)

x is the concatenation of the sites that are read, and y of those that are written. At the start:

- W_dec and W_skip are 0, so the encoder has no gradient in the first step.
- b_dec is the geometric median of y. At the mean of the first batch, the gradient of b_dec would be
  pure rounding error, which Adam would amplify to full steps.
- b_enc is -W_enc mean(x), so that each latent sees centered rows.
- W_enc has random rows of unit norm, or (init: data) rows close to centered rows of x.

Decoder norms are free, because the scale of the outputs is not known in advance.

With b_enc = b_enc' - W_enc b_dec, the codes are those of TopK, W_enc (x - b_dec) + b_enc', with
other parameters. So if it reads and writes the same site and has TopK's weights, its loss is
TopK's.

A stuck latent (auxk.py) cannot be tied to its decoder row, which belongs to other sites. It starts
again near a centered row of x, with a decoder row of 0.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dist_sae.config.transcoder import TranscoderConfig
from dist_sae.dictionaries.constraints import normalise_rows_
from dist_sae.dictionaries.init import geometric_median, mean_row, random_rows, reinitialise
from dist_sae.dictionaries.interface import Rows, Widths
from dist_sae.dictionaries.recipes.topk import TopK


class Transcoder(TopK):
    """A dictionary that reconstructs the sites it writes from the sites it reads."""

    config: TranscoderConfig
    unit_rows = False
    W_skip: nn.Parameter
    """Weight of the linear skip connection. Exists only if `config.skip`."""

    def __init__(
        self, config: TranscoderConfig, widths: Widths | int, *place: Any, **precision: Any
    ) -> None:
        super().__init__(config, widths, *place, **precision)
        if config.skip:
            skip = nn.Parameter(self.b_dec.new_zeros(self.widths.d_out, self.widths.d_in))
            self.add_tensor("W_skip", skip, per_latent=False)

    @property
    def directions(self) -> nn.Parameter:
        return self.W_enc

    def offset(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "*rows d_out"]:
        b_dec = self.axis.replicated(self.b_dec)
        return b_dec + x @ self.axis.replicated(self.W_skip).T if self.config.skip else b_dec

    def biases(self, x: Float[Tensor, "batch d_in"]) -> tuple[None, Float[Tensor, "*rows d_out"]]:
        return None, self.offset(x)

    def encoder_inputs(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "rows d_in"]:
        return self.axis.gather(x)

    @torch.no_grad()
    def initialise(self, rows: Rows, seed: int, *, rescale: bool = True) -> None:
        random_rows(self.W_enc, seed, self.first_latent)
        normalise_rows_(self.W_enc)
        self.derive_from_directions(slice(None))
        self.adapt_new_latents(slice(None), rows.inputs)
        self.b_dec.copy_(geometric_median(rows.targets, self.axis))
        if self.config.skip:
            self.W_skip.zero_()
        if rescale:
            self.measure(rows)

    def init_directions(
        self,
        rows: Rows,
        new: slice,  # noqa: ARG002 - the same for all
        *,
        all_new: bool,  # noqa: ARG002
    ) -> Float[Tensor, "batch width"]:
        """Return the centered inputs, since new decoder rows are 0 and have no direction."""
        return rows.inputs - mean_row(rows.inputs, self.axis)

    @torch.no_grad()
    def derive_from_directions(self, latents: slice | Tensor) -> None:
        self.W_dec[latents] = 0

    @torch.no_grad()
    def adapt_new_latents(self, new: slice | Tensor, x: Float[Tensor, "batch d_in"]) -> None:
        """Center the rows that these latents see: b_enc = -W_enc mean(x)."""
        self.b_enc[new] = -(self.W_enc[new] @ mean_row(x, self.axis))

    def set_initial_sparsity(self, x: Float[Tensor, "batch d_in"]) -> None:
        self.adapt_new_latents(slice(None), x)

    def scale_encoder(self, factor: Float[Tensor, ""]) -> None:
        """Do nothing: while W_dec is 0, no length of the encoder is better than another."""

    @torch.no_grad()
    def revive(
        self,
        stuck: Bool[Tensor, " n_local"],
        x: Float[Tensor, "batch d_in"],
        error: Float[Tensor, "batch d_out"],  # noqa: ARG002 - of other sites than the encoder's
    ) -> None:
        if self.config.auxk:
            reinitialise(self, stuck, x, x - mean_row(x, self.axis))
