"""AuxK: dead latents learn from the error that the live ones leave (Gao et al. 2024, A.2).

    e     = x - x_hat, held fixed
    e_hat = W_dec^T relu(TopK_auxk(z of dead latents))      (no bias)
    L_aux = sum |e - e_hat|^2 / sum |e - mean e|^2          (sums over the global batch)

A latent whose z is negative on every row gets no gradient from this and would be dead for good.
One that has been dead for as long as it took to be called dead is *stuck*, and re-tied: it gets the
direction of its decoder row as its encoder, and no bias. Stuck latents are often alike, rows of one
large direction say, so that at the length of their neighbours they would overshoot together. They
start at the one length with which their e_hat comes nearest to e.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dist_sae.sae.axis import LatentAxis
from dist_sae.sae.base import Dictionary
from dist_sae.sae.init import least_squares_scale

_LEAST_LENGTH = 0.01  # with none at all, nothing could reach them


def auxk_loss(
    axis: LatentAxis, error: Float[Tensor, "batch d_in"], e_hat: Float[Tensor, "batch d_in"]
) -> Float[Tensor, ""]:
    """The loss above, of this rank's rows; 0 without error.

    Args:
        axis: This rank's place.
        error: e of this rank's rows.
        e_hat: Of the same.
    """
    spread, rows = _sum_of_squares_about_mean(axis, error)
    if not spread > 0:
        return error.new_zeros(())
    replica_rows = len(error) * axis.shards
    return (error - e_hat).square().sum() / spread * (rows / replica_rows)


@torch.no_grad()
def retie_(
    sae: Dictionary,
    stuck: Bool[Tensor, " n_local"],
    error: Float[Tensor, "batch d_in"],
    e_hat: Callable[[], Float[Tensor, "batch d_in"]],
) -> None:
    """Give stuck latents their decoder row as encoder, at the length above, and no bias.

    Args:
        sae: The dictionary; its decoder rows have unit norm.
        stuck: Which.
        error: What the live latents leave of this rank's rows.
        e_hat: Of the same rows, from the stuck latents as they then are.
    """
    sae.W_enc[stuck] = sae.W_dec[stuck]
    sae.b_enc[stuck] = 0
    scale = least_squares_scale(sae.axis, error, e_hat())
    sae.W_enc[stuck] *= scale.clamp(min=_LEAST_LENGTH)


def _sum_of_squares_about_mean(axis: LatentAxis, error: Tensor) -> tuple[Tensor, int]:
    """(sum |e - mean e|^2, rows), both over the global batch."""
    local = torch.cat([error.sum(0), error.square().sum()[None], error.new_tensor([len(error)])])
    total = axis.total(local)
    sums, squares, rows = total[:-2], total[-2], total[-1]
    return squares - sums.square().sum() / rows, int(rows)
