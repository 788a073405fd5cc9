"""What every recipe shares: the parameters, the codes, the parts of the loss.

No I/O, no torch.distributed: what ranks do together is behind `LatentAxis`. Both weights are
`[n_latents, d_in]`: dim 0 is the one that is sharded, and a decoder row lies in one piece.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dist_sae.config.sae import DictionaryConfig
from dist_sae.dictionaries.axis import WHOLE, LatentAxis
from dist_sae.kernels import Entries, Kernels, select
from dist_sae.kernels.torch import KERNELS

SPARSE_BELOW = 1 / 32  # share of entries; about where the sparse products begin to be faster


class Codes(NamedTuple):
    """The selected entries of the [batch, n_latents] matrix of codes, row after row."""

    acts: Float[Tensor, " entries"]
    """How strongly each is active; 0: not at all."""
    latents: Int[Tensor, " entries"]
    starts: Int[Tensor, " batch"]
    """Where each row's entries begin."""


class Rows(NamedTuple):
    """Scaled activations of a batch. The targets of a sparse autoencoder are its inputs."""

    inputs: Float[Tensor, "batch d_in"]
    """Read by the encoder."""
    targets: Float[Tensor, "batch d_out"]
    """Reconstructed by the decoder, row for row."""


class Inferred(NamedTuple):
    """Reconstructions and firings at inference."""

    x_hat: Float[Tensor, "batch d_out"]
    """Reconstruction of the targets of this rank's rows."""
    firings: Int[Tensor, " n_local"]
    """Rows of the replica in which each latent of this shard is active."""


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


class LossTerms(NamedTuple):
    """The loss of a batch, in parts: scalars, sums over a replica's ranks, means over replicas."""

    fvu: Float[Tensor, ""]
    """sum |target - x_hat|^2 / (rows * variance of the data set)."""
    auxk: Float[Tensor, ""]
    """sum |e - e_hat|^2 / (rows * variance of e), e the error that the main latents leave."""
    sparsity: Float[Tensor, ""]
    """The recipe's penalty on the codes, or on the routing, with its coefficient."""
    total: Float[Tensor, ""]
    """What is minimised."""


class Routing(NamedTuple):
    """What became of a batch's rows where they are sent to experts."""

    load: Int[Tensor, " experts"]
    """Rows of the global batch that each was sent."""
    dropped: int
    """Rows of the replica that this shard's experts had no room for."""


class Output(NamedTuple):
    """A batch's loss and what is counted from it."""

    terms: LossTerms
    firings: Int[Tensor, " n_local"]
    """Rows of the replica in which each latent of this shard was active."""
    active: Int[Tensor, ""]
    """Active entries of this shard, over the replica's rows."""
    error: Float[Tensor, "batch d_out"]
    """targets - x_hat of this rank's rows, without gradients."""
    routing: Routing | None = None

    @property
    def fired(self) -> Bool[Tensor, " n_local"]:
        """Latents of this shard that were active in a row of the replica."""
        return self.firings > 0


Slots = Callable[[Tensor], Tensor]
"""This rank's inputs of the next batch -> latents that get their directions from the rows of all
ranks, in order. Collective."""


class Dictionary(nn.Module):
    """The parameters that all recipes have, with their products.

    Args:
        config: The recipe.
        d_in: Width of the activations.
        axis: This rank's place; it allocates its shard of the dictionary.
        kernels: The sparse products.
        product_dtype: Precision of the encoder product in training.
        dtype: Precision of the parameters.
    """

    config: DictionaryConfig
    shared: tuple[str, ...] = ("b_dec",)
    """Parameters that every rank holds whole."""
    measured: tuple[str, ...] = ()
    """Buffers that are measured on batches with the parameters as they are."""

    def __init__(
        self,
        config: DictionaryConfig,
        d_in: int,
        axis: LatentAxis = WHOLE,
        kernels: Kernels = KERNELS,
        product_dtype: torch.dtype = torch.float32,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        n_local = config.n_latents // axis.shards
        self.config = config
        self.axis = axis
        self.kernels = kernels
        self.product_dtype = product_dtype
        self.W_enc = nn.Parameter(torch.zeros(n_local, d_in, dtype=dtype))
        self.W_dec = nn.Parameter(torch.zeros(n_local, d_in, dtype=dtype))
        self.b_enc = nn.Parameter(torch.zeros(n_local, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(d_in, dtype=dtype))

    @property
    def n_latents(self) -> int:
        """Width of the whole dictionary."""
        return self.config.n_latents

    @property
    def first_latent(self) -> int:
        """Number of this shard's first latent in the whole dictionary."""
        return self.axis.shard * len(self.W_enc)

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        """Codes of scaled activations as they are at inference, without gradients.

        In the parameters' precision; with this shard's latents, numbered from its first.
        """
        raise NotImplementedError

    @torch.no_grad()
    def infer(self, x: Float[Tensor, "batch d_in"]) -> Inferred:
        """What `encode` and `decode` make of scaled rows, in bounded memory. Collective.

        However many latents are active: recipes without a bound on them decode as they encode.
        """
        codes = self.encode(x)
        entries = Entries(codes.latents, codes.starts, len(self.W_dec))
        return Inferred(self.decode(codes), firings(codes.acts, entries))

    def biases(self) -> tuple[Float[Tensor, " d_in"], Float[Tensor, " d_out"]]:
        """(Subtracted from inputs, added to reconstructions): of an autoencoder b_dec, twice.

        Their gradients are summed over the replica.
        """
        b_dec = self.axis.replicated(self.b_dec)
        return b_dec, b_dec

    def objective(self, rows: Rows, context: StepContext) -> Output:
        """The loss of this rank's rows. All ranks have the same number of rows. Collective."""
        raise NotImplementedError

    def initialise(self, rows: Rows, seed: int) -> None:
        """Set the recipe's initial parameters from this rank's rows of a batch. Collective."""
        raise NotImplementedError

    @torch.no_grad()
    def measure(self, rows: Rows, progress: float = 0.0) -> Float[Tensor, "batch d_out"]:
        """Measure the `measured` buffers on this rank's rows of one batch. Collective.

        Returns:
            The error targets - x_hat that training would have.
        """
        for name in self.measured:
            self.get_buffer(name).zero_()
        none_dead = torch.zeros_like(self.b_enc, dtype=torch.bool)
        return self.objective(rows, StepContext(1.0, none_dead, 0, progress)).error

    @property
    def initial_share(self) -> float:
        """Of the encoder's length with the least squared error: what it begins with."""
        return 1.0

    def open_gates(self, x: Float[Tensor, "batch d_in"]) -> None:
        """Decide how many latents of a new, tied encoder are active; here nothing. Collective.

        `x` are this rank's rows of a batch.
        """

    def scale_encoder(self, factor: Float[Tensor, ""]) -> None:
        """Make all pre-activations `factor` times as large, where b_enc is 0."""
        self.W_enc.mul_(factor)

    @torch.no_grad()
    def decode(self, codes: Codes) -> Float[Tensor, "batch d_out"]:
        """x_hat = acts W_dec + b_dec, of this rank's rows."""
        entries = Entries(codes.latents, codes.starts, len(self.W_dec))
        parts = self.kernels.combine(codes.acts, entries, self.W_dec)
        return self.axis.scatter_sum(parts) + self.b_dec

    @torch.no_grad()
    def decode_above(
        self,
        blocks: Iterable[select.Block],
        bound: Float[Tensor, " n_local"],
        rows: int,
    ) -> tuple[Float[Tensor, "rows d_out"], Int[Tensor, " n_local"]]:
        """(This shard's part of x_hat - b_dec, firings) of all pre-activations above a bound.

        Block by block, densely where many are active: no more than a block is held.

        Args:
            blocks: The products.
            bound: Of each latent; from 0.
            rows: Of the blocks.
        """
        parts = self.W_dec.new_zeros(rows, self.W_dec.shape[1])
        fired = torch.zeros(len(self.W_dec), dtype=torch.int32, device=parts.device)
        for here, latents, products, _ in blocks:
            pre_acts = products + self.b_enc[latents]
            active = pre_acts > bound[latents]
            counts = active.sum(1)
            fired[latents] += active.sum(0, dtype=torch.int32)
            if int(counts.sum()) < SPARSE_BELOW * active.numel():
                which = latents[active.nonzero()[:, 1]]
                entries = Entries(which, counts.cumsum(0) - counts, len(self.W_dec))
                parts[here] += self.kernels.combine(pre_acts[active], entries, self.W_dec)
            else:
                parts[here].addmm_(pre_acts.mul_(active), self.W_dec[latents])
        return parts, fired

    @torch.no_grad()
    def topk_entries(
        self,
        x: Float[Tensor, "rows d_in"],
        k: int,
        *,
        among: Int[Tensor, " some"] | None = None,
        product_dtype: torch.dtype | None = None,
    ) -> tuple[Float[Tensor, " entries"], Entries]:
        """This shard's part of the k largest pre-activations of each row over all shards.

        Args:
            x: The replica's rows, centred where the recipe does.
            k: How many of each row.
            among: This shard's latents to choose from; all if None.
            product_dtype: Precision of the product; that of training if None.
        """
        product_dtype = product_dtype or self.product_dtype
        keys = select.topk_keys(
            x,
            self.W_enc,
            self.b_enc,
            min(k, self.n_latents),
            product_dtype,
            self.kernels,
            first=self.first_latent,
            among=among,
        )
        return self.entries_of(keys, self.axis.kth_largest(keys, k), x, product_dtype)

    def entries_of(
        self,
        keys: Int[Tensor, "rows k"],
        threshold: Int[Tensor, " rows"],
        x: Float[Tensor, "rows d_in"],
        product_dtype: torch.dtype,
    ) -> tuple[Float[Tensor, " entries"], Entries]:
        """(Pre-activations, entries) of the keys that reach their row's threshold."""
        pre_acts, entries = select.entries_of(keys, threshold, self.first_latent, len(self.W_enc))
        if product_dtype == torch.float64:  # keys hold fp32
            pre_acts = self.kernels.gather_dot(x, entries, self.W_enc)
            pre_acts = pre_acts + self.b_enc[entries.latents]
        return pre_acts.to(self.W_enc.dtype), entries

    def forward(self, rows: Rows, context: StepContext) -> Output:
        """`objective`, under the name that wrappers of modules call."""
        return self.objective(rows, context)

    def slots(self, first: int) -> Slots:
        """Assign the rows of coming batches to latents, from `first` on, for their directions.

        A number of `n_latents` or more is none.
        """
        done = first

        def slots(inputs: Tensor) -> Tensor:
            nonlocal done
            rows = len(inputs) * self.axis.replicas * self.axis.shards
            done += rows
            return torch.arange(done - rows, done, device=inputs.device)

        return slots

    def settle(self, new: slice | Tensor, x: Float[Tensor, "batch d_in"]) -> None:
        """What the recipe does to new latents beside known ones; here nothing. Collective.

        Args:
            new: Which of this shard; they have directions and the mean of what the known ones have.
            x: This rank's inputs of a batch.
        """

    def constrain(self) -> None:
        """What the recipe does to the parameters after an update; here nothing."""

    def retie(
        self,
        stuck: Bool[Tensor, " n_local"],
        x: Float[Tensor, "batch d_in"],
        error: Float[Tensor, "batch d_out"],
    ) -> None:
        """Bring back latents that are dead and stay so; does nothing by default. Collective.

        `x` and `error` are this rank's inputs of the last step and `Output.error`.
        """


def firings(acts: Float[Tensor, " entries"], entries: Entries) -> Int[Tensor, " n_local"]:
    """Rows in which each latent is active."""
    rows = torch.zeros(entries.n_latents, dtype=torch.int32, device=acts.device)
    return rows.scatter_add_(0, entries.latents, (acts > 0).int())
