"""The oracle: the same mathematics, dense, by autograd. Slow, obvious, used in tests."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dist_sae.sae.base import LossTerms


def topk_loss(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "n_latents d_in"],
    b_enc: Float[Tensor, " n_latents"],
    W_dec: Float[Tensor, "n_latents d_in"],
    b_dec: Float[Tensor, " d_in"],
    *,
    k: int,
    variance: float,
    dead: Bool[Tensor, " n_latents"],
    auxk: int,
    auxk_coefficient: float,
) -> LossTerms:
    """TopK with AuxK as Gao et al. 2024 state it (arXiv:2406.04093, 2.3 and A.2)."""
    pre_acts = (x - b_dec) @ W_enc.T + b_enc
    x_hat = _topk(pre_acts, k).relu() @ W_dec + b_dec
    fvu = (x - x_hat).square().sum() / (len(x) * variance)
    error = (x - x_hat).detach()
    aux = fvu.new_zeros(())
    if auxk and dead.any():
        e_hat = _topk(pre_acts.where(dead, -torch.inf), min(auxk, int(dead.sum()))).relu() @ W_dec
        spread = (error - error.mean(0)).square().sum()
        if spread > 0:
            aux = (error - e_hat).square().sum() / spread
    return LossTerms(fvu, aux, fvu + auxk_coefficient * aux)


def _topk(pre_acts: Tensor, k: int) -> Tensor:
    """All but the k largest of each row set to zero."""
    top = pre_acts.topk(k, dim=1)
    return torch.zeros_like(pre_acts).scatter(1, top.indices, top.values)
