"""The types that go in and out of dictionaries and selections."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dist_sae.kernels import Entries, select


class Widths(NamedTuple):
    """Widths of the sites that a dictionary reads and writes, in their order."""

    reads: tuple[int, ...]
    writes: tuple[int, ...]

    @classmethod
    def of(cls, widths: "Widths | int") -> "Widths":
        """The widths themselves; a number is the width of the one site of an autoencoder."""
        return cls((widths,), (widths,)) if isinstance(widths, int) else widths

    @property
    def d_in(self) -> int:
        """Width of the inputs: the sites that are read, side by side."""
        return sum(self.reads)

    @property
    def d_out(self) -> int:
        """Width of the targets: the sites that are written, side by side."""
        return sum(self.writes)


class Codes(NamedTuple):
    """The selected entries of the [batch, n_latents] matrix of codes, row after row."""

    acts: Float[Tensor, " entries"]
    """Codes, at least 0; at 0 the latent is not active."""
    latents: Int[Tensor, " entries"]
    starts: Int[Tensor, " batch"]
    """Index of each row's first entry."""


Selected = tuple[Float[Tensor, " _"], Entries]
"""Values and places of the entries that a selection picks from this shard's pre-activations."""


class Products(NamedTuple):
    """The encoder product of rows with this shard's latents, block by block."""

    rows: Float[Tensor, "rows d_in"]
    """Inputs as the encoder reads them: centred, if the recipe centres."""
    dtype: torch.dtype
    """Precision of the product."""
    blocks: Callable[[], Iterable[select.Block]]
    """Computes them; each block is overwritten by the next."""
    replica_rows: int
    """Rows of the replica's batch that these are of."""
    most: int
    """A bound on the number of rows that is the same on all ranks."""
    met: Sequence[tuple[int, int]]
    """Numbers of rows, and how many latents of this shard each of these meets; others meet none."""


class Selection(Protocol):
    """Decides which pre-activations become codes at inference; see `selection.py`."""

    measured: tuple[str, ...]
    """Buffers of the dictionary that are measured on batches, with fixed parameters."""
    row_limit: int | None
    """Number of codes, over all shards, that a row keeps at inference; None if every shard decides
    about its own latents."""

    def encode(self, products: Products) -> Selected:
        """Codes, as at inference."""
        ...

    def thresholds(self, dtype: torch.dtype) -> Float[Tensor, " n_local"] | None:
        """The code that each latent must exceed; None if a row keeps a number of codes."""
        ...

    def scale(self, factor: Float[Tensor, ""]) -> None:
        """Adapt to pre-activations that have become `factor` times as large."""
        ...


class Rows(NamedTuple):
    """Scaled activations of a batch. The targets of an autoencoder are its inputs."""

    inputs: Float[Tensor, "batch d_in"]
    """The sites that the encoder reads, side by side."""
    targets: Float[Tensor, "batch d_out"]
    """The sites that the decoder reconstructs, row for row, side by side."""


class Inferred(NamedTuple):
    """Reconstructions and firings at inference."""

    x_hat: Float[Tensor, "batch d_out"]
    """Reconstruction of the targets of this rank's rows."""
    firings: Int[Tensor, " n_local"]
    """Rows of the replica in which each latent of this shard is active."""


@runtime_checkable
class Inference(Protocol):
    """A trained dictionary as its users see it, in memory or on disk."""

    def infer(self, x: Float[Tensor, "batch d_in"]) -> Inferred:
        """Reconstructions and firings."""
        ...


class StepContext(NamedTuple):
    """State of the run that the loss of a step depends on."""

    variance: float
    """Variance of the targets over the data set, in their scale."""
    dead: Bool[Tensor, " n_local"]
    """Latents of this shard that have not fired for `dead_after_rows`."""
    n_dead: int
    """Dead latents of all shards."""
    progress: float
    """Share of the run's steps that are done, from 0 to below 1."""
    dead_here: Sequence[int] | None = None
    """Numbers of this shard's dead latents, of each layer that is read. The host waits for the
    device where they are not given."""


class LossTerms(NamedTuple):
    """Terms of a batch's loss. Scalars; summed over a replica's ranks, averaged over replicas."""

    fvu: Float[Tensor, ""]
    """sum |target - x_hat|^2 / (rows * variance of the data set)."""
    auxk: Float[Tensor, ""]
    """sum |e - e_hat|^2 / (rows * variance of e), with e = target - x_hat. In the gated recipe, the
    FVU of the reconstruction from the gates."""
    sparsity: Float[Tensor, ""]
    """The recipe's penalty on the codes, or on the routing, with its coefficient."""
    total: Float[Tensor, ""]
    """The sum that training minimises."""


class Routing(NamedTuple):
    """Distribution of a batch's rows over experts."""

    load: Int[Tensor, " experts"]
    """Rows of the global batch sent to each expert."""
    dropped: int
    """Rows of the replica beyond the capacity of this shard's experts."""


class Output(NamedTuple):
    """Loss, firings and error of a batch."""

    terms: LossTerms
    firings: Int[Tensor, " n_local"]
    """Rows of the replica in which each latent of this shard was active."""
    active: Int[Tensor, ""]
    """Active entries of this shard, over the replica's rows."""
    error: Float[Tensor, "batch d_out"]
    """targets - x_hat of this rank's rows, without gradients."""
    routing: Routing | None = None
    prefix_fvu: Sequence[Float[Tensor, ""]] = ()
    """FVU of each nested dictionary, summed as the terms of the loss are."""

    @property
    def fired(self) -> Bool[Tensor, " n_local"]:
        """Latents of this shard that were active in a row of the replica."""
        return self.firings > 0


Slots = Callable[[Tensor], Tensor]
"""This rank's inputs of the next batch -> latents that get their directions from the rows of all
ranks, in order. Collective."""
