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

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dist_sae.sae.base import Dictionary, Step
from dist_sae.sae.init import least_squares_scale
from dist_sae.sae.kernels import autograd

_LEAST_LENGTH = 0.01  # with none at all, nothing could reach them


def auxk_loss(
    sae: Dictionary,
    auxk: int,
    error: Float[Tensor, "batch d_in"],
    centred: Float[Tensor, "rows d_in"],
    b_dec: Float[Tensor, " d_in"],
    step: Step,
) -> Float[Tensor, ""]:
    """The loss above, of this rank's rows; 0 without dead latents or error.

    Args:
        sae: The dictionary.
        auxk: Dead latents that reconstruct the error of each row.
        error: e of this rank's rows.
        centred: The replica's rows less b_dec.
        b_dec: Gets the gradient of the centring.
        step: Which latents are dead.
    """
    if not auxk or not step.n_dead:
        return error.new_zeros(())
    spread, rows = _sum_of_squares_about_mean(sae, error)
    if not spread > 0:
        return error.new_zeros(())
    pre_acts, entries = sae.topk_entries(centred, auxk, among=step.dead.nonzero()[:, 0])
    pre_acts = autograd.encode(pre_acts, sae.kernels, entries, centred, sae.W_enc, sae.b_enc, b_dec)
    parts = autograd.decode(pre_acts.relu(), sae.kernels, entries, sae.W_dec, unit_rows=True)
    e_hat = sae.axis.scatter_sum(parts)
    return (error - e_hat).square().sum() / spread * (rows / len(centred))


@torch.no_grad()
def retie_(
    sae: Dictionary,
    auxk: int,
    stuck: Bool[Tensor, " n_local"],
    x: Float[Tensor, "batch d_in"],
    error: Float[Tensor, "batch d_in"],
) -> None:
    """Give stuck latents their decoder row as encoder, at the length above, and no bias.

    Args:
        sae: The dictionary; its decoder rows have unit norm.
        auxk: Of them that reconstruct the error of each row.
        stuck: Which.
        x: This rank's rows.
        error: What the live latents leave of them.
    """
    sae.W_enc[stuck] = sae.W_dec[stuck]
    sae.b_enc[stuck] = 0
    centred = sae.axis.gather(x) - sae.b_dec
    pre_acts, entries = sae.topk_entries(centred, auxk, among=stuck.nonzero()[:, 0])
    e_hat = sae.axis.scatter_sum(sae.kernels.combine(pre_acts.relu(), entries, sae.W_dec))
    sae.W_enc[stuck] *= least_squares_scale(sae.axis, error, e_hat).clamp(min=_LEAST_LENGTH)


def _sum_of_squares_about_mean(sae: Dictionary, error: Tensor) -> tuple[Tensor, int]:
    """(sum |e - mean e|^2, rows), both over the global batch."""
    local = torch.cat([error.sum(0), error.square().sum()[None], error.new_tensor([len(error)])])
    total = sae.axis.total(local)
    sums, squares, rows = total[:-2], total[-2], total[-1]
    return squares - sums.square().sum() / rows, int(rows)
