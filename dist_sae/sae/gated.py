"""What the recipes share whose gate is a threshold per latent, not a count per row.

How many latents are active is not bounded then: half of all at the start of ReLU, 10,000 in B5's
recipe. So there are two ways to the same loss. While few entries exceed their bound, it is computed
from these alone; else densely, chunk by chunk of latents, and each chunk again for its gradients.
Which way is taken follows from the batch and the parameters, not from what was before.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from dist_sae.sae.base import SPARSE_BELOW, Codes, Dictionary, Inferred, firings
from dist_sae.sae.constraints import remove_parallel_
from dist_sae.sae.init import first_rows
from dist_sae.sae.kernels import Entries, autograd, select

Gate = Callable[..., tuple[Tensor, Tensor]]
"""(z, *what is given per latent) -> (codes f, penalty), entry by entry.

Where z is not above the bound both are 0, and so are their gradients.
"""

_RARE = 0.003  # of the rows: new latents add little to what known ones make of a row, and live
_INIT_ROWS = 16_384  # looked at
_INIT_CHUNK = 1024  # latents
_CHUNK_BYTES = 64 * 2**20  # of one [rows, chunk] matrix in fp32; a chunk needs several


class Thresholded(Dictionary):
    """A dictionary whose latents are active above a threshold of their own."""

    @property
    def thresholds(self) -> Float[Tensor, " n_local"]:
        """Theta of this shard's latents: f = z H(z - theta)."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        rows = self.axis.gather(x)
        found = select.above(
            select.products(rows, self.W_enc, self.W_enc.dtype), self.b_enc, self.thresholds
        )
        assert found is not None  # there was no limit
        return Codes(found.values, found.latents, select.starts_of(found.rows, len(rows)))

    @torch.no_grad()
    def infer(self, x: Float[Tensor, "batch d_in"]) -> Inferred:
        rows = self.axis.gather(x)
        blocks = select.products(rows, self.W_enc, self.W_enc.dtype)
        parts, fired = self.decode_above(blocks, self.thresholds, len(rows))
        return Inferred(self.axis.scatter_sum(parts) + self.b_dec, fired)


class Gated(NamedTuple):
    """What comes out of a gate and the decoder behind it."""

    x_hat: Float[Tensor, "batch d_in"]
    """This rank's rows, without b_dec."""
    penalty: Float[Tensor, ""]
    """Sum over this shard's latents and the replica's rows."""
    firings: Int[Tensor, " n_local"]
    active: Int[Tensor, ""]


def gated(
    sae: Dictionary,
    x: Float[Tensor, "rows d_in"],
    gate: Gate,
    bound: Float[Tensor, " n_local"],
    *per_latent: Float[Tensor, " n_local"],
    unit_rows: bool,
) -> Gated:
    """Encode the replica's rows (no b_dec is subtracted), gate, decode.

    Args:
        sae: The dictionary.
        x: The replica's rows.
        gate: Codes and penalties.
        bound: Nothing at or below it has a code or a gradient.
        per_latent: Arguments of `gate`; get their gradients.
        unit_rows: As in `autograd.decode`.
    """
    limit = int(SPARSE_BELOW * len(x) * len(sae.W_enc))
    with torch.no_grad():
        found = select.above(
            select.products(x, sae.W_enc, sae.product_dtype), sae.b_enc, bound, limit=limit
        )
    if found is None:
        return _dense(sae, x, gate, *per_latent, unit_rows=unit_rows)
    entries = Entries(found.latents, select.starts_of(found.rows, len(x)), len(sae.W_enc))
    pre_acts = autograd.encode(found.values, sae.kernels, entries, x, sae.W_enc, sae.b_enc)
    values = [value.index_select(0, entries.latents) for value in per_latent]
    acts, penalty = gate(pre_acts, *values)
    parts = autograd.decode(acts, sae.kernels, entries, sae.W_dec, unit_rows=unit_rows)
    x_hat = sae.axis.scatter_sum(parts)
    return Gated(x_hat, penalty.sum(), firings(acts, entries), (acts > 0).sum())


def _dense(sae: Dictionary, x: Tensor, gate: Gate, *per_latent: Tensor, unit_rows: bool) -> Gated:
    rows, dtype = x.to(sae.product_dtype), sae.product_dtype

    def of_chunk(
        W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, *values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pre_acts = (rows @ W_enc.to(dtype).T).to(W_enc.dtype) + b_enc
        acts, penalty = gate(pre_acts, *values)
        x_hat = (acts.to(dtype) @ W_dec.to(dtype)).to(W_dec.dtype)
        active = acts.detach() > 0
        return x_hat, penalty.sum(), active.sum(0, dtype=torch.int32), active.sum()

    W_dec: Tensor = _WithoutParallel.apply(sae.W_dec) if unit_rows else sae.W_dec  # type: ignore[no-untyped-call]
    chunk = max(1, _CHUNK_BYTES // (4 * len(x)))
    parts = [t.split(chunk) for t in (sae.W_enc, sae.b_enc, W_dec, *per_latent)]  # type: ignore[no-untyped-call]
    x_hat, penalty, active = torch.zeros_like(x), x.new_zeros(()), 0
    hits = []
    for arguments in zip(*parts, strict=True):
        more = checkpoint(of_chunk, *arguments, use_reentrant=False)
        x_hat, penalty, active = x_hat + more[0], penalty + more[1], active + more[3]
        hits.append(more[2])
    return Gated(sae.axis.scatter_sum(x_hat), penalty, torch.cat(hits), torch.as_tensor(active))


class _WithoutParallel(torch.autograd.Function):
    """The decoder; its gradient loses the part along its rows."""

    @staticmethod
    def forward(ctx: Any, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(W_dec)
        return W_dec.view_as(W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        remove_parallel_(gradient, *ctx.saved_tensors)
        return gradient


@torch.no_grad()
def set_active_share(
    sae: Dictionary,
    latents: slice,
    x: Float[Tensor, "batch d_in"],
    theta: Float[Tensor, " n_local"],
    share: float = _RARE,
) -> None:
    """Set b_enc such that each of these latents is above its threshold on this share of the rows.

    Args:
        sae: The dictionary.
        latents: Of this shard.
        x: This rank's rows of the batch, of which the first of all ranks' are taken.
        theta: Thresholds.
        share: To one of the rows looked at, and at least that one.

    The threshold is put between two rows: one that lay on it would be above it or not by rounding,
    that is by how the product was split.
    """
    rows = first_rows(x, _INIT_ROWS, sae.axis)
    place = max(1, min(round((1 - share) * len(rows)), len(rows) - 1))
    W_enc, b_enc = sae.W_enc[latents], sae.b_enc[latents]
    for start in range(0, len(W_enc), _INIT_CHUNK):
        chunk = slice(start, start + _INIT_CHUNK)
        products = rows @ W_enc[chunk].T
        below, above = (products.kthvalue(n, dim=0).values for n in (place, place + 1))
        b_enc[chunk] = theta[latents][chunk] - (below + above) / 2
