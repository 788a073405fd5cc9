"""Interface of the sparse products and of updates."""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Entries:
    """Positions of the non-zeros of a [batch, n_latents] matrix, row after row.

    Args:
        latents: Column of each entry.
        starts: Index of each row's first entry.
        n_latents: Columns of the matrix.
    """

    def __init__(
        self, latents: Int[Tensor, " entries"], starts: Int[Tensor, " batch"], n_latents: int
    ) -> None:
        self.latents = latents
        self.starts = starts
        self.n_latents = n_latents

    @classmethod
    def stacked(cls, parts: Sequence["Entries"]) -> "Entries":
        """Entries of matrices of the same width, one below the other."""
        if len(parts) == 1:
            return parts[0]
        latents = torch.cat([part.latents for part in parts])
        counts = [0, *accumulate(len(part.latents) for part in parts)]
        starts = [part.starts + before for part, before in zip(parts, counts, strict=False)]
        return cls(latents, torch.cat(starts), parts[0].n_latents)

    def folded(self, batch: int) -> "Entries":
        """Entries of stacked matrices of `batch` rows each, with rows numbered within their matrix.

        For sums by latent alone: the entries of a row do not lie together.
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
        """Entries sorted by latent, and the index of each latent's first."""
        keys = self.latents.int()  # an int32 sort is far faster than an int64 one
        latents, order = keys.sort(stable=True)
        return order, starts_of(latents, self.n_latents)


def starts_of(numbers: Int[Tensor, " entries"], n: int) -> Int[Tensor, " n"]:
    """Index of each number's first entry, or where it would be; the entries are sorted by number.

    Args:
        numbers: Of the entries, ascending.
        n: Numbers from 0 that are asked for.
    """
    # counting them would wait for the device
    asked_for = torch.arange(n, dtype=numbers.dtype, device=numbers.device)
    return torch.searchsorted(numbers, asked_for)


class Adam(NamedTuple):
    """An update by Adam without weight decay: what it has in common for all tensors."""

    number: int
    """Number of this update, counted from 1."""
    lr: float
    beta1: float
    beta2: float
    eps: float
    scale: Float[Tensor, ""]
    """Gradients are divided by it. As `found_inf` fp32 and on the device: no host waits for it."""
    found_inf: Float[Tensor, ""]
    """Unless it is 0 nothing is changed."""

    @property
    def step_size(self) -> float:
        """Factor of exp_avg, corrected for its start at 0."""
        return self.lr / (1 - self.beta1**self.number)

    @property
    def root(self) -> float:
        """Divisor of the root of exp_avg_sq, which corrects it for its start at 0."""
        return float((1 - self.beta2**self.number) ** 0.5)


class Update(Protocol):
    """An update of a tensor in place, with what follows it, in one pass over memory."""

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
            W: The tensor; a matrix if `unit_rows`.
            gradient: Its gradient; is not needed afterwards.
            exp_avg: Running mean of the gradient.
            exp_avg_sq: Running mean of its square.
            adam: The update.
            unit_rows: Give the updated rows unit norm.
            copy: Gets the updated W, in its own type.
        """
        ...


class Kernels(NamedTuple):
    """One implementation of the sparse products and of updates; no gradients, see `autograd`."""

    name: str
    keep_largest: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """The k largest pre-activations of each row so far, with a chunk of latents taken in.

    (best [batch, k], products [batch, chunk], bias [chunk], latents [chunk]) -> [batch, k]

    As keys (`keys.py`): of equal pre-activations the lower latent is kept. The chunk's are its
    products plus the bias. `latents` are the numbers of its columns, ascending.
    """
    above: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    """The pre-activations of a chunk that exceed their column's bound, by row, then by column.

    (products [batch, chunk], bias [chunk], bounds [chunk]) -> values, rows, columns, each [found]
    """
    combine: Callable[[Tensor, Entries, Tensor], Tensor]
    """C W: each row is a sum of rows of W, weighted with the row's coefficients.

    (coefficients [entries], entries, W [n_latents, d_in]) -> [batch, d_in]
    """
    gather_dot: Callable[[Tensor, Entries, Tensor], Tensor]
    """rows W^T at the entries: the product of each entry's row with its latent's row of W.

    (rows [batch, d_in], entries, W [n_latents, d_in]) -> [entries]
    """
    sum_by_latent: Callable[..., Tensor]
    """C^T rows: each latent gets a sum of rows, weighted with its coefficients.

    (coefficients [entries], entries, rows [batch, d_in], W [n_latents, d_in] = None,
    along [n_latents] = None) -> [n_latents, d_in]

    Less along[n] W[n] for each latent n with entries, if these are given.
    """
    sum_values: Callable[[Tensor, Entries], Tensor]
    """The sum of each latent's coefficients, in fp64: a latent that is always on has very many.

    (coefficients [entries], entries) -> [n_latents]
    """
    update: Update
    empty: Callable[[Tensor], Tensor] = torch.empty_like
    """Allocates a gradient of a weight's shape, not filled."""
