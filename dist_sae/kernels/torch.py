"""Sparse products and updates in plain torch for any device (`embedding_bag`, fused Adam)."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.optim.adam import adam as adam_

from dist_sae.kernels.base import Adam, Entries, Kernels
from dist_sae.kernels.keys import from_keys, to_keys

_GROUP = 16  # adjacent columns whose maximum is compared first
_RUN = 4096  # entries; longer sums are computed in fp64


def keep_largest(best: Tensor, products: Tensor, bias: Tensor, latents: Tensor) -> Tensor:
    """See `Kernels.keep_largest`.

    The maxima of groups of adjacent columns are compared first. The k largest entries are in the k
    groups with the largest maxima. If one were in another group, each of these k groups would
    contain an entry that ranks before it: one that is larger, or equal with a lower latent.
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
    """See `Kernels.gather_dot`. Computed as the gradient of `combine` for its coefficients."""
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
    """See `Kernels.sum_by_latent`. Summing sorted entries takes a fifth of `index_add`'s time.

    Adding very many rows one by one in fp32 loses digits. So sums of more than `_RUN` rows are
    computed in fp64, one run of rows at a time.
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
    """See `Kernels.sum_values`. `index_add` would sum in the order of its threads on CUDA."""
    order, starts = entries.by_latent
    offsets = F.pad(starts, (0, 1), value=len(order))
    values = coefficients[order].double()
    sums = torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True)  # checks would sync
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
    """See `Update`. Takes several passes over memory, the first of which is torch's fused Adam."""
    # With a scale, fused Adam also writes the gradient, so omit a scale of 1. Reading the scale is
    # free only on a CPU: on other devices the host would wait.
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
    """Return norms to divide rows by: at least the smallest normal number, for rows of zeros."""
    norms: Tensor = torch.linalg.vector_norm(W, dim=1, keepdim=True)
    return norms.clamp_min_(torch.finfo(W.dtype).tiny)


def _long(starts: Tensor, n_entries: int) -> list[list[int]]:
    """Return (latent, first entry, end) for each latent with more than `_RUN` entries."""
    if n_entries <= _RUN:
        return []
    ends = torch.cat([starts[1:], starts.new_tensor([n_entries])])
    latents = (ends - starts > _RUN).nonzero()[:, 0]
    places: list[list[int]] = torch.stack([latents, starts[latents], ends[latents]], 1).tolist()
    return places


KERNELS = Kernels(
    "torch", keep_largest, above, combine, gather_dot, sum_by_latent, sum_values, update
)
