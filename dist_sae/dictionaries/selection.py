"""Selections: rules that decide which pre-activations of a batch become codes.

    RowTopK     the k largest of each row
    BatchTopK   the (rows * k) largest positive ones of the global batch; at inference those above
                a running threshold
    Threshold   those above their latent's threshold

Among equal pre-activations the lower latent wins, then the earlier row of the global batch.
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
from dist_sae.kernels import Entries, device_select, select, starts_of
from dist_sae.kernels.keys import NO_ENTRY, from_ordinals, to_ordinals
from dist_sae.kernels.select import Candidates

_DIGIT = 11  # bits


class RowTopK:
    """Selection of the k largest pre-activations of each row, over all shards.

    Args:
        sae: The dictionary.
        k: Latents kept per row at inference.
        axis: The ranks that hold a row's latents.
        parts: Number of experts among which a row's k is divided equally. An expert's rows are
            separate rows of the products.
        width: Latents per expert.
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
        """Select the k largest of each row. Return this shard's pre-activations and entries."""
        [selected] = self.select_nested(products, [k])
        return selected

    @torch.no_grad()
    def select_nested(self, products: Products, ks: Sequence[int]) -> list[Selected]:
        """Select the largest of each row for ascending ks.

        The results are disjoint: each contains only the entries that its k adds to the one before.
        """
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
                count = sum(n * min(k, met) for n, met in products.row_groups) - before
                before += count
            pre_acts, entries = select.entries_of(left, threshold, first, n_local, count)
            left = left.masked_fill(left >= threshold[:, None], NO_ENTRY)
            if products.dtype == torch.float64:  # keys contain only fp32 values
                pre_acts = sae.pre_acts_at(products.rows, entries)
            found.append((pre_acts.to(sae.W_enc.dtype), entries))
        return found

    def encode(self, products: Products) -> Selected:
        pre_acts, entries = self.select(products, self._k)
        return pre_acts.relu(), entries

    def thresholds(self, dtype: torch.dtype) -> None:
        """Return None, because each row keeps a fixed number of codes."""

    def scale(self, factor: Float[Tensor, ""]) -> None:
        """Do nothing: there is no threshold to scale."""


class Threshold:
    """Selection of the pre-activations above their latent's threshold.

    Args:
        sae: The dictionary.
        thresholds: Returns the latents' thresholds, at least 0, in a given precision.
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
        """Do nothing: the recipe scales its thresholds itself."""


class BatchTopK:
    """Selection of the (rows * k) largest positive pre-activations of the global batch.

    At inference a row's codes must not depend on other rows. So a latent is active if it exceeds
    theta, the running mean of the smallest code kept in a batch. The dictionary stores theta in its
    buffer `threshold`, as (sum, weight) with theta = sum / weight.

    Args:
        sae: The dictionary. It gets the buffer.
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
        """Threshold that codes must exceed at inference. 0 before the first batch."""
        total, weight = self.threshold.tolist()
        return total / weight if weight else 0.0

    def thresholds(self, dtype: torch.dtype) -> Float[Tensor, " n_local"]:
        """Return theta for each latent."""
        return torch.full_like(self._sae.b_enc, self.theta, dtype=dtype)

    def encode(self, products: Products) -> Selected:
        return _above(products, self._sae, self.thresholds(self._sae.W_enc.dtype))

    def scale(self, factor: Float[Tensor, ""]) -> None:
        """Scale theta along with the codes."""
        self.threshold[0] *= factor

    @torch.no_grad()
    def select(self, products: Products, k: int) -> Selected:
        """Select this shard's pre-activations and entries. In training mode, update theta."""
        sae, axis = self._sae, self._sae.axis
        count = k * products.replica_rows * axis.replicas
        found = self._candidates(products, count)
        n_found = torch.full((), len(found.values), device=sae.b_enc.device)
        total = axis.total(n_found)
        chosen, least = self._choose(found, total.clamp(max=count), products.max_rows)
        if sae.training:
            self.update_threshold(least.double(), total > 0)
        alone = axis.replicas * axis.shards == 1
        places = select.true_indices(chosen, min(count, len(found.values)) if alone else None)
        found = select.by_row(Candidates(*(part[places] for part in found)))
        starts = starts_of(found.rows, len(products.rows))
        return found.values, Entries(found.latents, starts, len(sae.W_enc))

    def _candidates(self, products: Products, count: int) -> Candidates:
        """Return all of this shard's entries that may be among the `count` largest, and others."""
        b_enc, found = self._sae.b_enc, None
        if b_enc.device.type != "cpu":
            found = device_select.largest(products.blocks(), b_enc, count)
        if found is not None:
            return found
        return select.largest(products.blocks(), b_enc, count, self._sae.kernels)

    def update_threshold(self, least: Float[Tensor, ""], is_there: Bool[Tensor, ""]) -> None:
        """Update the running mean with the smallest code of a batch, if the batch has any codes.

        Codes change a lot in the first steps. So the mean covers only the last tenth of the batches
        so far, until that is more than the decay covers. The weight is 1 - decay^n after n batches.
        """
        decay, (total, weight) = self._decay, self.threshold.unbind()
        batches = torch.log1p(-weight) / math.log(decay) if decay else torch.zeros_like(weight)
        kept = (1 / (1 + GROWTH / batches)).clamp(max=decay)
        theta = torch.where(weight > 0, total / weight, least)
        weight = decay * weight + 1 - decay
        followed = torch.stack([weight * least.lerp(theta, kept), weight])
        self.threshold.copy_(torch.where(is_there, followed, self.threshold))

    def _choose(
        self, found: Candidates, count: Int[Tensor, ""], max_rows: int
    ) -> tuple[Bool[Tensor, " _"], Float[Tensor, ""]]:
        """Return a mask of the candidates among all ranks' `count` largest, and the least value."""
        axis = self._sae.axis
        order = to_ordinals(found.values)
        least, before = kth_largest(axis, order, count, bits=32)
        chosen, tied = order >= least, order == least
        missing = count - before
        # only on a CPU is it known without a device sync whether there are too many ties
        if tied.device.type != "cpu" or int(axis.total(tied.sum())) > missing:
            position = (found.latents + self._sae.first_latent) * (max_rows * axis.replicas)
            position += found.rows + max_rows * axis.replica
            last, _ = kth_largest(axis, -position, missing, bits=64, among=tied)
            chosen &= ~tied | (-position >= last)
        return chosen, from_ordinals(least)


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
    """Find the k-th largest value over all ranks, and how many are larger, by radix selection.

    Histograms of 11 bits at a time are summed over the ranks. Values stay on their rank and on the
    device.

    Args:
        axis: The ranks.
        values: Signed values of this rank, within `bits` bits.
        k: Rank of the value, from 1 to the number of values over all ranks. If k is 0, the result
            is larger than all values.
        bits: 32 or 64.
        among: Mask of the values to consider. All if None.
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
