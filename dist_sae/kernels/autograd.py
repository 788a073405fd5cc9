"""Encoder and decoder at selected entries, with gradients computed only from the entries."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_sae.kernels import Entries, Kernels


class _Encode(torch.autograd.Function):
    """Pre-activations that were computed before, with gradients attached."""

    @staticmethod
    def forward(
        ctx: Any,
        pre_acts: Tensor,
        kernels: Kernels,
        entries: Entries,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,  # noqa: ARG004 - for its gradient
        b_dec: Tensor | None,
    ) -> Tensor:
        ctx.kernels, ctx.entries, ctx.centred = kernels, entries, b_dec is not None
        ctx.save_for_backward(x, W_enc)
        return pre_acts.view_as(pre_acts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc = ctx.saved_tensors
        grad_W_enc = ctx.kernels.sum_by_latent(grad, ctx.entries, x)
        grad_b_enc = ctx.kernels.sum_values(grad, ctx.entries)
        # the same b_dec was subtracted from every row
        grad_b_dec = -(grad_b_enc @ W_enc) if ctx.centred else None
        return None, None, None, None, grad_W_enc, grad_b_enc, grad_b_dec


class _Decode(torch.autograd.Function):
    """The product acts W_dec."""

    @staticmethod
    def forward(
        ctx: Any, acts: Tensor, kernels: Kernels, entries: Entries, W_dec: Tensor, unit_rows: bool
    ) -> Tensor:
        ctx.kernels, ctx.entries, ctx.unit_rows = kernels, entries, unit_rows
        ctx.save_for_backward(acts, W_dec)
        return kernels.combine(acts, entries, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        acts, W_dec = ctx.saved_tensors
        grad = grad.contiguous()
        grad_acts = ctx.kernels.gather_dot(grad, ctx.entries, W_dec)
        if not ctx.needs_input_grad[3]:
            return grad_acts, None, None, None, None
        parallel: tuple[Tensor, ...] = ()
        if ctx.unit_rows:
            along = ctx.kernels.sum_values(acts * grad_acts, ctx.entries)  # = grad_W_dec . W_dec
            parallel = W_dec, along
        grad_W_dec = ctx.kernels.sum_by_latent(acts, ctx.entries, grad, *parallel)
        return grad_acts, None, None, grad_W_dec, None


class _AtEntries(torch.autograd.Function):
    """Values of the entries' latents, with a gradient that needs no atomic sum on CUDA."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, kernels: Kernels, entries: Entries) -> Tensor:
        ctx.kernels, ctx.entries = kernels, entries
        return values.index_select(0, entries.latents)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.kernels.sum_values(grad, ctx.entries), None, None


class _WithNorms(torch.autograd.Function):
    """W, and the norms of its rows at each site."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, widths: Sequence[int]) -> tuple[Tensor, Tensor]:
        ctx.widths, norms = widths, site_norms(W, widths)
        ctx.save_for_backward(W, norms)
        return W.view_as(W), norms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_norms: Tensor) -> tuple[Tensor, None]:
        W, norms = ctx.saved_tensors
        along = torch.where(norms > 0, grad_norms / norms, 0)
        add_at_sites_(grad, W, along, ctx.widths)
        return grad, None


class _Projected(torch.autograd.Function):
    """W, with a gradient that a function changes in place."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, project: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.project = project
        ctx.save_for_backward(W)
        return W.view_as(W)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (W,) = ctx.saved_tensors
        ctx.project(grad, W)
        return grad, None


class _WithProduct(torch.autograd.Function):
    """W, and the product W v."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(v)
        return W.view_as(W), W @ v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_product: Tensor) -> tuple[Tensor, None]:
        (v,) = ctx.saved_tensors
        return grad.addr_(grad_product, v), None


def site_norms(
    rows: Float[Tensor, "n_latents d_out"], widths: Sequence[int]
) -> Float[Tensor, "n_latents sites"]:
    """Compute the norms of decoder rows at each site. `widths` are the sites' widths, in order."""
    parts = torch.split(rows, list(widths), 1)
    return torch.stack([torch.linalg.vector_norm(part, dim=1) for part in parts], 1)


def add_at_sites_(
    gradient: Float[Tensor, "n_latents d_out"],
    W: Float[Tensor, "n_latents d_out"],
    factors: Float[Tensor, "n_latents sites"],
    widths: Sequence[int],
) -> None:
    """Add the rows of W, times a factor per row and site, to a gradient in place."""
    parts = zip(*(torch.split(t, list(widths), 1) for t in (gradient, W)), strict=True)
    for (of_gradient, of_W), factor in zip(parts, torch.split(factors, 1, 1), strict=True):
        of_gradient.addcmul_(of_W, factor)


def with_norms(
    W: Float[Tensor, "n_latents d_in"],
) -> tuple[Float[Tensor, "n_latents d_in"], Float[Tensor, " n_latents"]]:
    """Return W and the norms of its rows, which share a single gradient of W.

    Use the returned W only once, e.g. in `encode` or `decode`. The gradient of the norms is added
    in place to the gradient of W. Plain autograd would allocate a second gradient of its size.
    """
    W, norms = with_site_norms(W, W.shape[1:])
    return W, norms[:, 0]


def with_site_norms(
    W: Float[Tensor, "n_latents d_out"], widths: Sequence[int]
) -> tuple[Float[Tensor, "n_latents d_out"], Float[Tensor, "n_latents sites"]]:
    """Return W and the norms of its rows at each site, as `with_norms` does.

    Args:
        W: Decoder.
        widths: Widths of the sites, in the order of its columns.
    """
    result: tuple[Tensor, Tensor] = _WithNorms.apply(W, widths)  # type: ignore[no-untyped-call]
    return result


def projected(
    W: Float[Tensor, "n_latents d_out"], project: Callable[[Tensor, Tensor], None]
) -> Float[Tensor, "n_latents d_out"]:
    """Return W such that `project(gradient, W)` is called to change its gradient in place.

    Use the returned W only once; see `with_norms`.
    """
    result: Tensor = _Projected.apply(W, project)  # type: ignore[no-untyped-call]
    return result


def with_product(
    W: Float[Tensor, "n_latents d_in"], v: Float[Tensor, " d_in"]
) -> tuple[Float[Tensor, "n_latents d_in"], Float[Tensor, " n_latents"]]:
    """Return W and the product W v, in the way of `with_norms`. v gets no gradient."""
    result: tuple[Tensor, Tensor] = _WithProduct.apply(W, v)  # type: ignore[no-untyped-call]
    return result


def at_entries(
    values: Float[Tensor, " n_latents"], kernels: Kernels, entries: Entries
) -> Float[Tensor, " entries"]:
    """Return the value of each entry's latent, with a gradient to the values."""
    result: Tensor = _AtEntries.apply(values, kernels, entries)  # type: ignore[no-untyped-call]
    return result


def encode(
    pre_acts: Float[Tensor, " entries"],
    kernels: Kernels,
    entries: Entries,
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "n_latents d_in"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_in"] | None = None,
) -> Float[Tensor, " entries"]:
    """Return the pre-activations x W_enc^T + b_enc at the entries, with gradients to parameters.

    Args:
        pre_acts: Values of the entries, computed by the selection.
        kernels: The sparse products.
        entries: Positions of the entries.
        x: The rows, already centered if the recipe subtracts b_dec. They get no gradient.
        W_enc: Encoder.
        b_enc: Encoder bias.
        b_dec: The bias that was subtracted from the rows, so that it gets a gradient. None if the
            rows are not centered.
    """
    result: Tensor = _Encode.apply(  # type: ignore[no-untyped-call]
        pre_acts, kernels, entries, x, W_enc, b_enc, b_dec
    )
    return result


def decode(
    acts: Float[Tensor, " entries"],
    kernels: Kernels,
    entries: Entries,
    W_dec: Float[Tensor, "n_latents d_out"],
    *,
    unit_rows: bool,
) -> Float[Tensor, "batch d_out"]:
    """Compute acts W_dec, without a bias and with gradients to acts and W_dec.

    Args:
        acts: Codes.
        kernels: The sparse products.
        entries: Positions of the entries.
        W_dec: Decoder.
        unit_rows: Whether to remove the component of W_dec's gradient that is parallel to its rows,
            because their norm is held at 1. That component would only change the norm, and would
            inflate Adam's second moment along a direction in which no step is taken.
    """
    x_hat: Tensor = _Decode.apply(  # type: ignore[no-untyped-call]
        acts, kernels, entries, W_dec, unit_rows
    )
    return x_hat
