"""The selection for NVIDIA GPUs, in Triton: each row's k largest pre-activations, in one pass.

Like `triton.py`, this has not yet run on a GPU. Sizes are derived by reasoning, not measured.

Each warp handles a row. It keeps the row's k best keys in registers and iterates over the products,
one tile at a time. Most tiles contain nothing to insert. If products are in random order, the n-th
product of a row is inserted with probability k / n, so k (1 + ln(n / k)) of n are inserted in
total: 280 of 65,536 for k = 32. Each other product costs only a load, the addition of the bias, and
its share of the tile's maximum.

Keys are those of `keys.py`, so the result is bitwise the same set as plain torch's.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_sae.kernels import torch as plain
from dist_sae.kernels.keys import NO_ENTRY

TILE_PRODUCTS = 512
"""Number of products that a warp compares at once: 32 bytes of bf16 per thread."""
_MAX_KEYS = 1024
"""Number of keys that fit into a warp's registers. With more keys, the insertions would cost more
than torch's top-k."""
_NO_ENTRY = tl.constexpr(NO_ENTRY)
_NEVER_LEAST = tl.constexpr(torch.iinfo(torch.int64).max)
_SIGN = tl.constexpr(0x7FFF_FFFF)
_LOW = tl.constexpr(0xFFFF_FFFF)


def keep_largest(best: Tensor, products: Tensor, bias: Tensor, latents: Tensor) -> Tensor:
    """See `Kernels.keep_largest`."""
    k = best.shape[1]
    if k > _MAX_KEYS or products.dtype == torch.float64:
        return plain.keep_largest(best, products, bias, latents)
    kept = torch.empty_like(best, memory_format=torch.contiguous_format)
    keep_largest_kernel[(len(best),)](
        kept,
        best.contiguous(),
        products.contiguous(),
        bias.contiguous(),
        latents.contiguous(),
        products.shape[1],
        k,
        SLOTS=triton.next_power_of_2(k),
        TILE=TILE_PRODUCTS,
        num_warps=1,
    )
    return kept


# Shapes: B rows of the batch, C products per row, K keys kept per row.


@triton.jit(do_not_specialize=["K"])  # it changes while k is annealed
@no_type_check
def keep_largest_kernel(
    kept,  # [B, K] int64
    best,  # [B, K] int64
    products,  # [B, C]
    bias,  # [C]
    latents,  # [C] int64
    C,
    K,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Keep the K largest keys among a row's best keys so far and its products."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    keys = tl.load(best + row * K + slot, mask=slot < K, other=_NEVER_LEAST)
    # Empty slots must differ, or one key would be inserted into all of them. No real key is as low.
    keys = tl.where(keys == _NO_ENTRY, keys + slot, keys)
    least = tl.min(keys, 0)
    for start in range(0, C, TILE):
        c = start + tl.arange(0, TILE)
        real = c < C
        value = tl.load(products + row * C + c, mask=real, other=float("-inf")).to(tl.float32)
        value += tl.load(bias + c, mask=real, other=0.0).to(tl.float32)
        bits = (value + 0.0).to(tl.int32, bitcast=True)  # -0 is 0
        order = bits ^ ((bits >> 31) & _SIGN)
        if tl.max(order, 0) >= (least >> 32):
            low = _LOW - tl.load(latents + c, mask=real, other=0)
            found = tl.where(real, (order.to(tl.int64) << 32) | low, _NO_ENTRY)
            largest = tl.max(found, 0)
            while largest > least:
                keys = tl.where(keys == least, largest, keys)
                found = tl.where(found == largest, _NO_ENTRY, found)
                least = tl.min(keys, 0)
                largest = tl.max(found, 0)
    keys = tl.where(keys < _NO_ENTRY + SLOTS, _NO_ENTRY, keys)
    tl.store(kept + row * K + slot, keys, mask=slot < K)
