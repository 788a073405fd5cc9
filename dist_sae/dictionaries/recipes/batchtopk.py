"""BatchTopK (Bussmann et al. 2024, arXiv:2412.06410), with AuxK.

    z     = W_enc (x - b_dec) + b_enc
    f     = relu(z) where it is among the (rows * k) largest of the global batch, else 0
    x_hat = W_dec^T f + b_dec
    L     = E|x - x_hat|^2 / Var(x)  +  alpha L_aux            (auxk.py)

A row has k active latents on average, and its codes depend on the rows beside it. At inference they
do not: f = z where z > theta, with theta the running mean of the smallest f kept in a batch.
Decoder rows have unit norm, so that z alone says how much a latent matters.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_sae.config.sae import KeepsThresholdConfig
from dist_sae.dictionaries.axis import LatentAxis
from dist_sae.dictionaries.base import Codes, Inferred
from dist_sae.dictionaries.recipes.topk import TopK
from dist_sae.dictionaries.schedules import GROWTH
from dist_sae.kernels import Entries, select
from dist_sae.kernels.keys import from_ordered, ordered
from dist_sae.kernels.select import Block, Candidates

_DIGIT = 16  # bits


class BatchTopK(TopK):
    """TopK, but for what is selected."""

    threshold: Float[Tensor, "2"]
    """(sum, weight) of the running mean of the smallest code kept; theta = sum / weight."""

    config: KeepsThresholdConfig
    measured = ("threshold",)

    def __init__(
        self, config: KeepsThresholdConfig, d_in: int, *place: Any, **precision: Any
    ) -> None:
        super().__init__(config, d_in, *place, **precision)
        self.register_buffer("threshold", torch.zeros(2, dtype=torch.float64))

    @property
    def theta(self) -> float:
        """The least code at inference; 0 before any batch has been seen."""
        total, weight = self.threshold.tolist()
        return total / weight if weight else 0.0

    @property
    def bound(self) -> Float[Tensor, " n_local"]:
        """Theta, for each latent."""
        return torch.full_like(self.b_enc, self.theta)

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        centred = self.axis.gather(x) - self.biases()[0]
        blocks = select.products(centred, self.W_enc, self.W_enc.dtype)
        found = select.above(blocks, self.b_enc, self.bound)
        assert found is not None
        return Codes(found.values, found.latents, select.starts_of(found.rows, len(centred)))

    @torch.no_grad()
    def infer(self, x: Float[Tensor, "batch d_in"]) -> Inferred:
        centred = self.axis.gather(x) - self.biases()[0]
        blocks = select.products(centred, self.W_enc, self.W_enc.dtype)
        parts, fired = self.decode_above(blocks, self.bound, len(centred))
        return Inferred(self.axis.scatter_sum(parts) + self.b_dec, fired)

    def scale_encoder(self, factor: Float[Tensor, ""]) -> None:
        super().scale_encoder(factor)
        self.threshold[0] *= factor

    def select(
        self, centred: Float[Tensor, "rows d_in"], k: int
    ) -> tuple[Float[Tensor, " entries"], Entries]:
        """This shard's part of the (rows * k) largest positive pre-activations of all ranks."""
        rows = len(centred)
        blocks = select.products(centred, self.W_enc, self.product_dtype)
        return self.largest_of_all(blocks, k * rows * self.axis.replicas, rows, rows)

    @torch.no_grad()
    def largest_of_all(
        self, blocks: Iterable[Block], count: int, rows: int, most: int
    ) -> tuple[Float[Tensor, " entries"], Entries]:
        """This shard's part of the `count` largest positive pre-activations of all ranks.

        Args:
            blocks: Of this shard's products.
            count: From 1.
            rows: Of the blocks.
            most: A bound on `rows` that is the same on all ranks.
        """
        found = select.largest(blocks, self.b_enc, count)
        total = int(self.axis.total(torch.tensor(len(found.values), device=self.b_enc.device)))
        if total:
            chosen, least = self._reach(found, min(count, total), most)
            found = Candidates(*(part[chosen] for part in found))
            if self.training:
                self._follow(least.double())
        found = select.by_row(found)
        entries = Entries(found.latents, select.starts_of(found.rows, rows), len(self.W_enc))
        return found.values, entries

    def _follow(self, least: Float[Tensor, ""]) -> None:
        """Take the least code of a batch into the mean, which goes back over a tenth of the run.

        While that is less than `threshold_decay` says: codes change much in the first steps. The
        weight is 1 - decay^n after n batches.
        """
        decay, weight = self.config.threshold_decay, self.threshold[1]
        batches = torch.log1p(-weight) / math.log(decay) if decay else torch.zeros_like(weight)
        kept = (1 / (1 + GROWTH / batches)).clamp(max=decay)
        theta = torch.where(weight > 0, self.threshold[0] / weight, least)
        weight = decay * weight + 1 - decay
        self.threshold.copy_(torch.stack([weight * least.lerp(theta, kept), weight]))

    def _reach(self, found: Candidates, count: int, most: int) -> tuple[Tensor, Tensor]:
        """(Which candidates are among the `count` largest of all ranks, the least of these).

        Of equal ones the lower latents win, then the earlier rows of the global batch.
        """
        axis = self.axis
        order = ordered(found.values)
        least, before = kth_largest(axis, order, count, bits=32)
        chosen, tied = order >= least, order == least
        missing = count - before
        if int(axis.total(tied.sum())) > missing:
            position = (found.latents + self.first_latent) * (most * axis.replicas)
            position += found.rows + most * axis.replica
            last, _ = kth_largest(axis, -position[tied], missing, bits=64)
            chosen &= ~tied | (-position >= last)
        return chosen, from_ordered(least)


def kth_largest(
    axis: LatentAxis, values: Int[Tensor, " some"], k: int, *, bits: int
) -> tuple[Int[Tensor, ""], int]:
    """(The k-th largest of the values of all ranks, how many are larger), by radix selection.

    Counts of 16 bits at a time are summed over the ranks; no value leaves its rank.

    Args:
        axis: The ranks.
        values: This rank's, signed, within `bits` bits.
        k: From 1, at most what all ranks have together.
        bits: 32 or 64.
    """
    digits = 1 << _DIGIT
    found, before = values.new_zeros(()), 0
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        # the highest digit is signed: half of them lie below 0
        low = digits // 2 if shift == bits - _DIGIT else 0
        digit = ((values >> shift) + low) & (digits - 1)
        from_top = axis.total(torch.bincount(digit, minlength=digits)).flip(0).cumsum(0)
        place = int((from_top < k - before).sum())
        before += int(from_top[place - 1]) if place else 0
        chosen = digits - 1 - place
        values = values[digit == chosen]
        found = found + ((chosen - low) << shift)
    return found, before
