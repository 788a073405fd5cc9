"""The initial dictionary, from the first batch."""

import torch
from jaxtyping import Float
from torch import Tensor

from dist_sae.sae.base import Codes, GlobalSum, Sae
from dist_sae.sae.constraints import normalise_rows_

_MEDIAN_STEPS = 100
_MEDIAN_TOLERANCE = 1e-6


@torch.no_grad()
def initialise(sae: Sae, x: Float[Tensor, "batch d_in"], seed: int, global_sum: GlobalSum) -> None:
    """Random unit decoder rows, a tied encoder, and a bias in the middle of the data.

    b_dec is the geometric median of the rows; W_enc = c W_dec with c such that the
    reconstruction has on average the length of what it reconstructs (Gao et al. 2024, app. A.1).

    Args:
        sae: Is filled in.
        x: This rank's part of the first batch, scaled.
        seed: Decides the directions; the same on all ranks.
        global_sum: Over the ranks that share the batch.
    """
    generator = torch.Generator().manual_seed(seed)
    sae.W_dec.copy_(torch.randn(sae.W_dec.shape, generator=generator, dtype=torch.float32))
    normalise_rows_(sae.W_dec)
    sae.W_enc.copy_(sae.W_dec)
    sae.b_enc.zero_()
    sae.b_dec.copy_(geometric_median(x, global_sum))
    codes: Codes = sae.encode(x)
    lengths = torch.stack(
        [(x - sae.b_dec).norm(dim=1).sum(), (sae.decode(codes) - sae.b_dec).norm(dim=1).sum()]
    )
    target, now = global_sum(lengths)
    sae.W_enc.mul_(target / now)


def geometric_median(
    x: Float[Tensor, "batch d_in"], global_sum: GlobalSum
) -> Float[Tensor, " d_in"]:
    """The point with the least sum of distances to all ranks' rows (Weiszfeld's iteration)."""
    rows = x.double()
    ones = rows.new_ones(len(rows))
    median = _weighted_mean(rows, ones, global_sum)
    for _ in range(_MEDIAN_STEPS):
        weights = (rows - median).norm(dim=1).clamp_min(1e-12).reciprocal()
        previous, median = median, _weighted_mean(rows, weights, global_sum)
        if (median - previous).norm() <= _MEDIAN_TOLERANCE * median.norm():
            break
    return median.to(x.dtype)


def _weighted_mean(rows: Tensor, weights: Tensor, global_sum: GlobalSum) -> Tensor:
    total = global_sum(torch.cat([weights @ rows, weights.sum()[None]]))
    return total[:-1] / total[-1]
