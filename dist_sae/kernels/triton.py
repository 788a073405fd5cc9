"""The sparse products for NVIDIA GPUs, in Triton, written for Hopper.

Selections are in triton_select.py, updates in triton_update.py.

Not yet run on a GPU. The tests run these kernels in Triton's interpreter, on a CPU, and compile
them for Hopper and Ampere; that checks what they compute, not how fast. Blocks, loads in flight,
cache hints and the order of the programs are reasoned, none of them is measured.

`combine` and `sum_by_latent` are one operation, a sum of weighted rows over segments of entries:
the segments are the batch's rows in one and the latents in the other. Like `gather_dot` it
computes little with each byte that it moves, so what counts is wide loads, many of them in flight.

Sums are fp32, whatever the tensors are. Their order follows from d_in and the entries alone:
nothing is added atomically, and the autotuner chooses only what changes no bit. So a resumed run
repeats the bits of one that was never stopped.

Shapes in the kernels: B rows of the batch, N latents, D d_in, E entries, S segments (B or N).
"""

import os
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_sae.kernels import torch as plain
from dist_sae.kernels.base import Entries, Kernels
from dist_sae.kernels.triton_select import keep_largest
from dist_sae.kernels.triton_update import update

CHUNK_ENTRIES = 512
"""Entries that one program sums."""
"""Entries of a long segment that are summed on their own. Decides the order of its sum."""
_DOTS = 8
"""Products that a program of `gather_dot` computes."""
_COLUMNS = 512
"""Columns of a block where it is not tuned."""
_PER_WARP = 128
"""Columns that a warp loads at once: 16 bytes of fp32 in each thread."""


def _config(columns: int, warps: int) -> Any:
    # Given fewer registers, the compiler loads and uses one row after the other.
    registers = 32 + 8 * columns // (32 * warps)
    return triton.Config({"COLUMNS": columns}, num_warps=warps, maxnreg=registers)


_SIZES = ((_COLUMNS, 4), (_PER_WARP, 1), (256, 1), (256, 2), (512, 2), (1024, 4), (2048, 4))
_TUNED = [_config(columns, warps) for columns, warps in (*_SIZES, (2048, 8))]
if os.environ.get("TRITON_INTERPRET") == "1":  # the interpreter: nothing to measure
    _TUNED = _TUNED[:1]


def combine(coefficients: Tensor, entries: Entries, W: Tensor) -> Tensor:
    """See `Kernels.combine`."""
    return _sum_segments(coefficients, entries.latents, entries.rows, entries.starts, W)


def sum_by_latent(
    coefficients: Tensor,
    entries: Entries,
    rows: Tensor,
    W: Tensor | None = None,
    along: Tensor | None = None,
) -> Tensor:
    """See `Kernels.sum_by_latent`."""
    order, starts = entries.by_latent
    # put in order once: every block of columns reads all of them
    latents = entries.latents[order]
    return _sum_segments(coefficients[order], entries.rows[order], latents, starts, rows, W, along)


def gather_dot(rows: Tensor, entries: Entries, W: Tensor) -> Tensor:
    """See `Kernels.gather_dot`."""
    _check(W, entries.latents)
    E, D = len(entries.latents), W.shape[1]
    products = W.new_empty(E)
    # not autotuned: in which order a product is summed depends on the block and the warps
    gather_dot_kernel[(triton.cdiv(E, _DOTS),)](
        products,
        rows.contiguous(),
        entries.rows,
        entries.latents.contiguous(),
        W.contiguous(),
        E,
        D,
        DOTS=_DOTS,
        COLUMNS=_block(D),
        num_warps=4,
        maxnreg=128,
        enable_fp_fusion=False,
    )
    return products


KERNELS = Kernels(
    "triton",
    keep_largest,
    plain.above,
    combine,
    gather_dot,
    sum_by_latent,
    plain.sum_values,
    update,
)


def _sum_segments(
    coefficients: Tensor,
    sources: Tensor,
    segments: Tensor,
    starts: Tensor,
    X: Tensor,
    W: Tensor | None = None,
    along: Tensor | None = None,
) -> Tensor:
    """For each segment the sum over its entries of coefficient * X[source]; zeros without entries.

    In two passes. A program sums a block of columns of a segment, and a latent that fires on every
    row, or a row to which BatchTopK gives thousands of latents, would keep its programs busy long
    after all others are done. So the first pass sums chunks of `CHUNK_ENTRIES` entries, those that
    lie within one segment, and the second adds up these sums and the entries at the segment's ends.

    Args:
        coefficients: Of the entries, segment after segment.
        sources: The row of X that each entry takes.
        segments: The segment that each entry is in.
        starts: Where each segment's entries begin.
        X: The rows.
        W: A row for each segment.
        along: With it: how much of its row of W is taken off a segment that has entries.
    """
    _check(X, sources)
    E, S, D = len(sources), len(starts), X.shape[1]
    n_chunks = E // CHUNK_ENTRIES
    # gradients may come expanded from autograd
    coefficients, sources = coefficients.contiguous(), sources.contiguous()
    starts, X = starts.contiguous(), X.contiguous()
    chunks = X.new_empty((n_chunks, D), dtype=torch.float32)
    sum_chunks_kernel[(n_chunks * triton.cdiv(D, _block(D)),)](
        chunks,
        coefficients,
        sources,
        segments.contiguous(),
        X,
        n_chunks,
        D,
        CHUNK=CHUNK_ENTRIES,
        enable_fp_fusion=False,
        **_config(_block(D), max(1, _block(D) // _PER_WARP)).all_kwargs(),
    )
    sums = X.new_empty((S, D))
    sum_segments_kernel[lambda meta: (S * triton.cdiv(D, meta["COLUMNS"]),)](
        sums,
        chunks,
        coefficients,
        sources,
        starts,
        X,
        W if W is None else W.contiguous(),
        along if along is None else along.contiguous(),
        S,
        triton.next_power_of_2(S),
        E,
        D,
        CHUNK=CHUNK_ENTRIES,
        enable_fp_fusion=False,
    )
    return sums


def _check(X: Tensor, numbers: Tensor) -> None:
    assert X.dtype != torch.float64, "sums are fp32"
    # kernels multiply these by D: 4M latents of 4096 have more elements than an int32 can count
    assert numbers.dtype == torch.int64


def _block(d_in: int) -> int:
    """Columns of a block where it is not tuned."""
    return int(min(_COLUMNS, triton.next_power_of_2(d_in)))


def worth_trying(configs: list[Any], named_args: dict[str, Any], **_: Any) -> list[Any]:
    """Configurations that fit the width."""
    widest = max(_PER_WARP, triton.next_power_of_2(named_args["D"]))
    return [config for config in configs if config.kwargs["COLUMNS"] <= widest]


# The kernels. `no_type_check` keeps run-time type checkers from wrapping them: Triton reads their
# source. Fused multiply-adds are written out, and the compiler (enable_fp_fusion) makes no others:
# its choice might differ between blocks. Grids have one dimension: only x may pass 65,535.


@triton.jit
@no_type_check
def _add_rows(acc, coefficients, sources, X, first, end, d, D):
    """Acc and the weighted rows of X of the entries from first to end, one after the other."""
    # Four at a time: all are under way before the first is used. What the compiler makes of a loop
    # over one row waits for every one or two of them. Entries that are not there have no columns.
    for e in tl.range(first, end, 4):
        real1, real2, real3 = e + 1 < end, e + 2 < end, e + 3 < end
        source0 = tl.load(sources + e)
        source1 = tl.load(sources + e + 1, mask=real1, other=0)
        source2 = tl.load(sources + e + 2, mask=real2, other=0)
        source3 = tl.load(sources + e + 3, mask=real3, other=0)
        x0 = tl.load(X + source0 * D + d, mask=d < D, other=0.0)
        x1 = tl.load(X + source1 * D + d, mask=d < tl.where(real1, D, 0), other=0.0)
        x2 = tl.load(X + source2 * D + d, mask=d < tl.where(real2, D, 0), other=0.0)
        x3 = tl.load(X + source3 * D + d, mask=d < tl.where(real3, D, 0), other=0.0)
        c0 = tl.load(coefficients + e)
        c1 = tl.load(coefficients + e + 1, mask=real1, other=0.0)
        c2 = tl.load(coefficients + e + 2, mask=real2, other=0.0)
        c3 = tl.load(coefficients + e + 3, mask=real3, other=0.0)
        acc = tl.fma(x0.to(tl.float32), c0.to(tl.float32), acc)
        acc = tl.fma(x1.to(tl.float32), c1.to(tl.float32), acc)
        acc = tl.fma(x2.to(tl.float32), c2.to(tl.float32), acc)
        acc = tl.fma(x3.to(tl.float32), c3.to(tl.float32), acc)
    return acc


@triton.jit(do_not_specialize=["n_chunks"])  # it changes from step to step
@no_type_check
def sum_chunks_kernel(
    chunks,  # [n_chunks, D] fp32: sums; of a chunk in more than one segment not written
    coefficients,  # [E]
    sources,  # [E]
    segments,  # [E]
    X,  # [., D]
    n_chunks,
    D,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum each chunk that lies within one segment."""
    program = tl.program_id(0)
    chunk = (program % n_chunks).to(tl.int64)
    first = chunk * CHUNK
    if tl.load(segments + first) == tl.load(segments + first + CHUNK - 1):
        d = program // n_chunks * COLUMNS + tl.arange(0, COLUMNS)
        acc = tl.zeros((COLUMNS,), tl.float32)
        acc = _add_rows(acc, coefficients, sources, X, first, first + CHUNK, d, D)
        tl.store(chunks + chunk * D + d, acc, mask=d < D)


@triton.autotune(_TUNED, key=["SCALE", "D"], prune_configs_by={"early_config_prune": worth_trying})
@triton.jit(do_not_specialize=["S", "SCALE", "E"])
@no_type_check
def sum_segments_kernel(
    sums,  # [S, D]
    chunks,  # [E // CHUNK, D] fp32
    coefficients,  # [E]
    sources,  # [E]
    starts,  # [S]
    X,  # [., D]
    W,  # [S, D] or None
    along,  # [S] or None
    S,
    SCALE,  # noqa: ARG001 - S to a power of two, to tune by: routed rows are others at each step
    E,
    D,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum each segment from its chunks' sums and the entries at its ends."""
    # All segments' first block of columns, then all second ones: programs that run at the same time
    # read the same columns of X, which may then fit into L2 (8192 rows of 512 fp32 are 16 MiB) and
    # come from there each time they are needed again.
    program = tl.program_id(0)
    segment = (program % S).to(tl.int64)
    d = program // S * COLUMNS + tl.arange(0, COLUMNS)

    begin = tl.load(starts + segment)
    end = tl.load(starts + segment + 1, mask=segment + 1 < S, other=E)
    first_chunk = (begin + CHUNK - 1) // CHUNK
    end_chunk = tl.maximum(end // CHUNK, first_chunk)  # chunks in between are all this segment's
    head_end = tl.minimum(first_chunk * CHUNK, end)
    tail = tl.maximum(end_chunk * CHUNK, head_end)

    acc = tl.zeros((COLUMNS,), tl.float32)
    acc = _add_rows(acc, coefficients, sources, X, begin, head_end, d, D)
    for chunk in tl.range(first_chunk, end_chunk):
        acc += tl.load(chunks + chunk * D + d, mask=d < D, other=0.0)
    acc = _add_rows(acc, coefficients, sources, X, tail, end, d, D)
    if W is not None:
        columns = tl.where(begin < end, D, 0)  # nothing to read for most latents of a wide W
        w = tl.load(W + segment * D + d, mask=d < columns, other=0.0)
        acc = tl.fma(w.to(tl.float32), -tl.load(along + segment).to(tl.float32), acc)
    # streamed: the sums shall not push the columns of X out of L2
    tl.store(
        sums + segment * D + d, acc.to(sums.dtype.element_ty), mask=d < D, cache_modifier=".cs"
    )


@triton.jit(do_not_specialize=["E"])
@no_type_check
def gather_dot_kernel(
    products,  # [E]
    x,  # [B, D]
    rows,  # [E]
    latents,  # [E]
    W,  # [N, D]
    E,
    D,
    DOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Multiply each entry's row of x by its latent's row of W."""
    # A program has so many entries, not a row: rows may have none, or thousands. Neighbouring
    # entries are mostly of one row, whose columns then come from L1 after the first time: keep
    # them there. Rows of W are not needed again soon.
    e = tl.program_id(0).to(tl.int64) * DOTS + tl.arange(0, DOTS)
    real = e < E
    row = tl.load(rows + e, mask=real, other=0).to(tl.int64)
    latent = tl.load(latents + e, mask=real, other=0).to(tl.int64)
    acc = tl.zeros((DOTS, COLUMNS), tl.float32)
    for start in range(0, D, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        inside = real[:, None] & (d < D)[None, :]
        w_offsets = latent[:, None] * D + d[None, :]
        x_offsets = row[:, None] * D + d[None, :]
        w = tl.load(W + w_offsets, mask=inside, other=0.0, eviction_policy="evict_first")
        v = tl.load(x + x_offsets, mask=inside, other=0.0, eviction_policy="evict_last")
        acc = tl.fma(w.to(tl.float32), v.to(tl.float32), acc)
    product = tl.sum(acc, axis=1)  # over threads only once
    tl.store(products + e, product.to(products.dtype.element_ty), mask=real)
