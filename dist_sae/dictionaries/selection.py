"""Selections: which pre-activations of a batch become codes. A recipe holds one.

    RowTopK     the k largest of each row
    BatchTopK   the (rows * k) largest positive ones of the global batch; at inference those above
                a running threshold
    Threshold   those above their latent's threshold

Of equal pre-activations the lower latent wins, then the earlier row of the global batch.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_sae.dictionaries.axis import LatentAxis
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.interface import Products, Selected
from dist_sae.dictionaries.schedules import GROWTH
from dist_sae.kernels import Entries, select
from dist_sae.kernels.keys import NOTHING, from_ordered, ordered
from dist_sae.kernels.select import Candidates

_DIGIT = 16  # bits


class RowTopK:
    """The k largest pre-activations of each row, over all shards.

    Args:
        sae: The dictionary.
        k: Latents kept for a row at inference.
        axis: Ranks that a row's latents are on.
        parts: Experts that share the k of a row equally; each is given rows of its own.
        width: Latents of a part.
    """

    measured: tuple[str, ...] = ()

    def __init__(
        self, sae: Dictionary, k: int, axis: LatentAxis, *, parts: int = 1, width: int | None = None
    ) -> None:
        self.row_limit = k if width is None else None  # an expert is on one shard
        self._sae = sae
        self._k = k
        self._axis = axis
        self._parts = parts
        self._width = width or sae.n_latents

    def select(self, products: Products, k: int) -> Selected:
        """Select the k largest of each row: pre-activations and entries of this shard."""
        [selected] = self.select_nested(products, [k])
        return selected

    @torch.no_grad()
    def select_nested(self, products: Products, ks: Sequence[int]) -> list[Selected]:
        """Select the largest of each row for ascending ks; each result has what its k adds."""
        sae = self._sae
        ks = [min(max(1, k // self._parts), self._width) for k in ks]
        first, n_local = sae.first_latent, len(sae.W_enc)
        keys = select.topk_keys(
            products.blocks, len(products.rows), sae.b_enc, ks[-1], sae.kernels, first=first
        )
        left, found = keys, []
        for k in ks:
            threshold = self._axis.kth_largest(keys, k)
            pre_acts, entries = select.entries_of(left, threshold, first, n_local)
            left = left.masked_fill(left >= threshold[:, None], NOTHING)
            if products.dtype == torch.float64:  # keys hold fp32
                pre_acts = sae.pre_acts_at(products.rows, entries)
            found.append((pre_acts.to(sae.W_enc.dtype), entries))
        return found

    def encode(self, products: Products) -> Selected:
        pre_acts, entries = self.select(products, self._k)
        return pre_acts.relu(), entries

    def thresholds(self, dtype: torch.dtype) -> None:
        """None, because a row keeps a number of codes."""

    def scale(self, factor: Float[Tensor, ""]) -> None:
        """Nothing to scale."""


class Threshold:
    """Pre-activations above a threshold of each latent.

    Args:
        sae: The dictionary.
        thresholds: Returns its thresholds, at least 0, in a precision.
    """

    measured: tuple[str, ...] = ()
    row_limit: int | None = None

    def __init__(
        self, sae: Dictionary, thresholds: Callable[[torch.dtype], Float[Tensor, " n_local"]]
    ) -> None:
        self._sae = sae
        self.thresholds = thresholds

    def encode(self, products: Products) -> Selected:
        sae = self._sae
        pre_acts, entries = _above(products, sae.b_enc, self.thresholds(sae.W_enc.dtype))
        return sae.codes_of(pre_acts, entries.latents), entries

    def scale(self, factor: Float[Tensor, ""]) -> None:
        """Nothing: the recipe scales its thresholds."""


class BatchTopK:
    """The (rows * k) largest positive pre-activations of the global batch.

    At inference a row's codes must not depend on the other rows: a latent is active above theta,
    the running mean of the smallest code kept in a batch. The dictionary has it in its buffer
    `threshold`, as (sum, weight) with theta = sum / weight.

    Args:
        sae: The dictionary; gets the buffer.
        decay: Decay of the running mean per batch, from 0 to below 1.
    """

    measured: tuple[str, ...] = ("threshold",)
    row_limit: int | None = None

    def __init__(self, sae: Dictionary, decay: float) -> None:
        self._sae = sae
        self._decay = decay
        sae.add_tensor("threshold", torch.zeros(2, dtype=torch.float64), per_latent=False)

    @property
    def threshold(self) -> Float[Tensor, "2"]:
        """Sum and weight of the running mean."""
        return self._sae.get_buffer("threshold")

    @property
    def theta(self) -> float:
        """Least code at inference; 0 before any batch has been seen."""
        total, weight = self.threshold.tolist()
        return total / weight if weight else 0.0

    def thresholds(self, dtype: torch.dtype) -> Float[Tensor, " n_local"]:
        """Theta, for each latent."""
        return torch.full_like(self._sae.b_enc, self.theta, dtype=dtype)

    def encode(self, products: Products) -> Selected:
        return _above(products, self._sae.b_enc, self.thresholds(self._sae.W_enc.dtype))

    def scale(self, factor: Float[Tensor, ""]) -> None:
        """Scale theta with the codes."""
        self.threshold[0] *= factor

    @torch.no_grad()
    def select(self, products: Products, k: int) -> Selected:
        """Select pre-activations and entries of this shard; in training theta follows."""
        sae, most = self._sae, products.most
        count = k * products.replica_rows * sae.axis.replicas
        found = select.largest(products.blocks, sae.b_enc, count)
        total = int(sae.axis.total(torch.tensor(len(found.values), device=sae.b_enc.device)))
        if total:
            chosen, least = self._reach(found, min(count, total), most)
            found = Candidates(*(part[chosen] for part in found))
            if sae.training:
                self.follow(least.double())
        found = select.by_row(found)
        starts = select.starts_of(found.rows, len(products.rows))
        return found.values, Entries(found.latents, starts, len(sae.W_enc))

    def follow(self, least: Float[Tensor, ""]) -> None:
        """Take the least code of a batch into the running mean.

        The mean covers the last tenth of the run while that is less than the decay covers, because
        codes change much in the first steps. The weight is 1 - decay^n after n batches.
        """
        decay, (total, weight) = self._decay, self.threshold.unbind()
        batches = torch.log1p(-weight) / math.log(decay) if decay else torch.zeros_like(weight)
        kept = (1 / (1 + GROWTH / batches)).clamp(max=decay)
        theta = torch.where(weight > 0, total / weight, least)
        weight = decay * weight + 1 - decay
        self.threshold.copy_(torch.stack([weight * least.lerp(theta, kept), weight]))

    def _reach(self, found: Candidates, count: int, most: int) -> tuple[Tensor, Tensor]:
        """Return a mask of the candidates among all ranks' `count` largest, and the least value."""
        axis = self._sae.axis
        order = ordered(found.values)
        least, before = kth_largest(axis, order, count, bits=32)
        chosen, tied = order >= least, order == least
        missing = count - before
        if int(axis.total(tied.sum())) > missing:
            position = (found.latents + self._sae.first_latent) * (most * axis.replicas)
            position += found.rows + most * axis.replica
            last, _ = kth_largest(axis, -position[tied], missing, bits=64)
            chosen &= ~tied | (-position >= last)
        return chosen, from_ordered(least)


def _above(
    products: Products, b_enc: Float[Tensor, " n_local"], thresholds: Float[Tensor, " n_local"]
) -> Selected:
    found = select.above(products.blocks, b_enc, thresholds)
    assert found is not None  # because there is no limit
    starts = select.starts_of(found.rows, len(products.rows))
    return found.values, Entries(found.latents, starts, len(b_enc))


def kth_largest(
    axis: LatentAxis, values: Int[Tensor, " some"], k: int, *, bits: int
) -> tuple[Int[Tensor, ""], int]:
    """Find the k-th largest value of all ranks, and how many are larger, by radix selection.

    Counts of 16 bits at a time are summed over the ranks; no value leaves its rank.

    Args:
        axis: The ranks.
        values: Signed values of this rank, within `bits` bits.
        k: From 1, at most the number of values of all ranks.
        bits: 32 or 64.
    """
    digits = 1 << _DIGIT
    found, before = values.new_zeros(()), 0
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        # the highest digit is signed: half of its values are negative
        low = digits // 2 if shift == bits - _DIGIT else 0
        digit = ((values >> shift) + low) & (digits - 1)
        from_top = axis.total(torch.bincount(digit, minlength=digits)).flip(0).cumsum(0)
        place = int((from_top < k - before).sum())
        before += int(from_top[place - 1]) if place else 0
        chosen = digits - 1 - place
        values = values[digit == chosen]
        found = found + ((chosen - low) << shift)
    return found, before
