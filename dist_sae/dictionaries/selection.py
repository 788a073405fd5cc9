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
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from dist_sae.dictionaries.axis import LatentAxis
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.interface import Products, Selected
from dist_sae.dictionaries.schedules import GROWTH
from dist_sae.kernels import Entries, queued, select, starts_of
from dist_sae.kernels.keys import NOTHING, from_ordered, ordered
from dist_sae.kernels.select import Candidates

_DIGIT = 11  # bits


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
            products.blocks(), len(products.rows), sae.b_enc, ks[-1], sae.kernels, first=first
        )
        left, found, before = keys, [], 0
        for k in ks:
            threshold, count = self._axis.kth_largest(keys, k), None
            if self._axis.shards == 1:
                count = sum(n * min(k, met) for n, met in products.met) - before
                before += count
            pre_acts, entries = select.entries_of(left, threshold, first, n_local, count)
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
        pre_acts, entries = _above(products, sae, self.thresholds(sae.W_enc.dtype))
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
        return _above(products, self._sae, self.thresholds(self._sae.W_enc.dtype))

    def scale(self, factor: Float[Tensor, ""]) -> None:
        """Scale theta with the codes."""
        self.threshold[0] *= factor

    @torch.no_grad()
    def select(self, products: Products, k: int) -> Selected:
        """Select pre-activations and entries of this shard; in training theta follows."""
        sae, axis = self._sae, self._sae.axis
        count = k * products.replica_rows * axis.replicas
        found = self._candidates(products, count)
        n_found = torch.full((), len(found.values), device=sae.b_enc.device)
        total = axis.total(n_found)
        chosen, least = self._reach(found, total.clamp(max=count), products.most)
        if sae.training:
            self.follow(least.double(), total > 0)
        alone = axis.replicas * axis.shards == 1
        places = select.places_of(chosen, min(count, len(found.values)) if alone else None)
        found = select.by_row(Candidates(*(part[places] for part in found)))
        starts = starts_of(found.rows, len(products.rows))
        return found.values, Entries(found.latents, starts, len(sae.W_enc))

    def _candidates(self, products: Products, count: int) -> Candidates:
        """This shard's entries that may be among the `count` largest, and some others."""
        b_enc, found = self._sae.b_enc, None
        if b_enc.device.type != "cpu":
            found = queued.largest(products.blocks(), b_enc, count)
        if found is not None:
            return found
        return select.largest(products.blocks(), b_enc, count, self._sae.kernels)

    def follow(self, least: Float[Tensor, ""], is_there: Bool[Tensor, ""]) -> None:
        """Take the least code of a batch, if there is one, into the running mean.

        The mean covers the last tenth of the run while that is less than the decay covers, because
        codes change much in the first steps. The weight is 1 - decay^n after n batches.
        """
        decay, (total, weight) = self._decay, self.threshold.unbind()
        batches = torch.log1p(-weight) / math.log(decay) if decay else torch.zeros_like(weight)
        kept = (1 / (1 + GROWTH / batches)).clamp(max=decay)
        theta = torch.where(weight > 0, total / weight, least)
        weight = decay * weight + 1 - decay
        followed = torch.stack([weight * least.lerp(theta, kept), weight])
        self.threshold.copy_(torch.where(is_there, followed, self.threshold))

    def _reach(
        self, found: Candidates, count: Int[Tensor, ""], most: int
    ) -> tuple[Bool[Tensor, " _"], Float[Tensor, ""]]:
        """Return a mask of the candidates among all ranks' `count` largest, and the least value."""
        axis = self._sae.axis
        order = ordered(found.values)
        least, before = kth_largest(axis, order, count, bits=32)
        chosen, tied = order >= least, order == least
        missing = count - before
        # whether there are too many of them is known without a wait on a CPU alone
        if tied.device.type != "cpu" or int(axis.total(tied.sum())) > missing:
            position = (found.latents + self._sae.first_latent) * (most * axis.replicas)
            position += found.rows + most * axis.replica
            last, _ = kth_largest(axis, -position, missing, bits=64, among=tied)
            chosen &= ~tied | (-position >= last)
        return chosen, from_ordered(least)


def _above(products: Products, sae: Dictionary, thresholds: Float[Tensor, " n_local"]) -> Selected:
    b_enc = sae.b_enc
    found = select.above(products.blocks(), b_enc, thresholds, sae.kernels)
    assert found is not None  # because there is no limit
    starts = starts_of(found.rows, len(products.rows))
    return found.values, Entries(found.latents, starts, len(b_enc))


def kth_largest(
    axis: LatentAxis,
    values: Int[Tensor, " some"],
    k: Int[Tensor, ""],
    *,
    bits: int,
    among: Bool[Tensor, " some"] | None = None,
) -> tuple[Int[Tensor, ""], Int[Tensor, ""]]:
    """Find the k-th largest value of all ranks, and how many are larger, by radix selection.

    Counts of 11 bits at a time are summed over the ranks; no value leaves its rank, and none is
    known to the host.

    Args:
        axis: The ranks.
        values: Signed values of this rank, within `bits` bits.
        k: From 1, at most the number of values of all ranks. With 0 no value is as large as what is
            found.
        bits: 32 or 64.
        among: Mask of the values that count; all if None.
    """
    digits = 1 << _DIGIT
    found, before = values.new_zeros(()), k.new_zeros(())
    counted = torch.ones_like(values) if among is None else among.long()
    for shift in reversed(range(0, bits, _DIGIT)):
        # the highest digit is signed: half of its values are negative
        low = digits // 2 if shift + _DIGIT >= bits else 0
        digit = ((values >> shift) + low) & (digits - 1)
        counts = values.new_zeros(digits).scatter_add_(0, digit, counted)
        from_top = F.pad(axis.total(counts).flip(0).cumsum(0), (1, 0))
        place = (from_top[1:] < k - before).sum()
        before = before + from_top.take(place)
        chosen = digits - 1 - place
        counted = counted * (digit == chosen)
        found = found + ((chosen - low) << shift)
    return found, before
