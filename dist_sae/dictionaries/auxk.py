"""AuxK: dead latents learn from the error that the live ones leave (Gao et al. 2024, A.2).

    e     = target - x_hat, held fixed
    e_hat = W_dec^T relu(TopK_auxk(z of dead latents))      (no bias)
    L_aux = sum |e - e_hat|^2 / sum |e - mean e|^2          (sums over the global batch)

0 where errors do not differ from row to row: there is nothing to learn then, and the quotient would
be by what rounding leaves.

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

from dist_sae.dictionaries.axis import LatentAxis
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.init import least_squares_scale

_LEAST_LENGTH = 0.01  # with none at all, nothing could reach them
_LEAST_SPREAD = 1e-4  # of the squares of errors; bf16 products alone may make as much of equal rows
_ROUNDINGS = 16  # of a row's elements, that an error may be made of


def auxk_loss(
    axis: LatentAxis,
    targets: Float[Tensor, "batch d_out"],
    error: Float[Tensor, "batch d_out"],
    e_hat: Float[Tensor, "batch d_out"],
) -> Float[Tensor, ""]:
    """The loss above, of this rank's rows.

    Args:
        axis: This rank's place.
        targets: This rank's targets.
        error: e of the same rows.
        e_hat: e_hat of the same rows.
    """
    spread, is_there = _spread(axis, targets, error)  # no rank waits for its device to know
    loss = (error - e_hat).square().sum() / spread * axis.replicas
    return torch.where(is_there, loss, 0.0)


@torch.no_grad()
def retie_(
    sae: Dictionary,
    stuck: Bool[Tensor, " n_local"],
    error: Float[Tensor, "batch d_out"],
    e_hat: Callable[[], Float[Tensor, "batch d_out"]],
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


def _spread(axis: LatentAxis, targets: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """(sum |e - mean e|^2, or 1 where that is nothing; whether it is something), over all ranks."""
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in (error, targets)]
    total = axis.total(torch.cat([error.sum(0, dtype=torch.float64), torch.stack(norms).square()]))
    sums, (squares, of_rows) = total[:-2], total[-2:]
    spread = squares - sums.square().sum() / (len(error) * axis.replicas * axis.shards)
    rounding = (_ROUNDINGS * torch.finfo(error.dtype).eps) ** 2 * of_rows
    is_there = spread > torch.maximum(rounding, _LEAST_SPREAD * squares)
    return torch.where(is_there, spread, 1.0).to(error.dtype), is_there
