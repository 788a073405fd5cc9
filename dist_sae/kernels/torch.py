"""Sparse products and updates in plain torch, for any device: `embedding_bag`, fused Adam."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.optim.adam import adam as adam_

from dist_sae.kernels.base import Adam, Entries, Kernels
from dist_sae.kernels.keys import from_keys, to_keys

_GROUP = 16  # neighbours whose maximum is looked at first
_RUN = 4096  # entries


def keep_largest(best: Tensor, products: Tensor, bias: Tensor, latents: Tensor) -> Tensor:
    """See `Kernels.keep_largest`.

    Looks at the maxima of groups of neighbours first. The k largest lie in the k groups with the
    largest maxima: were one of them in another group, each of these k groups, before it by maximum
    or with the same maximum and lower latents, would hold an entry that comes before it.
    """
    pre_acts = products + bias
    k, groups = best.shape[1], pre_acts.shape[1] // _GROUP
    if groups < 2 * k:
        keys = to_keys(pre_acts, latents)
    else:
        whole, rest = pre_acts[:, : groups * _GROUP], pre_acts[:, groups * _GROUP :]
        peaks = whole.reshape(len(whole), groups, _GROUP).amax(2)
        numbers = torch.arange(groups, device=peaks.device)
        _, group = from_keys(to_keys(peaks, numbers).topk(k, dim=1, sorted=False).values)
        members = group[:, :, None] * _GROUP + torch.arange(_GROUP, device=peaks.device)
        members = members.flatten(1)
        keys = to_keys(whole.gather(1, members), latents[members])
        keys = torch.cat([keys, to_keys(rest, latents[groups * _GROUP :])], 1)
    return torch.cat([best, keys], 1).topk(k, dim=1, sorted=False).values


def above(products: Tensor, bias: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernels.above`."""
    pre_acts = products + bias
    rows, columns = (pre_acts > bounds).nonzero(as_tuple=True)
    return pre_acts[rows, columns], rows, columns


def combine(coefficients: Tensor, entries: Entries, W: Tensor) -> Tensor:
    """See `Kernels.combine`."""
    return F.embedding_bag(
        entries.latents, W, entries.starts, mode="sum", per_sample_weights=coefficients
    )


def gather_dot(rows: Tensor, entries: Entries, W: Tensor) -> Tensor:
    """See `Kernels.gather_dot`. It is the gradient of `combine` for its coefficients."""
    ones = W.new_ones(len(entries.latents), requires_grad=True)
    with torch.enable_grad():
        bags = combine(ones, entries, W.detach())
    return torch.autograd.grad(bags, ones, rows)[0]


def sum_by_latent(
    coefficients: Tensor,
    entries: Entries,
    rows: Tensor,
    W: Tensor | None = None,
    along: Tensor | None = None,
) -> Tensor:
    """See `Kernels.sum_by_latent`. Over entries sorted by latent: a fifth of `index_add`'s time.

    A sum of very many rows, one after the other, loses digits: those are summed in fp64, in runs.
    """
    order, starts = entries.by_latent
    sources, weights = entries.rows[order], coefficients[order]
    sums = F.embedding_bag(sources, rows, starts, mode="sum", per_sample_weights=weights)
    for latent, first, end in _long(starts, len(order)):
        exact = rows.new_zeros(rows.shape[1], dtype=torch.float64)
        for start in range(first, end, _RUN):
            run = slice(start, min(start + _RUN, end))
            exact += weights[run].double() @ rows[sources[run]].double()
        sums[latent] = exact
    if W is not None and along is not None:
        sums.addcmul_(W, along[:, None], value=-1)
    return sums


def sum_values(coefficients: Tensor, entries: Entries) -> Tensor:
    """See `Kernels.sum_values`. On CUDA `index_add` would sum them in the order of its threads."""
    order, starts = entries.by_latent
    offsets = F.pad(starts, (0, 1), value=len(order))
    values = coefficients[order].double()
    sums = torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True)  # no wait for checks
    return sums.to(coefficients.dtype)


def update(
    W: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    adam: Adam,
    *,
    unit_rows: bool = False,
    copy: Tensor | None = None,
) -> None:
    """See `Update`. In several passes, the first of which is torch's fused Adam."""
    # with a scale it writes the gradient; elsewhere the host would wait to know
    is_one = W.device.type == "cpu" and float(adam.scale) == 1
    adam_(
        [W],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        [],
        [torch.full((), float(adam.number - 1), device=W.device)],
        fused=True,
        grad_scale=None if is_one else adam.scale,
        found_inf=adam.found_inf,
        amsgrad=False,
        beta1=adam.beta1,
        beta2=adam.beta2,
        lr=adam.lr,
        weight_decay=0.0,
        eps=adam.eps,
        maximize=False,
    )
    if unit_rows:
        W /= row_norms(W).masked_fill_(adam.found_inf != 0, 1)
    if copy is not None:
        copy.copy_(W)


def row_norms(W: Float[Tensor, "rows width"]) -> Float[Tensor, "rows 1"]:
    """Norms to divide rows by: the smallest normal number for one of zeros."""
    norms: Tensor = torch.linalg.vector_norm(W, dim=1, keepdim=True)
    return norms.clamp_min_(torch.finfo(W.dtype).tiny)


def _long(starts: Tensor, n_entries: int) -> list[list[int]]:
    """Return the latents with very many entries, each with its first entry and the end."""
    if n_entries <= _RUN:
        return []
    ends = torch.cat([starts[1:], starts.new_tensor([n_entries])])
    latents = (ends - starts > _RUN).nonzero()[:, 0]
    places: list[list[int]] = torch.stack([latents, starts[latents], ends[latents]], 1).tolist()
    return places


KERNELS = Kernels(
    "torch", keep_largest, above, combine, gather_dot, sum_by_latent, sum_values, update
)
