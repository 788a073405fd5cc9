"""The sparse products for NVIDIA GPUs, in Triton, written for Hopper.

Selections are in triton_select.py, updates in triton_update.py.

These kernels have not yet run on a GPU. The tests run them in Triton's interpreter on a CPU, and
compile them for Hopper and Ampere. That checks their results, not their speed. Block sizes, loads
in flight, cache hints and the order of programs are derived by reasoning, not measured.

`combine` and `sum_by_latent` are the same operation: a sum of weighted rows over segments of
entries. The segments are the batch's rows in `combine`, and the latents in `sum_by_latent`. Like
`gather_dot`, it is bound by memory bandwidth, so it needs wide loads with many in flight.

Sums are fp32, whatever the dtype of the tensors. Their order depends only on d_in and the entries:
nothing is added atomically, and the autotuner chooses only among settings with bitwise equal
results. So a resumed run is bitwise equal to one that was never stopped.

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
"""Number of entries that one program sums."""
"""Number of entries per chunk of a long segment. Chunks are summed separately, so this determines
the order of the sum."""
_DOTS = 8
"""Number of products that a program of `gather_dot` computes."""
_COLUMNS = 512
"""Number of columns in a block that is not autotuned."""
_PER_WARP = 128
"""Number of columns that a warp loads at once: 16 bytes of fp32 per thread."""


def _config(columns: int, warps: int) -> Any:
    # With fewer registers, the compiler loads and uses one row at a time.
    registers = 32 + 8 * columns // (32 * warps)
    return triton.Config({"COLUMNS": columns}, num_warps=warps, maxnreg=registers)


_SIZES = ((_COLUMNS, 4), (_PER_WARP, 1), (256, 1), (256, 2), (512, 2), (1024, 4), (2048, 4))
_TUNED = [_config(columns, warps) for columns, warps in (*_SIZES, (2048, 8))]
if os.environ.get("TRITON_INTERPRET") == "1":  # timings in the interpreter mean nothing
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
    # gathered in order once, since every block of columns reads all of them
    latents = entries.latents[order]
    return _sum_segments(coefficients[order], entries.rows[order], latents, starts, rows, W, along)


def gather_dot(rows: Tensor, entries: Entries, W: Tensor) -> Tensor:
    """See `Kernels.gather_dot`."""
    _check(W, entries.latents)
    E, D = len(entries.latents), W.shape[1]
    products = W.new_empty(E)
    # not autotuned, because the summation order of a product depends on the block and the warps
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
    """Sum coefficient * X[source] over the entries of each segment. Empty segments get zeros.

    Runs in two passes for load balance. A program sums a block of columns of a segment. With a
    single pass, a latent that fires on every row, or a row to which BatchTopK gives thousands of
    latents, would keep its programs busy long after the others finish. So the first pass sums the
    chunks of `CHUNK_ENTRIES` entries that are within one segment. The second pass adds up these
    sums and the remaining entries at the segment's ends.

    Args:
        coefficients: Coefficients of the entries, in segment order.
        sources: The row of X that each entry reads.
        segments: The segment of each entry.
        starts: Index of each segment's first entry.
        X: The rows.
        W: A row for each segment.
        along: For each segment, the factor of its row of W that is subtracted if it has entries.
            Required with W.
    """
    _check(X, sources)
    E, S, D = len(sources), len(starts), X.shape[1]
    n_chunks = E // CHUNK_ENTRIES
    # autograd may pass expanded, non-contiguous gradients
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
    # kernels multiply these by D, and 4M latents x 4096 columns overflow an int32
    assert numbers.dtype == torch.int64


def _block(d_in: int) -> int:
    """Return the number of columns in a block that is not autotuned."""
    return int(min(_COLUMNS, triton.next_power_of_2(d_in)))


def prune_configs(configs: list[Any], named_args: dict[str, Any], **_: Any) -> list[Any]:
    """Filter the autotuner's configurations: those whose blocks are not wider than a row needs."""
    widest = max(_PER_WARP, triton.next_power_of_2(named_args["D"]))
    return [config for config in configs if config.kwargs["COLUMNS"] <= widest]


# The kernels. `no_type_check` keeps run-time type checkers from wrapping them, since Triton reads
# their source. Fused multiply-adds are explicit. The compiler may not add others
# (enable_fp_fusion=False), because its choice might differ between blocks. Grids are
# one-dimensional, because only the x dimension may exceed 65,535.


@triton.jit
@no_type_check
def _add_rows(acc, coefficients, sources, X, first, end, d, D):
    """Add the weighted rows of X for entries first to end to acc, in order."""
    # Unrolled by four, so that four loads are in flight before the first result is used. For a
    # plain loop, the compiler emits code that waits after every one or two rows. Entries past the
    # end are masked out in all columns.
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
    chunks,  # [n_chunks, D] fp32: sums; not written for a chunk in more than one segment
    coefficients,  # [E]
    sources,  # [E]
    segments,  # [E]
    X,  # [., D]
    n_chunks,
    D,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum each chunk that is within one segment."""
    program = tl.program_id(0)
    chunk = (program % n_chunks).to(tl.int64)
    first = chunk * CHUNK
    if tl.load(segments + first) == tl.load(segments + first + CHUNK - 1):
        d = program // n_chunks * COLUMNS + tl.arange(0, COLUMNS)
        acc = tl.zeros((COLUMNS,), tl.float32)
        acc = _add_rows(acc, coefficients, sources, X, first, first + CHUNK, d, D)
        tl.store(chunks + chunk * D + d, acc, mask=d < D)


@triton.autotune(_TUNED, key=["SCALE", "D"], prune_configs_by={"early_config_prune": prune_configs})
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
    SCALE,  # noqa: ARG001 - S to a power of two, to tune by: routed S differs at each step
    E,
    D,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum each segment from its chunks' sums and the entries at its ends."""
    # The first block of columns of all segments, then the second, and so on. Programs that run at
    # the same time then read the same columns of X, which may fit into L2 (8192 rows of 512 fp32
    # are 16 MiB) and be served from there when they are read again.
    program = tl.program_id(0)
    segment = (program % S).to(tl.int64)
    d = program // S * COLUMNS + tl.arange(0, COLUMNS)

    begin = tl.load(starts + segment)
    end = tl.load(starts + segment + 1, mask=segment + 1 < S, other=E)
    first_chunk = (begin + CHUNK - 1) // CHUNK
    end_chunk = tl.maximum(end // CHUNK, first_chunk)  # chunks in between belong to this segment
    head_end = tl.minimum(first_chunk * CHUNK, end)
    tail = tl.maximum(end_chunk * CHUNK, head_end)

    acc = tl.zeros((COLUMNS,), tl.float32)
    acc = _add_rows(acc, coefficients, sources, X, begin, head_end, d, D)
    for chunk in tl.range(first_chunk, end_chunk):
        acc += tl.load(chunks + chunk * D + d, mask=d < D, other=0.0)
    acc = _add_rows(acc, coefficients, sources, X, tail, end, d, D)
    if W is not None:
        columns = tl.where(begin < end, D, 0)  # skips latents without entries: most of a wide W
        w = tl.load(W + segment * D + d, mask=d < columns, other=0.0)
        acc = tl.fma(w.to(tl.float32), -tl.load(along + segment).to(tl.float32), acc)
    # streaming store, so that the sums do not evict the columns of X from L2
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
    """Compute the dot product of each entry's row of x and its latent's row of W."""
    # A program handles DOTS entries instead of a row, since a row may have none, or thousands.
    # Adjacent entries are mostly of the same row of x, so it is kept in L1 (evict_last). Rows of W
    # are not needed again soon (evict_first).
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
    product = tl.sum(acc, axis=1)  # a single reduction across threads, at the end
    tl.store(products + e, product.to(products.dtype.element_ty), mask=real)
