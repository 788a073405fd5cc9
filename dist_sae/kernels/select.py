"""The encoder product, computed chunk by chunk of latents, and selections from it.

At most `[batch, chunk]` pre-activations are in memory at once. Selections are exact (`keys.py`).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dist_sae.kernels.base import Entries, Kernels
from dist_sae.kernels.keys import NO_ENTRY, from_keys

CHUNK_LATENTS = 8192
"""Number of latents in a chunk. Their encoder rows are converted to the product's precision once
per chunk."""
_GROUP = 16  # latents
CHUNK_BYTES = 64 * 2**20
"""Size of a block of pre-activations, small enough to be in a CPU's cache when it is scanned."""
_CUDA_FACTOR = 8
_FEW_ROWS = 8
ROW_ALIGNMENT = 16
"""Block heights are a multiple of this number of rows if the batch is.

A product of only a few rows is rounded differently (measured: 1 to 3 rows, fp32). So no short block
may remain at the end. Its bits would depend on the height of the earlier blocks, which differs
between shards of different widths.
"""


class Candidates(NamedTuple):
    """Entries of a batch that a selection may keep."""

    values: Float[Tensor, " entries"]
    rows: Int[Tensor, " entries"]
    latents: Int[Tensor, " entries"]


@runtime_checkable
class EncoderRows(Protocol):
    """Encoder rows that are not in memory. A slice of them is not in memory either."""

    @property
    def dtype(self) -> torch.dtype: ...

    def __len__(self) -> int: ...

    def __getitem__(self, place: slice | Tensor, /) -> "EncoderRows": ...

    def to(self, dtype: torch.dtype, /) -> Tensor:
        """Read the rows in a precision."""
        ...


def block_size(on_a_cpu: int, device: torch.device) -> int:
    """Return the block size for a device, given the size that fits a CPU's cache.

    A GPU needs larger blocks. The ten or so kernels of a block take 50 us to launch whatever its
    size, so a block must contain much more work than that. 2^28 products, 512 MiB of bf16, take
    half a millisecond on an H100 at width 768. Blocks small enough for its L2 cache would take a
    tenth of that. A selection that converts 2^28 products to fp32 needs 2 GiB. These figures are
    estimates, not measurements.
    """
    return on_a_cpu * _CUDA_FACTOR if device.type == "cuda" else on_a_cpu


class Block(NamedTuple):
    """A block of x W_enc^T."""

    rows: slice
    latents: Int[Tensor, " chunk"]
    """The latents of the chunk, ascending."""
    products: Float[Tensor, "rows chunk"]
    """The products, overwritten by the next block."""
    starts_new_range: bool
    """Whether this block starts a chunk of latents that are higher than all earlier latents."""


def products(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "n_latents d_read"] | EncoderRows,
    product_dtype: torch.dtype,
    among: Int[Tensor, " some"] | None = None,
    *,
    layers: int = 1,
    counts: Sequence[int] | None = None,
) -> Iterator[Block]:
    """Yield the encoder product block by block: all rows of a chunk of latents, then the next.

    Args:
        x: Rows, centered if the recipe centers them.
        W_enc: Encoder.
        product_dtype: Precision of the product.
        among: Latents to compute, ascending. All if None.
        layers: Number of equal parts of a row. Latent n reads part n % layers, and all latents of a
            block read the same part.
        counts: How many of `among` read each part. Without them, the host waits for the device if
            there are several parts.
    """
    parts = x.to(product_dtype).chunk(layers, dim=1)
    n = len(W_enc) if among is None else len(among)
    width = max(1, min(block_size(CHUNK_LATENTS, x.device), n))
    max_height = block_size(CHUNK_BYTES, x.device) // (width * product_dtype.itemsize)
    if max_height > ROW_ALIGNMENT:
        max_height -= max_height % ROW_ALIGNMENT
    height = max(1, min(max_height, len(x)))
    # For a few rows on a CPU, W x^T takes a third to four fifths of the time of x W^T. Its last
    # bits differ, so it is used only with a stored encoder, whose codes are only shown for texts.
    of_texts = not isinstance(W_enc, Tensor) and len(x) <= _FEW_ROWS
    # one buffer for all blocks: page faults of fresh memory cost more than writing to it
    out = x.new_empty(height * width, dtype=product_dtype)
    chunks = (
        _all_chunks(n, width, layers, x.device)
        if among is None
        else _chunks_among(among, width, layers, counts)
    )
    for layer, place, latents, starts_new_range in chunks:
        weights = W_enc[place].to(product_dtype)
        for top in range(0, len(x) if len(latents) else 0, height):
            rows = slice(top, min(top + height, len(x)))
            shape = rows.stop - top, len(weights)
            block = out[: shape[0] * shape[1]].view(shape)
            if of_texts:
                block.copy_(torch.mm(weights, parts[layer][rows].T).T)
            else:
                torch.mm(parts[layer][rows], weights.T, out=block)
            yield Block(rows, latents, block, starts_new_range and top == 0)


_Chunk = tuple[int, slice | Tensor, Tensor, bool]
"""The layer that a chunk's latents read, their place in W_enc, their numbers, and
`Block.starts_new_range`."""


def _all_chunks(n: int, width: int, layers: int, device: torch.device) -> Iterator[_Chunk]:
    step = width * layers
    for first in range(0, n, step):
        for layer in range(layers):
            place = slice(first + layer, min(first + step, n), layers)
            latents = torch.arange(place.start, place.stop, layers, device=device)
            yield layer, place, latents, layer == 0


def _chunks_among(
    among: Tensor, width: int, layers: int, counts: Sequence[int] | None
) -> Iterator[_Chunk]:
    assert counts is None or len(counts) == layers, "one count per layer is required"
    for layer in range(layers):
        latents = among
        if layers > 1:
            count = None if counts is None else counts[layer]
            latents = among[true_indices(among % layers == layer, count)]
        for some in torch.split(latents, width):
            yield layer, some, some, layers == 1


def topk_keys(
    blocks: Iterable[Block],
    batch: int,
    b_enc: Float[Tensor, " n_latents"],
    k: int,
    kernels: Kernels,
    *,
    first: int = 0,
) -> Int[Tensor, "batch k"]:
    """Return the keys of the k largest of x W_enc^T + b_enc in each row, unsorted. No gradient.

    Args:
        blocks: x W_enc^T, chunk by chunk.
        batch: Number of rows of x.
        b_enc: Encoder bias.
        k: Number of keys per row. If a row meets fewer latents, the rest is `NO_ENTRY`.
        kernels: The sparse products.
        first: Number of the first latent.
    """
    best = b_enc.new_full((batch, k), NO_ENTRY, dtype=torch.int64)
    for rows, columns, block, _ in blocks:
        best[rows] = kernels.keep_largest(best[rows], block, b_enc[columns], columns + first)
    return best


def entries_of(
    keys: Int[Tensor, "batch k"],
    threshold: Int[Tensor, " batch"],
    first: int,
    n_latents: int,
    count: int | None = None,
) -> tuple[Float[Tensor, " entries"], Entries]:
    """Return pre-activations and entries of the keys that reach their row's threshold.

    Args:
        keys: Keys of each row.
        threshold: Threshold of each row, itself a key.
        first: Number of the first latent.
        n_latents: Number of columns of the matrix.
        count: Number of keys that reach it. Without it the host waits for the device.
    """
    if count == keys.numel():
        found, counts = keys.flatten(), keys.new_full((len(keys),), keys.shape[1])
    else:
        chosen = (keys >= threshold[:, None]) & (keys > NO_ENTRY)
        found, counts = keys.flatten()[true_indices(chosen.flatten(), count)], chosen.sum(1)
    values, latents = from_keys(found)
    return values, Entries(latents - first, counts.cumsum(0) - counts, n_latents)


def true_indices(mask: Bool[Tensor, " _"], count: int | None = None) -> Int[Tensor, " count"]:
    """Return the indices where a mask is true. Without `count` the host waits for the device."""
    places = mask.nonzero() if count is None else mask.nonzero_static(size=count)
    return places[:, 0]


def above(
    blocks: Iterable[Block],
    b_enc: Float[Tensor, " n_latents"],
    bound: Float[Tensor, " n_latents"],
    kernels: Kernels,
    *,
    limit: int | None = None,
) -> Candidates | None:
    """Return all entries of x W_enc^T + b_enc that exceed their latent's bound. No gradient.

    Args:
        blocks: x W_enc^T, chunk by chunk.
        b_enc: Encoder bias.
        bound: Bound of each latent.
        kernels: The sparse products.
        limit: Largest number of entries. Stop when there are more.

    Returns:
        The entries by row, then by latent in chunk order, or None if there are more than `limit`.
    """
    found = [no_candidates(b_enc)]
    for block in blocks:
        found.append(_above(block, b_enc, bound[block.latents], kernels))
        if limit is not None and sum(len(c.rows) for c in found) > limit:
            return None
    return by_row(Candidates(*map(torch.cat, zip(*found, strict=True))))


def largest(
    blocks: Iterable[Block], b_enc: Float[Tensor, " n_latents"], count: int, kernels: Kernels
) -> Candidates:
    """Return the `count` largest positive entries of x W_enc^T + b_enc over the whole batch.

    No gradient.

    Args:
        blocks: x W_enc^T, chunk by chunk.
        b_enc: Encoder bias.
        count: Number of entries to select, at least 1.
        kernels: The sparse products.

    Returns:
        The `count` largest, or all positive entries if there are fewer, in any order. Some equal or
        smaller entries may be included. Of equal values, those of the lower latents are always
        included.
    """
    found = no_candidates(b_enc)
    bound = least = b_enc.new_zeros(())
    for block in blocks:
        # cut early while there is no bound, or the next block would add all its positive entries
        if len(found.values) > (count if block.starts_new_range or bound == 0 else 2 * count):
            found, bound = _cut(found, count)
        # values equal to the bound lose in a later chunk, but within a chunk, which has several
        # blocks of rows, a later row may have a lower latent
        if block.starts_new_range:
            least = bound
        over = torch.where(bound > least, _just_below(bound), least)
        if not len(found.values) and block.products.numel() > 4 * count:
            # a bound from the block itself, which drops most of the first block
            reached = kth_lower_bound(block.products + b_enc[block.latents], count)
            over = over if reached is None else torch.maximum(over, _just_below(reached))
        more = _above(block, b_enc, over.expand(len(block.latents)), kernels)
        found = Candidates(*map(torch.cat, zip(found, more, strict=True)))
    return _cut(found, count)[0] if len(found.values) > count else found


def _above(block: Block, b_enc: Tensor, bounds: Tensor, kernels: Kernels) -> Candidates:
    values, rows, columns = kernels.above(block.products, b_enc[block.latents], bounds)
    return Candidates(values, rows + block.rows.start, block.latents[columns])


def _just_below(value: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the next smaller number, so that `> bound` keeps `value` itself."""
    return value.nextafter(value.new_tensor(-torch.inf))


def kth_lower_bound(pre_acts: Float[Tensor, "rows chunk"], count: int) -> Float[Tensor, ""] | None:
    """Compute a lower bound on the `count`-th largest from group maxima.

    Return None if there are fewer groups than `count`.
    """
    peaks = pre_acts[:, : pre_acts.shape[1] // _GROUP * _GROUP]
    peaks = peaks.reshape(len(peaks), _GROUP, -1).amax(1)
    return kth_largest(peaks, count) if peaks.numel() >= count else None


def by_row(found: Candidates) -> Candidates:
    """Sort the candidates by row, stably."""
    order = found.rows.int().argsort(stable=True)
    return Candidates(*(part[order] for part in found))


def no_candidates(like: Tensor) -> Candidates:
    """Return empty candidates with the dtype and device of a tensor."""
    rows, latents = like.new_empty((2, 0), dtype=torch.int64)
    return Candidates(like.new_empty(0), rows, latents)


def _cut(found: Candidates, count: int) -> tuple[Candidates, Tensor]:
    """Return the `count` largest, with ties of the smallest, and the smallest value."""
    bound = kth_largest(found.values, count)
    reach = found.values >= bound
    return Candidates(*(part[reach] for part in found)), bound


def kth_largest(values: Float[Tensor, "*shape"], k: int) -> Float[Tensor, ""]:
    """Return the k-th largest value."""
    return values.flatten().topk(k, sorted=False).values.min()
