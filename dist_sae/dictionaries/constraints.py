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
    """Remove the component of each row's gradient that is parallel to the (unit) row.

    That component would only change the norm, which the constraint resets. If it stayed, it would
    inflate Adam's second moment along a direction in which no step is taken.
    """
    along = torch.linalg.vecdot(gradient, W_dec)[:, None]
    gradient.addcmul_(W_dec, along, value=-1)
