"""Constraints on the decoder, in place."""

import torch
from jaxtyping import Float
from torch import Tensor

from dist_sae.kernels.torch import row_norms


@torch.no_grad()
def normalise_rows_(W_dec: Float[Tensor, "n_latents d_in"]) -> None:
    """Give every row unit norm."""
    W_dec /= row_norms(W_dec)


@torch.no_grad()
def remove_parallel_(
    gradient: Float[Tensor, "n_latents d_in"], W_dec: Float[Tensor, "n_latents d_in"]
) -> None:
    """Remove the part of each row's gradient that is along the (unit) row.

    That part would only change the norm, which the constraint resets; left in, it would fill
    Adam's second moment with a direction that is never taken.
    """
    along = torch.linalg.vecdot(gradient, W_dec)[:, None]
    gradient.addcmul_(W_dec, along, value=-1)
