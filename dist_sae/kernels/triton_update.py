"""Updates for NVIDIA GPUs, in Triton: Adam, unit rows and the copy for products in one pass.

As `triton.py`, not yet run on a GPU; sizes are reasoned, not measured.

An update does nothing but move memory: 28 bytes of a number (weight, gradient and two moments are
read, all but the gradient written) and 2 of its copy. Unit rows need the whole row before any of
it is written. So a program has a row, or as many numbers as a row of a usual width where rows do
not matter, and keeps the new weights in registers meanwhile.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_sae.kernels import torch as plain
from dist_sae.kernels.base import Adam

_PER_THREAD = 8
"""Numbers of a thread: two loads of 16 bytes from each of four tensors are under way at once. With
more there are too few registers where rows do not begin at 16 bytes."""
_NUMBERS = 1024
"""Numbers of a program where rows do not matter."""
WIDEST = 32 * 32 * _PER_THREAD
"""Numbers of a row that a program has room for: 32 warps are the most."""
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


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
    """See `Update`."""
    if W.dtype != torch.float32 or (unit_rows and W.shape[1] > WIDEST):
        plain.update(W, gradient, exp_avg, exp_avg_sq, adam, unit_rows=unit_rows, copy=copy)
        return
    written = (W, exp_avg, exp_avg_sq, *([] if copy is None else [copy]))
    assert all(tensor.is_contiguous() for tensor in written)
    width = W.shape[1] if unit_rows else _NUMBERS
    columns = triton.next_power_of_2(width)
    update_kernel[(triton.cdiv(W.numel(), width),)](
        W,
        gradient.contiguous(),
        exp_avg,
        exp_avg_sq,
        copy,
        adam.scale,
        adam.found_inf,
        W.numel(),
        width,
        adam.step_size,
        adam.root,
        1 - adam.beta1,
        adam.beta2,
        1 - adam.beta2,
        adam.eps,
        UNIT_ROWS=unit_rows,
        COLUMNS=columns,
        num_warps=max(1, columns // (32 * _PER_THREAD)),
        enable_fp_fusion=False,
    )


# Shapes: n numbers of W, D of a program.


@triton.jit
@no_type_check
def update_kernel(
    W,  # [n]
    gradient,  # [n]
    exp_avg,  # [n]
    exp_avg_sq,  # [n]
    copy,  # [n] or None
    scale,  # []
    found_inf,  # []
    n,
    D,
    step_size,
    root,
    new1,
    kept2,
    new2,
    eps,
    UNIT_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Update the numbers of a row."""
    if tl.load(found_inf) == 0:
        d = tl.arange(0, COLUMNS)
        place = tl.program_id(0).to(tl.int64) * D + d
        inside = (d < D) if UNIT_ROWS else (place < n)
        # all of it is needed once, by nobody else
        w = tl.load(W + place, mask=inside, other=0.0, eviction_policy="evict_first")
        g = tl.load(gradient + place, mask=inside, other=0.0, eviction_policy="evict_first")
        m = tl.load(exp_avg + place, mask=inside, other=0.0, eviction_policy="evict_first")
        v = tl.load(exp_avg_sq + place, mask=inside, other=0.0, eviction_policy="evict_first")
        g = tl.div_rn(g, tl.load(scale))
        m = tl.fma(new1, g - m, m)
        v = tl.fma(new2 * g, g, v * kept2)
        tl.store(exp_avg + place, m, mask=inside)
        tl.store(exp_avg_sq + place, v, mask=inside)
        w -= tl.div_rn(step_size * m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
        if UNIT_ROWS:
            # columns that are not there have 0
            w = tl.div_rn(w, tl.maximum(tl.sqrt_rn(tl.sum(w * w, 0)), _TINY))
        tl.store(W + place, w, mask=inside)
        if copy is not None:
            tl.store(copy + place, w.to(copy.dtype.element_ty), mask=inside)
