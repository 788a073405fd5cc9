"""The base class of all dictionaries: the shared behavior, and hooks that recipes may override.

It does no I/O and does not use torch.distributed. Ranks communicate through `LatentAxis`.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dist_sae.config.dictionary import DictionaryConfig
from dist_sae.dictionaries.axis import WHOLE, LatentAxis
from dist_sae.dictionaries.constraints import normalise_rows_
from dist_sae.dictionaries.interface import (
    Codes,
    Inferred,
    Output,
    Products,
    RowAssigner,
    Rows,
    Selection,
    StepContext,
    Widths,
)
from dist_sae.dictionaries.weights import Weights
from dist_sae.kernels import Entries, Kernels, autograd, select
from dist_sae.kernels.torch import KERNELS

SPARSE_BELOW = 1 / 32  # share of active entries below which the sparse products are faster


class Dictionary(Weights):
    """A dictionary: its weights, encoding, decoding and loss.

    Args:
        config: The recipe.
        widths: See `Weights`.
        axis: See `Weights`.
        kernels: The sparse products.
        product_dtype: Precision of the encoder product in training.
        dtype: Precision of the parameters.
    """

    selection: Selection
    """The rule by which pre-activations become codes. Set by the recipe."""
    decoder: frozenset[str] = frozenset({"W_dec"})
    """Per-latent tensors that are needed for decoding but not for encoding."""
    unit_rows: bool = True
    """Whether decoder rows are held at unit norm."""
    encoder_copy: Tensor | select.EncoderRows | None = None
    """Copy of W_enc in `product_dtype` that the caller keeps up to date, or a stored encoder."""

    def __init__(
        self,
        config: DictionaryConfig,
        widths: Widths | int,
        axis: LatentAxis = WHOLE,
        kernels: Kernels = KERNELS,
        product_dtype: torch.dtype = torch.float32,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(config, widths, axis, dtype)
        self.kernels = kernels
        self.product_dtype = product_dtype

    def pre_acts_at(
        self, rows: Float[Tensor, "rows d_in"], entries: Entries
    ) -> Float[Tensor, " entries"]:
        """Compute the pre-activations at the entries in the parameters' precision. No gradient."""
        return self.kernels.gather_dot(rows, entries, self.W_enc) + self.b_enc[entries.latents]

    def encode_at(
        self,
        pre_acts: Float[Tensor, " entries"],
        entries: Entries,
        rows: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "n_local read"],
        centre: Float[Tensor, " d_in"] | None = None,
    ) -> Float[Tensor, " entries"]:
        """Return the selection's pre-activations with gradients attached; see `autograd.encode`."""
        return autograd.encode(pre_acts, self.kernels, entries, rows, W_enc, self.b_enc, centre)

    def decode_at(
        self,
        acts: Float[Tensor, " entries"],
        entries: Entries,
        W_dec: Float[Tensor, "n_local written"],
    ) -> Float[Tensor, "rows d_out"]:
        """Compute this shard's part of x_hat - b_dec with gradients; see `autograd.decode`."""
        return autograd.decode(acts, self.kernels, entries, W_dec, unit_rows=self.unit_rows)

    def encoder_for(self, dtype: torch.dtype) -> Float[Tensor, "n_local read"] | select.EncoderRows:
        """Return W_enc for products in `dtype`: the copy if it has that precision, else W_enc."""
        copy = self.encoder_copy
        return self.W_enc if copy is None or copy.dtype != dtype else copy

    def products(
        self,
        rows: Float[Tensor, "rows d_in"],
        dtype: torch.dtype,
        among: Int[Tensor, " some"] | None = None,
        counts: Sequence[int] | None = None,
    ) -> Products:
        """Return the product of the replica's rows with this shard's encoder.

        Args:
            rows: Rows from `encoder_inputs`.
            dtype: Precision of the product.
            among: This shard's latents to compute, ascending. All if None.
            counts: Numbers of these latents, one per input layer, if known.
        """
        weights, layers = self.encoder_for(dtype), self.layers
        blocks = partial(select.products, rows, weights, dtype, among, layers=layers, counts=counts)
        n_met = len(self.W_enc) if among is None else len(among)
        return Products(rows, dtype, blocks, len(rows), len(rows), [(len(rows), n_met)])

    def encoder_inputs(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "rows d_in"]:
        """Return the replica's inputs as the encoder reads them. Not centered by default.

        No gradient.
        """
        return self.axis.gather(x)

    @torch.no_grad()
    def inference_thresholds(
        self, dtype: torch.dtype | None = None
    ) -> Float[Tensor, " n_local"] | None:
        """Return the pre-activation that each latent must exceed to be active at inference.

        Args:
            dtype: Precision of the thresholds. The parameters' precision if None.

        Returns:
            The thresholds, or None if each row keeps a fixed number of latents.
        """
        return self.selection.thresholds(dtype or self.W_enc.dtype)

    def codes_of(
        self,
        pre_acts: Float[Tensor, "*rows some"],
        latents: Int[Tensor, " some"],  # noqa: ARG002 - the same for all
    ) -> Float[Tensor, "*rows some"]:
        """Return the codes of pre-activations that exceed their threshold. The same by default.

        Args:
            pre_acts: Pre-activations. May be changed in place.
            latents: Latents of the last dim.
        """
        return pre_acts

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        """Compute the codes of inputs as at inference, without gradients.

        Codes have the parameters' precision. Latents are this shard's, numbered from its first.
        """
        inputs = self.encoder_inputs(x)
        acts, entries = self.selection.encode(self.products(inputs, self.W_enc.dtype))
        return Codes(acts, entries.latents, entries.starts)

    @torch.no_grad()
    def infer(self, x: Float[Tensor, "batch d_in"]) -> Inferred:
        """Encode and decode in memory that does not grow with the active latents. Collective.

        Selections that do not bound the number of active latents are decoded block by block, while
        they are encoded.
        """
        parts, fired = self.infer_shard(x)
        return Inferred(self.axis.scatter_sum(parts) + self.offset(x), fired)

    def offset(
        self,
        x: Float[Tensor, "batch d_in"],  # noqa: ARG002 - the same for all rows
    ) -> Float[Tensor, "*rows d_out"]:
        """Return the part of x_hat that no latent contributes: b_dec by default.

        Its gradients are summed over the replica.
        """
        return self.axis.replicated(self.b_dec)

    @torch.no_grad()
    def infer_shard(
        self, x: Float[Tensor, "batch d_in"]
    ) -> tuple[Float[Tensor, "rows d_out"], Int[Tensor, " n_local"]]:
        """Return this shard's part of x_hat - offset for the replica's rows, and its firings."""
        thresholds = self.inference_thresholds()
        if thresholds is None:
            codes = self.encode(x)
            entries = Entries(codes.latents, codes.starts, len(self.W_dec))
            return self.decode_shard(codes), firings(codes.acts, entries)
        inputs = self.encoder_inputs(x)
        blocks = self.products(inputs, self.W_enc.dtype).blocks()
        return self.decode_above(blocks, thresholds, len(inputs))

    def objective(self, rows: Rows, context: StepContext) -> Output:
        """Compute the loss of this rank's rows. All ranks pass equally many rows. Collective."""
        raise NotImplementedError

    def initialise(self, rows: Rows, seed: int, *, rescale: bool = True) -> None:
        """Set the recipe's initial parameters from this rank's rows of a batch. Collective.

        Args:
            rows: This rank's part of the first batch.
            seed: Seed of the directions.
            rescale: Whether to set the encoder's length. False if `initialise_from_data` follows,
                which sets it, to save a product of all rows and latents. Penalised recipes
                ignore it, because the rounding of their directions depends on that length. CLTs
                ignore it too, because they take no directions from data.
        """
        raise NotImplementedError

    @torch.no_grad()
    def measure(self, rows: Rows, progress: float = 0.0) -> Float[Tensor, "batch d_out"]:
        """Measure the selection's `measured` buffers on this rank's rows of one batch. Collective.

        Returns:
            The error, targets - x_hat, that a training step on these rows would have.
        """
        for name in self.selection.measured:
            self.get_buffer(name).zero_()
        none_dead = torch.zeros_like(self.b_enc, dtype=torch.bool)
        return self.objective(rows, StepContext(1.0, none_dead, 0, progress)).error

    @property
    def initial_length_ratio(self) -> float:
        """Initial length of the encoder, divided by the length with the least squared error."""
        return 1.0

    def set_initial_sparsity(self, x: Float[Tensor, "batch d_in"]) -> None:
        """Set how many latents of a new, tied encoder are active. Does nothing by default.

        `x` is this rank's inputs of a batch. Collective.
        """

    def scale_encoder(self, factor: Float[Tensor, ""]) -> None:
        """Multiply all pre-activations by `factor`. Requires b_enc to be 0."""
        self.W_enc.mul_(factor)
        self.selection.scale(factor)

    @torch.no_grad()
    def decode(self, codes: Codes, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        """Compute x_hat = acts W_dec + offset for this rank's rows from the codes of inputs x."""
        return self.axis.scatter_sum(self.decode_shard(codes)) + self.offset(x)

    @torch.no_grad()
    def decode_shard(self, codes: Codes) -> Float[Tensor, "rows d_out"]:
        """Compute this shard's part of x_hat - offset for the replica's rows."""
        entries = Entries(codes.latents, codes.starts, len(self.W_dec))
        return self.decode_at(codes.acts, entries, self.W_dec)

    @torch.no_grad()
    def decode_above(
        self,
        blocks: Iterable[select.Block],
        bound: Float[Tensor, " n_local"],
        rows: int,
    ) -> tuple[Float[Tensor, "rows d_out"], Int[Tensor, " n_local"]]:
        """Decode all pre-activations above a bound, with one block in memory at a time.

        A block in which many latents are active is decoded densely.

        Args:
            blocks: Encoder products without biases.
            bound: Bound of each latent, at least 0.
            rows: Number of rows of the blocks.

        Returns:
            This shard's part of x_hat - offset, and the number of times each latent fired.
        """
        parts = self.W_dec.new_zeros(rows, self.widths.d_out)
        fired = torch.zeros(len(self.W_dec), dtype=torch.int32, device=parts.device)
        for here, latents, products, _ in blocks:
            pre_acts = products + self.b_enc[latents]
            active = pre_acts > bound[latents]
            counts = active.sum(1)
            fired[latents] += active.sum(0, dtype=torch.int32)
            if int(counts.sum()) < SPARSE_BELOW * active.numel():
                which = latents[active.nonzero()[:, 1]]
                entries = Entries(which, counts.cumsum(0) - counts, len(self.W_dec))
                acts = self.codes_of(pre_acts[active], which)
                parts[here] += self.decode_at(acts, entries, self.W_dec)
            else:
                acts = self.codes_of(pre_acts, latents).mul_(active)
                columns, decoder = self.decoder_block(latents, self.W_dec)
                parts[here, columns].addmm_(acts, decoder)
        return parts, fired

    def forward(self, rows: Rows, context: StepContext) -> Output:
        """Call `objective`, under the name that module wrappers expect."""
        return self.objective(rows, context)

    @property
    def directions(self) -> nn.Parameter:
        """The weight whose rows are initialized from data.

        `derive_from_directions` sets the other weights.
        """
        return self.W_dec

    def init_directions(
        self, rows: Rows, new: slice, *, all_new: bool
    ) -> Float[Tensor, "batch width"]:
        """Return this rank's rows that the directions of new latents will point at. Collective.

        By default these are the residuals of the targets: after b_dec if all latents are new, else
        after b_dec and the known latents.

        Args:
            rows: Rows of this rank.
            new: The new latents of this shard. Their b_enc is 0.
            all_new: Whether all latents of all shards are new.
        """
        if all_new:
            return rows.targets - self.b_dec
        self.W_enc[new] = 0  # so that they stay inactive
        return rows.targets - self.infer(rows.inputs).x_hat

    def derive_from_directions(self, latents: slice | Tensor) -> None:
        """Derive the other weights from new unit-norm directions. By default W_enc = W_dec."""
        self.W_enc[latents] = self.W_dec[latents]

    def row_assigner(self, first: int) -> RowAssigner:
        """Return a function that assigns each row of the next batches to a latent to initialize.

        By default latents are assigned in order, from `first` on. A row that gets a number of
        `n_latents` or more belongs to no latent.
        """
        done = first

        def assign(inputs: Tensor) -> Tensor:
            nonlocal done
            rows = len(inputs) * self.axis.replicas * self.axis.shards
            done += rows
            return torch.arange(done - rows, done, device=inputs.device)

        return assign

    def adapt_new_latents(self, new: slice | Tensor, x: Float[Tensor, "batch d_in"]) -> None:
        """Adapt new latents to the known ones. Does nothing by default. Collective.

        Args:
            new: New latents of this shard. The lengths of their rows, and their entries in other
                per-latent tensors, are already derived from the known latents' means.
            x: This rank's inputs of a batch.
        """

    def constrain(self) -> None:
        """Enforce the recipe's constraints on changed weights."""
        if self.unit_rows:
            normalise_rows_(self.W_dec)
        self.constrain_others()

    def constrain_others(self) -> None:
        """Enforce the constraints other than `unit_rows`. There are none by default."""

    def revive(
        self,
        stuck: Bool[Tensor, " n_local"],
        x: Float[Tensor, "batch d_in"],
        error: Float[Tensor, "batch d_out"],
    ) -> None:
        """Revive latents that have stayed dead. Does nothing by default. Collective.

        Args:
            stuck: Mask of this shard's latents to revive.
            x: This rank's inputs of the last step.
            error: `Output.error` of the last step.
        """


def firings(acts: Float[Tensor, " entries"], entries: Entries) -> Int[Tensor, " n_local"]:
    """Count the rows in which each latent is active."""
    rows = torch.zeros(entries.n_latents, dtype=torch.int32, device=acts.device)
    return rows.scatter_add_(0, entries.latents, (acts > 0).int())
