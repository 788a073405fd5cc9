"""Encode, select, decode and both weight gradients without a `[batch, n_latents]` tensor.

Products run over `_CHUNK` latents at a time; everything after the selection touches the k
selected latents of each row alone.
"""

from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_CHUNK = 8192  # latents; [batch, chunk] pre-activations are all that is ever held


def select_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "n_latents d_in"],
    b_enc: Float[Tensor, " n_latents"],
    k: int,
    product_dtype: torch.dtype,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """The k largest of x W_enc^T + b_enc of each row, with their latents; no gradient.

    Args:
        x: Rows, centred.
        W_enc: Encoder.
        b_enc: Encoder bias.
        k: How many; if there are fewer latents, all.
        product_dtype: Precision of the product; sums are fp32 at least.
    """
    values, latents = [], []
    x = x.to(product_dtype)
    for start in range(0, len(W_enc), _CHUNK):
        weights, bias = (t[start : start + _CHUNK].to(product_dtype) for t in (W_enc, b_enc))
        top = torch.addmm(bias, x, weights.T).topk(min(k, len(weights)), dim=1, sorted=False)
        values.append(top.values)
        latents.append(top.indices + start)
    best, where = torch.cat(values, 1).topk(min(k, len(W_enc)), dim=1)
    return best.to(W_enc.dtype), torch.cat(latents, 1).gather(1, where)


class Selection:
    """The selected latents of a batch; sorted by latent when a gradient first asks for it."""

    def __init__(self, latents: Int[Tensor, "batch k"], n_latents: int) -> None:
        self.latents = latents
        self.n_latents = n_latents

    @cached_property
    def _by_latent(self) -> tuple[Int[Tensor, " entries"], Int[Tensor, " n_latents"]]:
        """(entries in the order of their latent, where each latent's begin)."""
        flat = self.latents.flatten().int()  # an int32 sort is far faster than an int64 one
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=self.n_latents)
        return order, counts.cumsum(0) - counts

    def sum_by_latent(
        self, coefficients: Float[Tensor, "batch k"], rows: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "n_latents d_in"]:
        """For each latent, the sum of `rows` weighted with its coefficients: C^T rows, C sparse."""
        order, starts = self._by_latent
        k = self.latents.shape[1]
        return F.embedding_bag(
            order // k,
            rows,
            starts,
            mode="sum",
            per_sample_weights=coefficients.flatten()[order].to(rows.dtype),
        )

    def count_by_latent(
        self, coefficients: Float[Tensor, "batch k"]
    ) -> Float[Tensor, " n_latents"]:
        """For every latent, the sum of its coefficients."""
        zeros = coefficients.new_zeros(self.n_latents)
        return zeros.index_add(0, self.latents.flatten(), coefficients.flatten())


def sparse_matmul(
    acts: Float[Tensor, "batch k"],
    latents: Int[Tensor, "batch k"],
    W_dec: Float[Tensor, "n_latents d_in"],
) -> Float[Tensor, "batch d_in"]:
    """Sum of each row's selected decoder rows, weighted with its acts; no gradient."""
    return F.embedding_bag(latents, W_dec, mode="sum", per_sample_weights=acts)


def gather_dot(
    rows: Float[Tensor, "batch d_in"],
    latents: Int[Tensor, "batch k"],
    W: Float[Tensor, "n_latents d_in"],
) -> Float[Tensor, "batch k"]:
    """rows[b] . W[latents[b, j]] without a [batch, k, d_in] tensor: embedding_bag's gradient."""
    ones = torch.ones(latents.shape, dtype=W.dtype, device=W.device, requires_grad=True)
    with torch.enable_grad():
        bags = F.embedding_bag(latents, W.detach(), mode="sum", per_sample_weights=ones)
    return torch.autograd.grad(bags, ones, rows)[0]


class _Encode(torch.autograd.Function):
    """relu of pre_acts = (x - b_dec) W_enc^T + b_enc at the selected latents."""

    @staticmethod
    def forward(
        ctx: Any,
        pre_acts: Tensor,
        selection: Selection,
        centred: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,  # noqa: ARG004 - for its gradient
        b_dec: Tensor,  # noqa: ARG004 - for its gradient
    ) -> Tensor:
        ctx.selection = selection
        acts = pre_acts.relu()
        ctx.save_for_backward(acts, centred, W_enc)
        return acts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_acts: Tensor) -> tuple[Tensor | None, ...]:
        acts, centred, W_enc = ctx.saved_tensors
        grad_pre = grad_acts * (acts > 0)  # a latent selected at 0 is not active: no gradient
        grad_b_enc = ctx.selection.count_by_latent(grad_pre)
        grad_W_enc = ctx.selection.sum_by_latent(grad_pre, centred)
        grad_b_dec = -(grad_b_enc @ W_enc)  # every row is centred by the same b_dec
        return None, None, None, grad_W_enc, grad_b_enc, grad_b_dec


class _Decode(torch.autograd.Function):
    """acts W_dec at the selected latents."""

    @staticmethod
    def forward(ctx: Any, acts: Tensor, selection: Selection, W_dec: Tensor) -> Tensor:
        ctx.selection = selection
        ctx.save_for_backward(acts, W_dec)
        return sparse_matmul(acts, selection.latents, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x_hat: Tensor) -> tuple[Tensor | None, ...]:
        acts, W_dec = ctx.saved_tensors
        grad_x_hat = grad_x_hat.contiguous()
        grad_acts = gather_dot(grad_x_hat, ctx.selection.latents, W_dec)
        return grad_acts, None, ctx.selection.sum_by_latent(acts, grad_x_hat)


def encode(
    pre_acts: Float[Tensor, "batch k"],
    selection: Selection,
    centred: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "n_latents d_in"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_in"],
) -> Float[Tensor, "batch k"]:
    """relu(pre_acts), with gradients to W_enc, b_enc and (through the centring) b_dec.

    Args:
        pre_acts: Pre-activations at the selected latents, from `select_topk`.
        selection: Which latents they belong to.
        centred: x - b_dec, detached.
        W_enc: Encoder.
        b_enc: Encoder bias.
        b_dec: Decoder bias.
    """
    acts: Tensor = _Encode.apply(  # type: ignore[no-untyped-call]
        pre_acts, selection, centred, W_enc, b_enc, b_dec
    )
    return acts


def decode(
    acts: Float[Tensor, "batch k"], selection: Selection, W_dec: Float[Tensor, "n_latents d_in"]
) -> Float[Tensor, "batch d_in"]:
    """Acts W_dec (no bias), with gradients to acts and W_dec."""
    x_hat: Tensor = _Decode.apply(acts, selection, W_dec)  # type: ignore[no-untyped-call]
    return x_hat
