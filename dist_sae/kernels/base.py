"""Interface of the sparse products and of the parameter updates."""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Entries:
    """Positions of the non-zeros of a [batch, n_latents] matrix, in row order (CSR).

    Args:
        latents: Column of each entry.
        starts: Index of each row's first entry.
        n_latents: Number of columns of the matrix.
    """

    def __init__(
        self, latents: Int[Tensor, " entries"], starts: Int[Tensor, " batch"], n_latents: int
    ) -> None:
        self.latents = latents
        self.starts = starts
        self.n_latents = n_latents

    @classmethod
    def stacked(cls, parts: Sequence["Entries"]) -> "Entries":
        """Stack the entries of matrices of the same width vertically."""
        if len(parts) == 1:
            return parts[0]
        latents = torch.cat([part.latents for part in parts])
        counts = [0, *accumulate(len(part.latents) for part in parts)]
        starts = [part.starts + before for part, before in zip(parts, counts, strict=False)]
        return cls(latents, torch.cat(starts), parts[0].n_latents)

    def folded(self, batch: int) -> "Entries":
        """Renumber the rows of stacked matrices of `batch` rows each to be within their matrix.

        The entries of a row are then not adjacent, so use the result only for sums by latent.
        """
        folded = Entries(self.latents, self.starts, self.n_latents)
        folded.rows, folded.by_latent = self.rows % batch, self.by_latent
        return folded

    @cached_property
    def rows(self) -> Int[Tensor, " entries"]:
        """Row of each entry."""
        ends = torch.cat([self.starts[1:], self.starts.new_full((1,), len(self.latents))])
        numbers = torch.arange(len(self.starts), device=self.starts.device)
        return numbers.repeat_interleave(ends - self.starts, output_size=len(self.latents))

    @cached_property
    def by_latent(self) -> tuple[Int[Tensor, " entries"], Int[Tensor, " n_latents"]]:
        """Indices that sort the entries by latent, and each latent's first index among them."""
        keys = self.latents.int()  # an int32 sort is far faster than an int64 one
        latents, order = keys.sort(stable=True)
        return order, starts_of(latents, self.n_latents)


def starts_of(numbers: Int[Tensor, " entries"], n: int) -> Int[Tensor, " n"]:
    """Return the index of the first entry with each number, or where it would be inserted.

    Args:
        numbers: Numbers of the entries, ascending.
        n: How many numbers to look up, from 0.
    """
    # bincount would wait for the device
    asked_for = torch.arange(n, dtype=numbers.dtype, device=numbers.device)
    return torch.searchsorted(numbers, asked_for)


class Adam(NamedTuple):
    """Settings of an Adam update without weight decay, shared by all tensors."""

    number: int
    """Number of this update, counted from 1."""
    lr: float
    beta1: float
    beta2: float
    eps: float
    scale: Float[Tensor, ""]
    """Divisor of the gradients. Like `found_inf`, it is fp32 and on the device, to avoid a sync."""
    found_inf: Float[Tensor, ""]
    """If it is not 0, nothing is changed."""

    @property
    def step_size(self) -> float:
        """Learning rate with the bias correction of exp_avg, which starts at 0."""
        return self.lr / (1 - self.beta1**self.number)

    @property
    def root(self) -> float:
        """Divisor of sqrt(exp_avg_sq): the bias correction of exp_avg_sq, which starts at 0."""
        return float((1 - self.beta2**self.number) ** 0.5)


class Update(Protocol):
    """An in-place update of a tensor plus row normalization and a copy, in one pass if possible."""

    def __call__(
        self,
        W: Float[Tensor, "*shape"],
        gradient: Float[Tensor, "*shape"],
        exp_avg: Float[Tensor, "*shape"],
        exp_avg_sq: Float[Tensor, "*shape"],
        adam: Adam,
        *,
        unit_rows: bool = False,
        copy: Float[Tensor, "*shape"] | None = None,
    ) -> None:
        """Update a tensor and its moments; see `Adam`.

        Args:
            W: The tensor. Must be a matrix if `unit_rows`.
            gradient: The gradient of W. It may be overwritten.
            exp_avg: Running mean of the gradient.
            exp_avg_sq: Running mean of the squared gradient.
            adam: Settings of the update.
            unit_rows: Whether to normalize the updated rows to unit norm.
            copy: Tensor that gets the updated W, converted to its dtype.
        """
        ...


class Kernels(NamedTuple):
    """One implementation of the sparse products and updates. For gradients see `autograd`."""

    name: str
    keep_largest: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """Merges a chunk of latents into each row's k largest pre-activations so far.

    (best [batch, k], products [batch, chunk], bias [chunk], latents [chunk]) -> [batch, k]

    `best` and the result are keys (`keys.py`), so among equal pre-activations the lower latent is
    kept. The chunk's pre-activations are products + bias. `latents` are the latents of its columns,
    ascending.
    """
    above: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    """Finds the pre-activations of a chunk that exceed their column's bound, by row, then column.

    (products [batch, chunk], bias [chunk], bounds [chunk]) -> values, rows, columns, each [found]
    """
    combine: Callable[[Tensor, Entries, Tensor], Tensor]
    """Computes C W: each row is a sum of rows of W, weighted by the row's coefficients.

    (coefficients [entries], entries, W [n_latents, d_in]) -> [batch, d_in]
    """
    gather_dot: Callable[[Tensor, Entries, Tensor], Tensor]
    """Computes rows W^T at the entries: the dot product of each entry's row with its row of W.

    (rows [batch, d_in], entries, W [n_latents, d_in]) -> [entries]
    """
    sum_by_latent: Callable[..., Tensor]
    """Computes C^T rows: each latent gets a sum of rows, weighted by its coefficients.

    (coefficients [entries], entries, rows [batch, d_in], W [n_latents, d_in] = None,
    along [n_latents] = None) -> [n_latents, d_in]

    If W and along are given, along[n] W[n] is subtracted for each latent n with entries.
    """
    sum_values: Callable[[Tensor, Entries], Tensor]
    """Sums each latent's coefficients, in fp64 because a latent that is always active has many.

    (coefficients [entries], entries) -> [n_latents]
    """
    update: Update
    empty: Callable[[Tensor], Tensor] = torch.empty_like
    """Allocates an uninitialized gradient with a weight's shape."""
