"""Updates for NVIDIA GPUs, in Triton: Adam, row normalization and the copy in one pass.

Like `triton.py`, this has not yet run on a GPU. Sizes are derived by reasoning, not measured.

An update is bound by memory bandwidth. It moves 28 bytes per element (weight, gradient and two
moments are read, and all but the gradient are written), and 2 for the copy. To normalize a row, all
of it must be computed before any of it is written. So a program handles a whole row and keeps the
new weights in registers. If rows are not normalized, it handles as many elements as a row of
typical width.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_sae.kernels import torch as plain
from dist_sae.kernels.base import Adam

_PER_THREAD = 8
"""Number of elements per thread, such that two loads of 16 bytes from each of four tensors are in
flight at once. With more, there are too few registers if rows are not aligned to 16 bytes."""
_NUMBERS = 1024
"""Number of elements per program if rows are not normalized."""
WIDEST = 32 * 32 * _PER_THREAD
"""Width of the widest row that a program can handle, with the maximum of 32 warps."""
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


# Shapes: W has n elements, and a program handles D of them.


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
    """Update a row, or D elements if rows are not normalized."""
    if tl.load(found_inf) == 0:
        d = tl.arange(0, COLUMNS)
        place = tl.program_id(0).to(tl.int64) * D + d
        inside = (d < D) if UNIT_ROWS else (place < n)
        # everything is read once and by this program only
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
            # masked columns are 0
            w = tl.div_rn(w, tl.maximum(tl.sqrt_rn(tl.sum(w * w, 0)), _TINY))
        tl.store(W + place, w, mask=inside)
        if copy is not None:
            tl.store(copy + place, w.to(copy.dtype.element_ty), mask=inside)
