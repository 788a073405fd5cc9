"""Base of the recipes with a threshold per latent and a penalty on the codes.

The number of active latents is not bounded. At the start, it would be half of all with ReLU, and
10,000 per row with the tanh recipe as published. So there are two ways to compute the loss. If few
entries exceed their bound, only these are used. Otherwise the loss is computed densely, in chunks
of latents, and each chunk is recomputed in the backward pass. The choice depends only on the batch
and the parameters.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_sae.config.sae import PenalisedConfig
from dist_sae.dictionaries.base import SPARSE_BELOW, Dictionary, firings
from dist_sae.dictionaries.constraints import remove_parallel_
from dist_sae.dictionaries.init import first_rows, initialise_tied, reinitialise
from dist_sae.dictionaries.interface import LossTerms, Output, Rows, StepContext, Widths
from dist_sae.dictionaries.selection import Threshold
from dist_sae.kernels import Entries, autograd, device_select, select, starts_of
from dist_sae.kernels.select import Candidates

Activation = Callable[..., tuple[Tensor, ...]]
"""Computes the code f and the penalty of each entry from z and its latent's values. In some recipes
there is a second code, which is decoded with the decoder held fixed.

If z is not above the bound, all outputs and their gradients are 0.
"""

RARE = 0.003
"""Share of rows on which new latents are made active: enough to stay alive, and too few to disturb
the known latents much."""
_INIT_ROWS = 16_384  # rows from which initial thresholds are computed
_INIT_CHUNK = 1024  # latents
CHUNK_BYTES = 16 * 2**20
"""Size of one [rows, chunk] matrix in fp32 on a CPU. A chunk needs about ten of them."""
_CHUNK = 8192  # maximum number of latents
_MOST_ENTRIES = 2**23  # entries in memory at once; a step needs about 100 bytes for each


class Penalised(Dictionary):
    """A dictionary whose latents are active above a threshold and kept sparse by a penalty."""

    config: PenalisedConfig
    n_entries: int | None = None
    """Number of entries above their bound in the last step. None before the first step and after a
    step that was computed densely."""

    def __init__(
        self, config: PenalisedConfig, widths: Widths | int, *place: Any, **precision: Any
    ) -> None:
        super().__init__(config, widths, *place, **precision)
        self.selection = Threshold(self, self.thresholds_in)

    def thresholds_in(self, dtype: torch.dtype) -> Float[Tensor, " n_local"]:
        """Return theta of this shard's latents in `dtype`. f is 0 unless z exceeds theta."""
        raise NotImplementedError

    @property
    def thresholds(self) -> Float[Tensor, " n_local"]:
        """Theta in the parameters' precision, with gradient."""
        return self.thresholds_in(self.W_enc.dtype)

    @property
    def initial_l0(self) -> float:
        """Active latents per row at the start."""
        return min(self.config.l0_at_start(self.widths.d_in), self.n_latents / 2)

    def initialise(self, rows: Rows, seed: int, *, rescale: bool = True) -> None:  # noqa: ARG002
        initialise_tied(self, rows, seed)

    def output(
        self,
        rows: Rows,
        context: StepContext,
        found: "Reconstruction",
        sparsity: Float[Tensor, ""],
    ) -> Output:
        """Build the objective's output; `sparsity` is the penalty, scaled as in the loss."""
        error = rows.targets - (found.x_hat + self.offset(rows.inputs))
        replica_rows = len(error) * self.axis.shards
        fvu = error.square().sum() / (replica_rows * context.variance)
        terms = LossTerms(fvu, fvu.new_zeros(()), sparsity, fvu + sparsity)
        return Output(terms, found.firings, found.active, error.detach())

    @torch.no_grad()
    def set_initial_sparsity(self, x: Float[Tensor, "batch d_in"]) -> None:
        """Make every latent active on the same small share of the rows.

        If half of all latents were active, the reconstruction would be several times too long, and
        the penalty would turn latents off before they have learned anything.
        """
        self.make_active(slice(None), x, self.initial_l0 / self.n_latents)

    def make_active(
        self, latents: slice | Tensor, x: Float[Tensor, "batch d_in"], share: float
    ) -> None:
        """Make each of these latents active on a share of the rows; see `set_active_share`."""
        set_active_share(self, latents, x, self.thresholds, share)

    @torch.no_grad()
    def scale_encoder(self, factor: Float[Tensor, ""]) -> None:
        """Scale pre-activations relative to their thresholds, so the same latents stay active."""
        theta = self.thresholds
        self.W_enc.mul_(factor)
        self.b_enc.copy_(theta + factor * (self.b_enc - theta))

    def adapt_new_latents(self, new: slice | Tensor, x: Float[Tensor, "batch d_in"]) -> None:
        self.make_active(new, x, RARE)

    def revive(
        self,
        stuck: Bool[Tensor, " n_local"],
        x: Float[Tensor, "batch d_in"],
        error: Float[Tensor, "batch d_out"],
    ) -> None:
        reinitialise(self, stuck, x, error)


class Reconstruction(NamedTuple):
    """Reconstruction and penalty of a batch."""

    x_hat: Float[Tensor, "batch d_out"]
    """x_hat - b_dec for this rank's rows."""
    frozen: Float[Tensor, "batch d_out"] | None
    """Reconstruction from the second codes, minus b_dec, with gradients only to these codes. None
    if the activation returns no second codes."""
    penalty: Float[Tensor, ""]
    """Sum of the penalties over this shard's latents and the replica's rows."""
    firings: Int[Tensor, " n_local"]
    active: Int[Tensor, ""]


def encode_decode(
    sae: Penalised,
    x: Float[Tensor, "rows d_in"],
    activation: Activation,
    bound: Float[Tensor, " n_local"],
    *per_latent: Float[Tensor, " n_local"],
    W_enc: Float[Tensor, "n_local d_in"] | None = None,
    W_dec: Float[Tensor, "n_local d_out"] | None = None,
) -> Reconstruction:
    """Encode the replica's rows without centering, apply the activation, and decode.

    Args:
        sae: The dictionary.
        x: The replica's rows.
        activation: Computes codes and penalties.
        bound: Pre-activations at or below this bound have neither a code nor a gradient.
        per_latent: Arguments of `activation`, which get gradients.
        W_enc: The encoder from `autograd.with_product`. The plain one if None.
        W_dec: The decoder from `autograd.with_norms`. The plain one if None.
    """
    W_enc = sae.W_enc if W_enc is None else W_enc
    W_dec = sae.W_dec if W_dec is None else W_dec
    most = 2 * _MOST_ENTRIES // (sae.layers + 1)  # decoding makes (layers + 1) / 2 of each entry
    limit = min(int(SPARSE_BELOW * len(x) * len(W_enc)), most)
    found = _entries_above(sae, x, bound, limit)
    sae.n_entries = None if found is None else len(found.values)
    if found is None:
        penalty, fired, *parts = _Dense.apply(  # type: ignore[no-untyped-call]
            sae, x, activation, W_enc, sae.b_enc, W_dec, *per_latent
        )
        active = fired.sum()
    else:
        entries = Entries(found.latents, starts_of(found.rows, len(x)), len(W_enc))
        pre_acts = sae.encode_at(found.values, entries, x, W_enc)
        values = [autograd.at_entries(value, sae.kernels, entries) for value in per_latent]
        acts, penalties, *second = activation(pre_acts, *values)
        parts = [
            sae.decode_at(codes, entries, decoder)
            for codes, decoder in zip((acts, *second), (W_dec, W_dec.detach()), strict=False)
        ]
        penalty, fired, active = penalties.sum(), firings(acts, entries), (acts > 0).sum()
    x_hat, *frozen = torch.split(sae.axis.scatter_sum(torch.cat(parts, 1)), sae.widths.d_out, 1)
    return Reconstruction(x_hat, frozen[0] if frozen else None, penalty, fired, active)


@torch.no_grad()
def _entries_above(sae: Penalised, x: Tensor, bound: Tensor, limit: int) -> Candidates | None:
    """Return all entries above their bound, or None if there are more than `limit`."""
    blocks, size = sae.products(x, sae.product_dtype).blocks, len(x) * len(sae.W_enc)
    if x.device.type == "cpu":
        return select.above(blocks(), sae.b_enc, bound, sae.kernels, limit=limit)
    share = None if sae.n_entries is None else sae.n_entries / size
    return device_select.above(blocks, sae.b_enc, bound, size=size, share=share, limit=limit)


class _Dense(torch.autograd.Function):
    """Penalty, firings and this shard's part of x_hat - b_dec for each code, by chunks of latents.

    The backward pass recomputes each chunk and writes its gradients directly into the gradients of
    the weights. Only the encoder product is in `product_dtype`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        sae: Dictionary,
        x: Tensor,
        activation: Activation,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.sae, ctx.activation = sae, activation
        ctx.save_for_backward(x, *tensors)
        penalty, parts = x.new_zeros(()), list[Tensor]()
        fired = torch.zeros(len(tensors[0]), dtype=torch.int32, device=x.device)
        for chunk, _, pre_acts, values in _chunks(sae, x, tensors):
            acts, more, *second = activation(pre_acts, *values)
            parts = parts or [x.new_zeros(len(x), sae.widths.d_out) for _ in (acts, *second)]
            written, W_dec = sae.decoder_block(chunk, tensors[2])
            for part, codes in zip(parts, (acts, *second), strict=True):
                part[:, written].addmm_(codes, W_dec)
            penalty += more.sum()
            fired[chunk] = (acts > 0).sum(0, dtype=torch.int32)
        ctx.mark_non_differentiable(fired)
        return penalty, fired, *parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_penalty: Tensor, _: Tensor, *grads_x: Tensor) -> tuple[Any, ...]:
        x, *tensors = ctx.saved_tensors
        sae, (grad, *seconds) = ctx.sae, [grad.contiguous() for grad in grads_x]
        grads = [sae.kernels.empty(t) if t.ndim > 1 else torch.empty_like(t) for t in tensors]
        grad_W_enc, grad_b_enc, grad_W_dec, *grad_values = grads
        for chunk, read, pre_acts, values in _chunks(sae, x, tensors):
            written, W_dec = sae.decoder_block(chunk, tensors[2])
            inputs = [t.detach().requires_grad_() for t in (pre_acts, *values)]
            with torch.enable_grad():
                acts, penalty, *second = ctx.activation(*inputs)
            outputs = [grad[:, written] @ W_dec.T, grad_penalty.expand_as(penalty)]
            outputs += [grad_second[:, written] @ W_dec.T for grad_second in seconds]
            grad_pre_acts, *more = torch.autograd.grad([acts, penalty, *second], inputs, outputs)
            torch.mm(grad_pre_acts.T, x[:, read], out=grad_W_enc[chunk])
            grad_b_enc[chunk] = grad_pre_acts.sum(0)
            _, grad_written = sae.decoder_block(chunk, grad_W_dec)
            torch.mm(acts.detach().T, grad[:, written], out=grad_written)
            if sae.unit_rows:
                remove_parallel_(grad_written, W_dec)
            for whole, part in zip(grad_values, more, strict=True):
                whole[chunk] = part
        return None, None, None, *grads


def _chunks(
    sae: Dictionary, x: Tensor, tensors: Sequence[Tensor]
) -> Iterator[tuple[slice, slice, Tensor, list[Tensor]]]:
    """Yield chunks: latents, the columns they read, pre-activations, and per-latent values."""
    rows, (W_enc, b_enc, _, *values) = x.to(sae.product_dtype), tensors
    width = max(1, min(_CHUNK, select.block_size(CHUNK_BYTES, x.device) // (4 * len(x))))
    for chunk, read in sae.tiles(width):
        products = rows[:, read] @ W_enc[chunk].to(rows.dtype).T
        yield chunk, read, products.to(x.dtype) + b_enc[chunk], [value[chunk] for value in values]


@torch.no_grad()
def set_active_share(
    sae: Dictionary,
    latents: slice | Tensor,
    x: Float[Tensor, "batch d_in"],
    theta: Float[Tensor, " n_local"],
    share: float,
) -> None:
    """Set b_enc such that each of these latents exceeds its threshold on a share of the rows.

    The threshold is put halfway between two rows. If it were equal to a row's pre-activation,
    rounding, and so the split of the product, would decide whether that row is above it.

    Args:
        sae: The dictionary.
        latents: Latents of this shard.
        x: This rank's inputs of a batch. Only the first rows of the global batch are used.
        theta: Thresholds.
        share: Share of the rows, rounded to a whole number of the rows used, at least one.
    """
    rows = first_rows(x, _INIT_ROWS, sae.axis)
    n_above = max(1, min(len(rows) - round((1 - share) * len(rows)), len(rows) - 1))
    chosen = torch.zeros_like(theta, dtype=torch.bool)
    chosen[latents] = True
    for tile, read in sae.tiles(_INIT_CHUNK):
        products = rows[:, read] @ sae.W_enc[tile][chosen[tile]].T
        # on a CPU a third of the time of two `kthvalue` calls if a twelfth is active
        above, below = products.T.topk(n_above + 1, dim=1).values[:, -2:].unbind(1)
        middle = (below + above) / 2
        sae.b_enc[tile] = sae.b_enc[tile].masked_scatter(
            chosen[tile], theta[tile][chosen[tile]] - middle
        )
