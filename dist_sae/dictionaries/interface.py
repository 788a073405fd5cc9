"""Types of the arguments and results of dictionaries and selections."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dist_sae.kernels import Entries, select


class Widths(NamedTuple):
    """Widths of the sites that a dictionary reads and writes, in order."""

    reads: tuple[int, ...]
    writes: tuple[int, ...]

    @classmethod
    def of(cls, widths: "Widths | int") -> "Widths":
        """Return the widths. A number means an autoencoder of a single site of that width."""
        return cls((widths,), (widths,)) if isinstance(widths, int) else widths

    @property
    def d_in(self) -> int:
        """Width of the inputs: the sum over the sites that are read."""
        return sum(self.reads)

    @property
    def d_out(self) -> int:
        """Width of the targets: the sum over the sites that are written."""
        return sum(self.writes)


class Codes(NamedTuple):
    """The selected entries of the [batch, n_latents] code matrix, row by row."""

    acts: Float[Tensor, " entries"]
    """Codes, at least 0. A latent with a code of 0 is not active."""
    latents: Int[Tensor, " entries"]
    starts: Int[Tensor, " batch"]
    """Index of each row's first entry."""


Selected = tuple[Float[Tensor, " _"], Entries]
"""Values and positions of the entries that a selection picks from this shard's pre-activations."""


class Products(NamedTuple):
    """The encoder product of rows with this shard's latents, block by block."""

    rows: Float[Tensor, "rows d_in"]
    """Inputs as the encoder reads them: centered if the recipe centers them."""
    dtype: torch.dtype
    """Precision of the product."""
    blocks: Callable[[], Iterable[select.Block]]
    """Computes the blocks. Each block is overwritten by the next."""
    replica_rows: int
    """Number of rows in the replica's batch."""
    max_rows: int
    """Upper bound on the number of rows, the same on all ranks."""
    row_groups: Sequence[tuple[int, int]]
    """Pairs (n, m): n rows that meet m of this shard's latents each. Other rows meet none."""


class Selection(Protocol):
    """The rule by which pre-activations become codes at inference; see `selection.py`."""

    measured: tuple[str, ...]
    """Buffers of the dictionary that are measured on batches, not learned."""
    row_limit: int | None
    """Number of codes, over all shards, that a row keeps at inference. None if each shard decides
    about its latents independently."""

    def encode(self, products: Products) -> Selected:
        """Compute the codes as at inference."""
        ...

    def thresholds(self, dtype: torch.dtype) -> Float[Tensor, " n_local"] | None:
        """Return each latent's threshold, or None if each row keeps a fixed number of codes."""
        ...

    def scale(self, factor: Float[Tensor, ""]) -> None:
        """Adapt to pre-activations that have been multiplied by `factor`."""
        ...


class Rows(NamedTuple):
    """Scaled activations of a batch. An autoencoder's targets are its inputs."""

    inputs: Float[Tensor, "batch d_in"]
    """The sites that the encoder reads, concatenated along dim 1."""
    targets: Float[Tensor, "batch d_out"]
    """The sites that the decoder reconstructs, for the same rows, concatenated along dim 1."""


class Inferred(NamedTuple):
    """Reconstructions and firings at inference."""

    x_hat: Float[Tensor, "batch d_out"]
    """Reconstruction of the targets of this rank's rows."""
    firings: Int[Tensor, " n_local"]
    """Number of the replica's rows on which each latent of this shard is active."""


@runtime_checkable
class Inference(Protocol):
    """A trained dictionary, in memory or on disk, that can reconstruct rows."""

    def infer(self, x: Float[Tensor, "batch d_in"]) -> Inferred:
        """Compute reconstructions and firings."""
        ...


class StepContext(NamedTuple):
    """State of the run that the loss of a step depends on."""

    variance: float
    """Variance of the scaled targets over the data set."""
    dead: Bool[Tensor, " n_local"]
    """Mask of this shard's latents that have not fired for `dead_after_rows` rows."""
    n_dead: int
    """Number of dead latents over all shards."""
    progress: float
    """Share of the run's steps that are done, from 0 to below 1."""
    n_dead_by_layer: Sequence[int] | None = None
    """Numbers of this shard's dead latents, one per input layer. Without them the host waits for
    the device."""


class LossTerms(NamedTuple):
    """Terms of a batch's loss: scalars, to sum over a replica's ranks and average over replicas."""

    fvu: Float[Tensor, ""]
    """sum |target - x_hat|^2 / (rows * variance of the data set)."""
    auxk: Float[Tensor, ""]
    """sum |e - e_hat|^2 / (rows * variance of e), with e = target - x_hat. In the gated recipe, the
    FVU of the reconstruction from the gates."""
    sparsity: Float[Tensor, ""]
    """The recipe's penalty on the codes or on the routing, times its coefficient."""
    total: Float[Tensor, ""]
    """The sum that training minimizes."""


class Routing(NamedTuple):
    """Distribution of a batch's rows over experts."""

    load: Int[Tensor, " experts"]
    """Number of rows of the global batch sent to each expert."""
    dropped: int
    """Number of the replica's rows beyond the capacity of this shard's experts."""


class Output(NamedTuple):
    """Loss, firings and error of a batch."""

    terms: LossTerms
    firings: Int[Tensor, " n_local"]
    """Number of the replica's rows on which each latent of this shard was active."""
    active: Int[Tensor, ""]
    """Number of this shard's active entries over the replica's rows."""
    error: Float[Tensor, "batch d_out"]
    """targets - x_hat of this rank's rows, without gradients."""
    routing: Routing | None = None
    prefix_fvu: Sequence[Float[Tensor, ""]] = ()
    """FVU of each nested dictionary, to reduce over ranks in the same way as `terms`."""

    @property
    def fired(self) -> Bool[Tensor, " n_local"]:
        """Mask of this shard's latents that were active on any row of the replica."""
        return self.firings > 0


RowAssigner = Callable[[Tensor], Tensor]
"""Maps this rank's inputs of the next batch to the latents that get their directions from the rows
of all ranks, in order. Collective."""
